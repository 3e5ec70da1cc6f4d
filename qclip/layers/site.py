"""What every quantized site has in common: codes that keep their dtype, packed in memory, canonical on disk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import qkernels
from qkernels import Int4Weight, Int8Weight

from .shown_weight import ShownWeight

FIXED = ("codes", "scales", "zeros", "smooth", "input_scale")  # what `.half()` and `.bfloat16()` leave alone

Weight = Int8Weight | Int4Weight


class QuantizedSite(nn.Module):
    """Holds one quantized weight `[N, K]`; subclasses compute with it.

    Buffers: `codes`, `scales`, `zeros` (None where symmetric) as in `Int8Weight` / `Int4Weight`; `smooth` float32 `[K]`
    multiplies the input before it is quantized, so the weight carries its inverse; `input_scale` float32 `[]` is the
    static scale of the input, None = dynamic per token. The packed form replaces the canonical one in memory;
    `state_dict` holds the canonical form, bit for bit.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    smooth: Tensor | None
    input_scale: Tensor | None
    witness: Tensor

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        smooth: Tensor | None = None,
        input_scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape, self.group, self.layout = weight.shape, getattr(weight, "group", None), weight.layout
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", getattr(weight, "zeros", None))
        self.register_buffer("smooth", None if smooth is None else smooth.float())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        # An empty tensor that follows `.half()` and `.to()`: it tells others our compute dtype and device.
        self.register_buffer("witness", torch.empty(0, dtype=dtype, device=weight.codes.device), persistent=False)

    @property
    def weight(self) -> ShownWeight:
        """For readers of `weight.dtype` and `weight.device` (open_clip, transformers)."""
        return ShownWeight(self.witness.dtype, self.witness.device, self.shape)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """`x @ model.visual.proj`, which is a parameter in open_clip's own model."""
        return self(x)  # type: ignore[no-any-return]

    @property
    def quantized(self) -> Weight:
        """The weight as the ops take it, in whatever form it is held."""
        if self.group is None:
            return Int8Weight(self.codes, self.scales, self.shape, self.layout)
        return Int4Weight(self.codes, self.scales, self.zeros, self.shape, self.group, self.layout)

    def _hold(self, weight: Weight) -> None:
        self.codes, self.scales, self.layout = weight.codes, weight.scales, weight.layout
        if isinstance(weight, Int4Weight):
            self.zeros = weight.zeros

    def pack(self) -> None:
        """Replace the weight by the form that the backend of its device wants. Nothing on the meta device."""
        if self.codes.device.type != "meta":
            self._hold(qkernels.pack(self.quantized))

    def unpack(self) -> None:
        self._hold(self.quantized.canonical())

    def dequantized_weight(self) -> Tensor:
        """The effective weight, float32 `[N, K]`, in the basis of the unsmoothed input."""
        weight = self.quantized.canonical().dequantize()
        return weight if self.smooth is None else weight * self.smooth

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantizedSite:
        packed = self.layout != "canonical"
        if packed:
            self.unpack()
        fixed = {name: self._buffers[name] for name in FIXED if self._buffers[name] is not None}
        for name in fixed:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        for name, tensor in fixed.items():
            device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
            if device == tensor.device:
                moved = tensor
            elif tensor.device.type == "meta":
                moved = torch.empty_like(tensor, device=device)
            else:
                moved = tensor.to(device)
            self._buffers[name] = moved
        if packed:
            self.pack()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.quantized.canonical()
        for name in ("codes", "scales", "zeros"):
            tensor = getattr(weight, name, None)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        packed = self.layout != "canonical"
        if packed:
            self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        if packed:
            self.pack()

    def extra_repr(self) -> str:
        n, k = self.shape
        smooth = ", smooth" if self.smooth is not None else ""
        static = ", static" if self.input_scale is not None else ""
        group = f", group={self.group}" if self.group else ""
        return f"{k}, {n}{group}{smooth}{static}, layout={self.layout!r}"
