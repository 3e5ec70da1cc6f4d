"""timm's SwinTransformer (Liu et al. 2103.14030): attention within windows, with a bias for every distance."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from .explicit import Form, affine, attention_sites, become, mlp_sites, patch_site, unsupported
from .timm_parts import Parts, attention, mlp
from .tower import Block, Site, normed


class ExplicitWindowAttention(Form):
    """The window attention around the explicit `core`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self._get_rel_pos_bias()  # [1, H, N, N]
        if mask is not None:  # [windows, N, N]; x is [B * windows, N, D], an image's windows side by side
            bias = (bias + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return self.core(x, mask=bias)


class ExplicitSwinBlock(Form):
    """The block, on `[B, H, W, C]`, with the explicit cores."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        tokens = x.flatten(1, 2)
        return (tokens + self.drop_path2(normed(self.norm2, self.mlp, tokens))).view(x.shape)


def swin(trunk: Any) -> Parts:
    if trunk.dynamic_img_size:
        raise unsupported(trunk, "dynamic_img_size: its windows are those of one image size")
    height, width = trunk.patch_embed.grid_size
    first = patch_site("vision", trunk.patch_embed, "proj", height * width)
    blocks: list[Block] = []
    for stage in trunk.layers:
        down = _downsample(f"vision.blocks.{len(blocks)}.downsample", stage)
        for block in stage.blocks:
            blocks.append(_block(f"vision.blocks.{len(blocks)}", block, down))
            down = {}
    return Parts(blocks, first, height * width)


def _downsample(name: str, stage: Any) -> dict[str, Site]:
    merging = stage.downsample
    if isinstance(merging, nn.Identity):
        return {}
    if type(merging) is not PatchMerging:
        raise unsupported(merging)
    rows, smooth = stage.output_resolution[0] * stage.output_resolution[1], affine(merging.norm)
    return {"downsample": Site(name, "downsample", "norm", f"{name}.in", merging, "reduction", smooth, rows)}


def _block(name: str, block: Any, down: dict[str, Site]) -> Block:
    if not isinstance(block, ExplicitSwinBlock):
        if type(block) is not SwinTransformerBlock:
            raise unsupported(block)
        inner = mlp(block.mlp)
        _explicit_attention(block.attn)
        block.mlp = inner
        become(block, ExplicitSwinBlock)
    (height, width), (down_window, across_window) = block.input_resolution, block.window_size
    windows = -(-height // down_window) * -(-width // across_window)
    # Between the first norm and the core tokens change places, so that the norm cannot move into the core.
    sites = down | attention_sites(f"{name}.attn", block.attn.core, (block, "norm1"), windows * block.window_area)
    sites |= mlp_sites(f"{name}.mlp", block.mlp, (block, "norm2"), height * width)
    pairs = windows * block.window_area**2
    return Block(name, block, (block.attn, "core"), None, (block, "mlp"), (block, "norm2"), sites, pairs)


def _explicit_attention(module: Any) -> None:
    core = attention(module, (WindowAttention,), hooks=False)
    del module.qkv, module.proj, module.attn_drop, module.proj_drop, module.softmax
    module.core = core
    become(module, ExplicitWindowAttention)
