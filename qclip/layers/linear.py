"""Linear sites that run on the integer kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qkernels

from .site import QuantizedSite


class QuantizedLinear(QuantizedSite):
    """A linear map on the kernels. `forward` takes float `[..., K]` and gives float `[..., N]` of the same dtype.

    The two halves are there for modules that share a quantized input or pass one on: `quantize` and `linear`.
    """

    def quantize(self, x: Tensor, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor | None]:
        """Float `[..., K]` -> int8 codes and float32 scales `[...]`, after `norm` if given (fused with it)."""
        if norm is None:
            return qkernels.quantize_per_token(x, smooth=self.smooth, scale=self.input_scale)
        return qkernels.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, smooth=self.smooth,
                                            scale=self.input_scale)  # fmt: skip

    def linear(self, codes: Tensor, scale: Tensor | None, activation: str | None = None,
               out_scale: Tensor | None = None, dtype: torch.dtype | None = None,
               out_group: int | None = None) -> Any:  # fmt: skip
        """Codes and scales -> float of `dtype` (default: the compute dtype), or int8 with the static `out_scale`; with
        `out_group` int8 and its scales by groups of outputs, which the next site's `linear` takes."""
        raise NotImplementedError

    def same_input(self, other: nn.Module) -> bool:
        """Whether one quantized input serves both."""
        if not isinstance(other, QuantizedLinear) or type(self).takes_codes(self) != type(other).takes_codes(other):
            return False
        return all(_equal(getattr(self, name), getattr(other, name)) for name in ("smooth", "input_scale"))

    def takes_codes(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(*self.quantize(x))  # type: ignore[no-any-return]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.device.type == "meta":  # a skeleton: what is written into it later comes from one quantized model
        return a.shape == b.shape
    return torch.equal(a, b)


class Int8Linear(QuantizedLinear):
    """W8A8: `qkernels.int8_linear`."""

    def linear(self, codes: Tensor, scale: Tensor | None, activation: str | None = None,
               out_scale: Tensor | None = None, dtype: torch.dtype | None = None,
               out_group: int | None = None) -> Any:  # fmt: skip
        return qkernels.int8_linear(codes, scale, self.quantized, self.bias, activation=activation, out_scale=out_scale,
                                    out_group=out_group, out_dtype=dtype or self.witness.dtype)  # fmt: skip


class Int4Linear(QuantizedLinear):
    """W4A8 or, with `float_input`, W4A16: `qkernels.int4_linear`."""

    float_input = False

    def takes_codes(self) -> bool:
        return not self.float_input

    def quantize(self, x: Tensor, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor | None]:
        if not self.float_input:
            return super().quantize(x, norm)
        x = x if norm is None else norm(x)
        return (x if self.smooth is None else (x.float() * self.smooth).to(x.dtype)), None

    def linear(self, codes: Tensor, scale: Tensor | None, activation: str | None = None,
               out_scale: Tensor | None = None, dtype: torch.dtype | None = None,
               out_group: int | None = None) -> Any:  # fmt: skip
        return qkernels.int4_linear(codes, scale, self.quantized, self.bias, activation=activation, out_scale=out_scale,
                                    out_group=out_group, out_dtype=dtype or self.witness.dtype)  # fmt: skip
