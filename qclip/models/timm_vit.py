"""timm's VisionTransformer (CLIP, SigLIP, ViTamin) and its sibling with relative positions."""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from .explicit import Form, activation_name, become, no_dropout, patch_site, present, transformer_block, unsupported
from .timm_parts import Parts, attention, latent_pool, mlp
from .tower import Mlp, normed


class ExplicitBlock(Form):
    """timm's pre-norm block with the explicit cores."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        y = normed(self.norm1, self.attn, x, mask=attn_mask, causal=is_causal)
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(normed(self.norm2, self.mlp, x)))


class ExplicitRelPosBlock(Form):
    """The block whose attention adds a bias for every distance; `rel_pos` makes that, where it is the block's own."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        x = x + self.drop_path1(self.ls1(normed(self.norm1, self.attn, x, mask=bias)))
        return x + self.drop_path2(self.ls2(normed(self.norm2, self.mlp, x)))


class ExplicitGeGluMlp(Form):
    """ViTamin's MLP, which has a norm of its own, around the explicit `core`."""

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.norm, self.core, x)


def vision_transformer(trunk: Any) -> Parts:
    for block in trunk.blocks:
        if isinstance(block, ExplicitBlock):
            continue
        if type(block) is not TimmBlock:
            raise unsupported(block)
        inner = mlp(block.mlp) if type(block.mlp) is not GeGluMlp else _geglu(block.mlp)
        block.attn, block.mlp = attention(block.attn, (TimmAttention,)), inner
        become(block, ExplicitBlock)
    return _parts(trunk)


def _geglu(module: Any) -> nn.Module:
    no_dropout(module, module.drop1.p, module.drop2.p)
    core = Mlp(module.w1, module.w2, activation_name(module.act, unfused=True), gate=module.w0)
    del module.w0, module.w1, module.w2, module.act
    module.core = core.train(module.training)
    become(module, ExplicitGeGluMlp)
    return module  # type: ignore[no-any-return]


def relative_positions(trunk: Any) -> Parts:
    for block in trunk.blocks:
        if isinstance(block, ExplicitRelPosBlock):
            continue
        if type(block) is not RelPosBlock:
            raise unsupported(block)
        inner, core = mlp(block.mlp), attention(block.attn, (RelPosAttention,))
        block.attn, block.mlp, block.rel_pos = core, inner, block.attn.rel_pos
        become(block, ExplicitRelPosBlock)
    return _parts(trunk)


def _parts(trunk: Any) -> Parts:
    patches = trunk.patch_embed.num_patches
    tokens = patches + trunk.num_prefix_tokens
    blocks = []
    for i, b in enumerate(trunk.blocks):
        inside = isinstance(b.mlp, ExplicitGeGluMlp)
        core, norm = ((b.mlp, "core"), (b.mlp, "norm")) if inside else ((b, "mlp"), (b, "norm2"))
        blocks.append(transformer_block(f"vision.blocks.{i}", b, (b, "attn"), (b, "norm1"), core, norm, tokens))
    first = []
    if _is_patch(getattr(trunk.patch_embed, "proj", None)):
        first = patch_site("vision", trunk.patch_embed, "proj", patches)
    pool = getattr(trunk, "attn_pool", None)
    if pool is not None:
        blocks.append(latent_pool(pool, trunk.norm, tokens if trunk.pool_include_prefix else patches))
    return Parts(blocks, first, tokens)


def _is_patch(conv: nn.Module | None) -> bool:
    """A patch embedding: not taking part in the tower's own form, so any module that is written there counts. Behind a
    convolutional stem (MobileCLIP-B, ViTamin) there is none, and the stem stays as it is."""
    return present(conv) is not None and (not isinstance(conv, nn.Conv2d) or conv.kernel_size == conv.stride)
