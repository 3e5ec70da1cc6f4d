"""timm's Eva: EVA and EVA-02 (Fang et al. 2211.07636, 2303.11331), Perception Encoder (Bolya et al. 2504.13181)."""

from __future__ import annotations

from typing import Any

from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from .explicit import Form, become, patch_site, transformer_block, unsupported
from .timm_parts import Parts, attention, latent_pool, mlp
from .tower import normed


class ExplicitEvaBlock(Form):
    """The pre-norm block with the explicit cores."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        y = normed(self.norm1, self.attn, x, mask=attn_mask, causal=is_causal, rope=rope)
        x = x + self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)
        y = normed(self.norm2, self.mlp, x)
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class ExplicitEvaPostNormBlock(Form):
    """The block whose norms stand behind attention and MLP (EVA02-E): both read the residual stream as it is."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        x = x + self.drop_path1(self.norm1(self.attn(x, mask=attn_mask, causal=is_causal, rope=rope)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


FORMS: dict[type, type[Form]] = {EvaBlock: ExplicitEvaBlock, EvaBlockPostNorm: ExplicitEvaPostNormBlock}


def eva(trunk: Any) -> Parts:
    for block in trunk.blocks:
        if isinstance(block, tuple(FORMS.values())):
            continue
        if type(block) not in FORMS:
            raise unsupported(block)
        inner = mlp(block.mlp)
        block.attn, block.mlp = attention(block.attn, (EvaAttention, AttentionRope)), inner
        become(block, FORMS[type(block)])
    patches = trunk.patch_embed.num_patches
    tokens = patches + trunk.num_prefix_tokens
    blocks = []
    for i, b in enumerate(trunk.blocks):
        behind = isinstance(b, ExplicitEvaPostNormBlock)
        norms = (None, None) if behind else ((b, "norm1"), (b, "norm2"))
        places = (b, "attn"), norms[0], (b, "mlp"), norms[1]
        blocks.append(transformer_block(f"vision.blocks.{i}", b, *places, tokens, "raw" if behind else "norm"))
    if trunk.attn_pool is not None:
        blocks.append(latent_pool(trunk.attn_pool, trunk.norm, tokens))
    return Parts(blocks, patch_site("vision", trunk.patch_embed, "proj", patches), tokens)
