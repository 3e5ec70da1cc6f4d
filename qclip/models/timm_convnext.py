"""timm's ConvNeXt (Liu et al. 2201.03545)."""

from __future__ import annotations

from typing import Any

from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from .explicit import Form, affine, become, mlp_sites, patch_site, unsupported
from .timm_parts import Parts, mlp
from .tower import Block, Site, normed


class ExplicitConvBlock(Form):
    """A ConvNeXt block whose MLP is the explicit core, on `[B, H, W, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x)
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y).permute(0, 2, 3, 1))
        else:
            y = normed(self.norm, self.mlp, y.permute(0, 2, 3, 1))
        y = y.permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(y) + self.shortcut(x)


def convnext(trunk: Any, size: tuple[int, int]) -> Parts:
    first = list[Site]()
    if len(trunk.stem) == 2:  # the patch stem; the others are overlapping convolutions and stay as they are
        height, width = (side // _stride(trunk.stem[0]) for side in size)
        first = patch_site("vision", trunk.stem, "0", height * width)
    else:
        height, width = (-(-side // 4) for side in size)
    tokens = height * width
    blocks: list[Block] = []
    for stage in trunk.stages:
        down = {}
        if isinstance(stage.downsample, nn.Sequential):
            stride = _stride(stage.downsample[1])
            height, width = height // stride, width // stride
            name = f"vision.blocks.{len(blocks)}.downsample"
            smooth = affine(stage.downsample[0])
            place = stage.downsample, "1"
            down = {"downsample": Site(name, "downsample", "norm", f"{name}.in", *place, smooth, height * width)}
        for block in stage.blocks:
            name = f"vision.blocks.{len(blocks)}"
            if not isinstance(block, ExplicitConvBlock):
                if type(block) is not ConvNeXtBlock:
                    raise unsupported(block)
                block.mlp = mlp(block.mlp)
                become(block, ExplicitConvBlock)
            # With 1x1 convolutions the norm runs on [B, C, H, W], so that it cannot move into the core.
            norm = None if block.use_conv_mlp else (block, "norm")
            foldable = affine(block.norm) if block.use_conv_mlp else None
            found = down | mlp_sites(f"{name}.mlp", block.mlp, norm, height * width, foldable)
            blocks.append(Block(name, block, None, None, (block, "mlp"), norm, found))
            down = {}
    return Parts(blocks, first, tokens)


def _stride(module: Any) -> int:
    """Of a convolution, or of what was written in its place."""
    stride = getattr(module, "stride", None) or module.patch
    return stride[0] if isinstance(stride, tuple) else stride
