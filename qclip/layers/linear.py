"""Linear sites that run on the integer kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import qkernels
from qkernels import Int4Weight, Int8Weight
from qkernels.weights import lay_side_by_side, side_by_side

from ..models.hooks import runs_library_code, watched
from ..untrusted.schema import flag
from .gradients import refuse_gradients
from .site import Description, QuantizedSite
from .transforms import Shift, equal, same, transformed


class QuantizedLinear(QuantizedSite):
    """A linear map on the kernels. `forward` takes float `[..., K]` and gives float `[..., N]` of the same dtype.

    The two halves are there for modules that share a quantized input or pass one on: `quantize` and `linear`.
    """

    OP: ClassVar[str]  # the function of qkernels that multiplies

    def quantize(self, x: Tensor, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor | None]:
        """Float `[..., K]` -> int8 codes and float32 scales `[...]`, after `norm` if given (fused with it where no
        transform comes between, or a shift, which the norm's bias can make)."""
        before, rule = self.before, (self.smooth, self.input_scale, self.input_zero)
        if norm is not None and not before:
            return qkernels.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, *rule)
        if norm is not None and len(before) == 1 and isinstance(shift := before[0], Shift):
            weight, bias = norm.weight.float(), norm.bias.float() - shift.shift
            return qkernels.layer_norm_quantize(x, weight, bias, norm.eps, *rule)
        return qkernels.quantize_per_token(transformed(x if norm is None else norm(x), before), *rule)

    def linear(
        self,
        codes: Tensor,
        scale: Tensor | None,
        activation: str | None = None,
        out_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out_group: int | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        """Codes and scales -> float of `dtype` (default: the compute dtype), or int8 with the static `out_scale`; with
        `out_group` int8 and its scales by groups of outputs, which the next site's `linear` takes. `residual` float
        `[..., N]` is added last."""
        return getattr(qkernels, self.OP)(
            codes,
            scale,
            self.quantized,
            self.product_bias,
            activation=activation,
            residual=residual,
            out_scale=out_scale,
            out_group=out_group,
            out_dtype=dtype or self.witness.dtype,
        )

    def same_input(self, other: nn.Module) -> bool:
        """Whether one quantized input serves both."""
        if not isinstance(other, QuantizedLinear) or type(self).takes_codes(self) != type(other).takes_codes(other):
            return False
        constants = ("input_scale", "input_zero")
        return same(self.transforms, other.transforms) and all(
            equal(getattr(self, name), getattr(other, name)) for name in constants
        )

    def takes_codes(self) -> bool:
        """Whether `quantize` gives codes that `linear` reads, and needs no more."""
        return self.branch is None

    def takes_plain_codes(self) -> bool:
        """Whether the kernel before this site may write its codes: nothing is to be done to its input before, and its
        codes have no zero point."""
        return self.takes_codes() and not self.transforms and self.input_zero is None

    def forward(self, x: Tensor) -> Tensor:
        if self.branch is None:
            return refuse_gradients(self.linear(*self.quantize(x)), x, self)
        seen = transformed(x, self.transforms)
        return refuse_gradients(self.linear(*self._coded(seen), residual=self.branch(seen)), x, self)

    def _coded(self, seen: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `quantize` gives, of the input behind all transforms."""
        return qkernels.quantize_per_token(seen, None, self.input_scale, self.input_zero)


def takes_codes(site: nn.Module) -> bool:
    return isinstance(site, QuantizedLinear) and site.takes_codes()


def fusable(norm: nn.Module) -> bool:
    """Whether `layer_norm_quantize` can run `norm`. open_clip's and timm's subclasses differ in dtypes only; inside
    the kernel all is float32 anyway."""
    return (
        isinstance(norm, nn.LayerNorm)
        and norm.weight is not None
        and norm.bias is not None
        and len(norm.normalized_shape) == 1
        and runs_library_code(norm)
    )


def behind(norm: nn.Module | None, site: nn.Module, x: Tensor) -> Tensor:
    """`site(norm(x))`, the norm in one pass with the quantization where that is possible."""
    if norm is None:
        return site(x)  # type: ignore[no-any-return]
    if isinstance(site, QuantizedLinear) and site.takes_codes() and fusable(norm) and not watched(norm, site):
        return site.linear(*site.quantize(x, norm))  # type: ignore[no-any-return, arg-type]
    return site(norm(x))  # type: ignore[no-any-return]


ROWS = ("rows16", "halves128")  # layouts in which a weight is one row behind the other


def join(sites: Sequence[nn.Module]) -> None:
    """Lay the weights of sites that read one input side by side, so that `products` makes one product of theirs. Each
    site goes on holding its part. Nothing where the layout of their backend, or a difference between them, forbids it.
    """
    if not _alike(sites) or torch.compiler.is_compiling():
        return
    for name in ("codes", "scales", "zeros", "bias"):
        parts = [getattr(site, name) for site in sites]
        if any(type(part) not in (Tensor, nn.Parameter) for part in parts):
            continue
        for site, part in zip(sites, lay_side_by_side([part.detach() for part in parts]), strict=True):
            setattr(site, name, nn.Parameter(part, requires_grad=False) if name == "bias" else part)


def products(
    sites: Sequence[Any], codes: Tensor, scale: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """What `linear` of each site gives for the same codes, in one product where their weights lie side by side."""
    joined = _joined(sites)
    if joined is None:
        return tuple(site.linear(codes, scale, dtype=dtype) for site in sites)
    weight, bias = joined
    y = getattr(qkernels, sites[0].OP)(codes, scale, weight, bias, out_dtype=dtype or sites[0].witness.dtype)
    return y.split([site.shape[0] for site in sites], dim=-1)


def _alike(sites: Sequence[Any]) -> bool:
    first = sites[0]
    return all(
        isinstance(site, QuantizedLinear)
        and type(site) is type(first)
        and site.takes_codes()
        and site.zero_bias is None
        and site.layout in ROWS
        and site.layout == first.layout
        and site.group == first.group
        and site.shape[1] == first.shape[1]
        and (site.zeros is None) == (first.zeros is None)
        and (site.bias is None) == (first.bias is None)
        for site in sites
    )


def _joined(sites: Sequence[Any]) -> tuple[Int8Weight | Int4Weight, Tensor | None] | None:
    if torch.compiler.is_compiling() or sites[0].layout not in ROWS or not _alike(sites):
        return None
    parts: dict[str, Tensor | None] = {}
    for name in ("codes", "scales", "zeros", "bias"):
        tensors = [getattr(site, name) for site in sites]
        if tensors[0] is None:
            parts[name] = None
            continue
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return None  # fake ones have no place in memory
        if (whole := side_by_side([tensor.detach() for tensor in tensors])) is None:
            return None
        parts[name] = whole
    shape = sum(site.shape[0] for site in sites), sites[0].shape[1]
    codes, scales, layout = parts["codes"], parts["scales"], sites[0].layout
    assert codes is not None and scales is not None
    if sites[0].group is None:
        return Int8Weight(codes, scales, shape, layout), parts["bias"]
    return Int4Weight(codes, scales, parts["zeros"], shape, sites[0].group, layout), parts["bias"]


class Int8Linear(QuantizedLinear):
    """Weights of 1 to 8 bits per channel with INT8 activations: `qkernels.int8_linear`."""

    CONTAINERS = (Int8Weight,)
    OP = "int8_linear"

    def describe(self) -> Description:
        return Description(self.shape, "real", self.grid.bits, 8, self.OP, self.stored_bits)


class Int4Linear(QuantizedLinear):
    """W4A8 or, with `float_input`, W4A16: `qkernels.int4_linear`."""

    CONTAINERS = (Int4Weight,)
    OP = "int4_linear"
    SETTINGS = {"float_input": flag}

    def __init__(self, *args: Any, float_input: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.float_input = float_input

    def describe(self) -> Description:
        bits = None if self.float_input else 8
        return Description(self.shape, "real", self.grid.bits, bits, self.OP, self.stored_bits)

    def takes_codes(self) -> bool:
        return not self.float_input and super().takes_codes()

    def quantize(self, x: Tensor, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor | None]:
        if not self.float_input:
            return super().quantize(x, norm)
        x = x if norm is None else norm(x)
        return transformed(x, self.transforms).to(x.dtype), None

    def _coded(self, seen: Tensor) -> tuple[Tensor, Tensor | None]:
        return (seen.to(self.witness.dtype), None) if self.float_input else super()._coded(seen)
