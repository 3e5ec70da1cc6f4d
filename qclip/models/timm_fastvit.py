"""timm's FastViT (Vasu et al. 2303.14189), the image towers of MobileCLIP-S and MobileCLIP2 (2311.17049, 2508.20691).

Attention and the MLPs, which are 1x1 convolutions there, are quantized; all other convolutions stay float.
"""

from __future__ import annotations

from typing import Any

from timm.models.fastvit import Attention as FastVitAttention
from timm.models.fastvit import AttentionBlock, ConvMlp, RepMixerBlock
from torch import Tensor, nn

from .explicit import Form, affine, attention_sites, become, mlp_sites, unsupported
from .timm_parts import Parts, attention, convolutional_mlp
from .tower import Block, Site


class ExplicitConvMlp(Form):
    """A depthwise convolution, then the explicit `core` on `[B, H, W, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ExplicitAttentionBlock(Form):
    """Attention among all positions, `token_mixer` being the explicit core, then the MLP."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = self.token_mixer(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, y.shape[2:])
        x = x + self.drop_path1(self.layer_scale_1(mixed))
        return x + self.drop_path2(self.layer_scale_2(self.mlp(x)))


def fastvit(trunk: Any, size: tuple[int, int]) -> Parts:
    if trunk.fork_feat:
        raise unsupported(trunk, "it gives the features of its stages, not one embedding")
    height, width = (_halved(side, 2) for side in size)  # of the stem
    tokens, blocks = height * width, list[Block]()
    for stage in trunk.stages:
        if not isinstance(stage.downsample, nn.Identity):
            halvings = _stride(stage.downsample.proj[0]) // 2
            height, width = _halved(height, halvings), _halved(width, halvings)
        for block in stage.blocks:
            blocks.append(_block(f"vision.blocks.{len(blocks)}", block, height * width))
    return Parts(blocks, [], tokens)


def _stride(layer: Any) -> int:
    return int(layer.stride[0] if isinstance(layer.stride, tuple) else layer.stride)


def _halved(side: int, times: int) -> int:
    for _ in range(times):
        side = -(-side // 2)
    return side


def _block(name: str, block: Any, rows: int) -> Block:
    sites: dict[str, Site] = {}
    mixes = isinstance(block, ExplicitAttentionBlock)
    if not mixes:
        if type(block) not in (AttentionBlock, RepMixerBlock):
            raise unsupported(block)
        _explicit_mlp(block.mlp)
        if type(block) is AttentionBlock:
            # Called with [B, L, D] instead of [B, C, H, W]: hooks cannot go over.
            block.token_mixer = attention(block.token_mixer, (FastVitAttention,), hooks=False)
            become(block, ExplicitAttentionBlock)
            mixes = True
    if mixes:
        sites = attention_sites(f"{name}.attn", block.token_mixer, (block, "norm"), rows)
    norm = getattr(block.mlp.conv, "bn", None)
    sites |= mlp_sites(f"{name}.mlp", block.mlp.core, None, rows, affine(norm))
    core = (block, "token_mixer") if mixes else None
    return Block(name, block, core, None, (block.mlp, "core"), None, sites, rows * rows)


def _explicit_mlp(module: Any) -> None:
    if isinstance(module, ExplicitConvMlp):
        return
    if type(module) is not ConvMlp:
        raise unsupported(module)
    core = convolutional_mlp(module)
    del module.fc1, module.fc2, module.act, module.drop
    module.core = core
    become(module, ExplicitConvMlp)
