"""Convolutions whose kernel equals their stride (patch embedding, ConvNeXt stem and downsampling) as a linear site."""

from __future__ import annotations

from torch import Tensor, nn

import qkernels

from ..models.hooks import watched
from .gradients import refuse_gradients
from .linear import QuantizedLinear
from .shown_weight import ShownWeight


class QuantizedPatch(nn.Module):
    """`[B, C, H, W]` -> `[B, N, H/p, W/p]`: every patch a row of `K = C*p*p`, in the order (C, kh, kw).

    Like a convolution without padding it drops what is left over at the right and lower edge.
    """

    def __init__(self, site: nn.Module, patch: tuple[int, int]) -> None:
        super().__init__()
        self.site, self.patch = site, patch

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
        n, k = self.site.shape  # type: ignore[misc]
        shown: ShownWeight = self.site.weight  # type: ignore[assignment]
        return ShownWeight(shown.dtype, shown.device, (n, k // (self.patch[0] * self.patch[1]), *self.patch))

    @property
    def bias(self) -> Tensor | None:
        return self.site.bias  # type: ignore[return-value]

    def dequantized_weight(self) -> Tensor:
        return self.site.dequantized_weight()  # type: ignore[operator, no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        ph, pw = self.patch
        rows, columns = height // ph, width // pw
        site = self.site
        if isinstance(site, QuantizedLinear) and site.takes_codes() and not watched(site):
            y = site.linear(*qkernels.quantize_patches(x, self.patch, site.smooth, site.input_scale))
            y = refuse_gradients(y, x, site)
        else:
            x = x[:, :, : rows * ph, : columns * pw].reshape(batch, channels, rows, ph, columns, pw)
            y = site(x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * ph * pw))
        return y.transpose(1, 2).unflatten(2, (rows, columns))
