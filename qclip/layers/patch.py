"""Convolutions whose kernel equals their stride (patch embedding, ConvNeXt stem and downsampling) as a linear site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import qkernels

from ..models.hooks import watched
from ..untrusted.schema import Check, Refused, listing, one_of, record, whole
from .gradients import refuse_gradients
from .linear import QuantizedLinear
from .registry import check, from_facts
from .shown_weight import ShownWeight
from .site import Description, QuantizedSite


def _inner(facts: Any, where: str) -> None:
    """Checks the facts of the linear layer within a patch: any layer but another patch."""
    if isinstance(facts, dict) and facts.get("class") == QuantizedPatch.__name__:
        raise Refused(f"{where} is of class {facts['class']!r}, within another one")
    check(facts, where)


class QuantizedPatch(nn.Module):
    """`[B, C, H, W]` -> `[B, N, H/p, W/p]`: every patch a row of `K = C*p*p`, in the order (C, kh, kw).

    Like a convolution without padding it drops what is left over at the right and lower edge.
    """

    def __init__(self, site: QuantizedSite, patch: tuple[int, int]) -> None:
        super().__init__()
        self.site, self.patch = site, patch

    def describe(self) -> Description:
        return self.site.describe()

    def facts(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "patch": list(self.patch), "site": self.site.facts()}

    @classmethod
    def schema(cls) -> Check:
        fields = {"class": one_of(cls.__name__), "patch": listing(whole(1, 1024), 2, 2), "site": _inner}
        return record(fields, tuple(fields))

    def misfit(self, module: nn.Module) -> str:
        kernel = getattr(module, "kernel_size", None)
        if kernel is None or tuple(kernel) != self.patch:
            return f"takes patches of {self.patch}, and its architecture of {kernel}"
        n, k = module.weight.flatten(1).shape
        return self.site.misfit(nn.Linear(k, n, module.bias is not None, device="meta"))

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> QuantizedPatch:
        height, width = facts["patch"]
        return cls(from_facts(facts["site"]), (int(height), int(width)))

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        return (
            isinstance(conv, nn.Conv2d)
            and tuple(conv.kernel_size) == tuple(conv.stride)
            and conv.groups == 1
            and tuple(conv.dilation) == (1, 1)
            and conv.padding in (0, (0, 0), "valid")
        )

    @property
    def weight(self) -> ShownWeight:
        n, k = self.site.shape
        shown = self.site.weight
        return ShownWeight(shown.dtype, shown.device, (n, k // (self.patch[0] * self.patch[1]), *self.patch))

    @property
    def bias(self) -> Tensor | None:
        return self.site.bias

    def dequantized_weight(self) -> Tensor:
        return self.site.dequantized_weight()

    def from_steps(self) -> Callable[[Tensor], Tensor]:
        return self.site.from_steps()

    def dequantized(self) -> nn.Module:
        flat = self.site.dequantized()
        n, k = self.site.shape
        height, width = self.patch
        conv = nn.Conv2d(k // (height * width), n, self.patch, self.patch, bias=flat.bias is not None, device="meta")
        conv.weight = nn.Parameter(flat.weight.detach().unflatten(1, (-1, height, width)))
        if flat.bias is not None:
            conv.bias = flat.bias
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        ph, pw = self.patch
        rows, columns = height // ph, width // pw
        site = self.site
        if isinstance(site, QuantizedLinear) and site.takes_codes() and not site.before and not watched(site):
            y = site.linear(*qkernels.quantize_patches(x, self.patch, site.smooth, site.input_scale, site.input_zero))
            y = refuse_gradients(y, x, site)
        else:
            x = x[:, :, : rows * ph, : columns * pw].reshape(batch, channels, rows, ph, columns, pw)
            y = site(x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * ph * pw))
        return y.transpose(1, 2).unflatten(2, (rows, columns))
