"""The explicit form of mT5's encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .explicit import Form, activation_name, become, no_dropout, succeed, transformer_block, unsupported
from .hooks import watched
from .huggingface_form import known
from .text_bert import ExplicitEncoder, keep
from .text_m2m import within_half
from .tower import Attention, Block, Mlp, normed

T5 = "MT5"


class ExplicitT5(ExplicitEncoder):
    """mT5's encoder. The bias of relative positions, which the first block holds, and the mask are one mask here."""

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        x, length = self.embed_tokens(tokens), tokens.shape[1]
        bias = _bias(self.block[0].layer[0].SelfAttention, length, x.device).to(x.dtype)
        if mask is not None:
            bias = torch.where(keep(mask), bias, -torch.inf)  # type: ignore[arg-type]
        for block in self.block:
            x = block(x, bias)
        return BaseModelOutput(last_hidden_state=self.final_layer_norm(x))


def _bias(attention: Any, length: int, device: torch.device) -> Tensor:
    """The bias of relative positions `[1, H, L, L]` (Raffel et al. 1910.10683, section 2.1): one for each distance that
    is near, one for each range of distances that are far. As transformers has it, but changes no tensor in place, which
    no program can."""
    half = attention.relative_attention_num_buckets // 2
    near, most = half // 2, attention.relative_attention_max_distance
    at = torch.arange(length, device=device)
    away = at[None, :] - at[:, None]
    apart = away.abs()
    far = near + (torch.log(apart.float() / near) / math.log(most / near) * (half - near)).long()
    bucket = (away > 0).long() * half + torch.where(apart < near, apart, far.clamp(max=half - 1))
    return attention.relative_attention_bias(bucket).permute(2, 0, 1)[None]  # type: ignore[no-any-return]


class ExplicitT5Block(Form):
    def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
        return within_half(self.layer[1](within_half(self.layer[0](hidden_states, bias))))


class ExplicitT5SelfLayer(Form):
    def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
        return hidden_states + normed(self.layer_norm, self.SelfAttention, hidden_states, mask=bias)


class ExplicitT5Attention(Form):
    """mT5's attention module around the explicit `core`; the first one holds the table of the bias."""

    def fuses(self, norm: nn.Module) -> bool:
        fuses = getattr(self.core, "fuses", None)
        return fuses is not None and not watched(self.core) and fuses(norm)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, **fused: Any) -> Tensor:
        return self.core(hidden_states, mask=mask, **fused)  # type: ignore[no-any-return]


class ExplicitT5Mlp(Form):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + normed(self.layer_norm, self.DenseReluDense, hidden_states)


def _explicit_t5(block: Any) -> None:
    if isinstance(block, ExplicitT5Block):
        return
    known(block, frozenset({f"{T5}Block"}))
    if len(block.layer) != 2:
        raise unsupported(block, "cross attention")
    first, second = known(block.layer[0], frozenset({f"{T5}LayerSelfAttention"})), block.layer[1]
    attention = known(first.SelfAttention, frozenset({f"{T5}Attention"}))
    mlp = known(known(second, frozenset({f"{T5}LayerFF"})).DenseReluDense, frozenset({f"{T5}DenseGatedActDense"}))
    no_dropout(block, attention.dropout, first.dropout.p, second.dropout.p, mlp.dropout.p)
    gated = Mlp(mlp.wi_1, mlp.wo, activation_name(mlp.act), gate=mlp.wi_0)
    attention.core = Attention(attention.q, attention.k, attention.v, attention.o, attention.n_heads, 1.0)
    attention.core.train(attention.training)
    del attention.q, attention.k, attention.v, attention.o
    second.DenseReluDense = succeed(mlp, gated)
    for module, form in (
        (attention, ExplicitT5Attention),
        (first, ExplicitT5SelfLayer),
        (second, ExplicitT5Mlp),
        (block, ExplicitT5Block),
    ):
        become(module, form)


def t5_blocks(stack: Any, rows: int) -> list[Block]:
    """Of mT5's encoder in explicit form, in place."""
    for block in stack.block:
        _explicit_t5(block)
    return [
        transformer_block(
            f"text.blocks.{i}",
            block,
            (block.layer[0].SelfAttention, "core"),
            (block.layer[0], "layer_norm"),
            (block.layer[1], "DenseReluDense"),
            (block.layer[1], "layer_norm"),
            rows,
        )
        for i, block in enumerate(stack.block)
    ]
