"""The explicit form of M2M100's encoder (NLLB)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .explicit import Form, activation_name, become, no_dropout, transformer_block
from .huggingface_form import known
from .text_bert import ExplicitEncoder, keep
from .tower import Attention, Block, Mlp, normed

LAYERS, ATTENTIONS = frozenset({"M2M100EncoderLayer"}), frozenset({"M2M100Attention"})


class ExplicitM2M(ExplicitEncoder):
    """M2M100's encoder (NLLB): `embed_tokens` is a plain lookup, and its factor stands here."""

    def positions(self) -> int:
        return self.config.max_position_embeddings  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        x = self.embed_tokens(tokens) * self.embed_scale
        x = x + self.embed_positions(tokens, x).to(x.device)
        kept = keep(mask)
        for layer in self.layers:
            x = layer(x, kept)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))


class ExplicitM2MLayer(Form):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = hidden_states
        x = x + normed(self.self_attn_layer_norm, self.self_attn, x, mask=attention_mask)
        x = x + normed(self.final_layer_norm, self.mlp, x)
        return within_half(x)


def within_half(x: Tensor) -> Tensor:
    """As transformers keeps float16 finite."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max - 1000
    return x.clamp(-most, most)


def m2m_blocks(encoder: Any, rows: int) -> list[Block]:
    """Of M2M100's encoder in explicit form, in place; the encoder, too."""
    for layer in encoder.layers:
        if isinstance(layer, ExplicitM2MLayer):
            continue
        attention = known(known(layer, LAYERS).self_attn, ATTENTIONS)
        no_dropout(layer, attention.dropout, layer.dropout, layer.activation_dropout)
        mlp = Mlp(layer.fc1, layer.fc2, activation_name(layer.activation_fn, unfused=True))
        core = Attention(attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, attention.num_heads)
        layer.self_attn, layer.mlp = core.train(layer.training), mlp.train(layer.training)
        del layer.fc1, layer.fc2, layer.activation_fn
        become(layer, ExplicitM2MLayer)
    lookup = encoder.embed_tokens
    if hasattr(lookup, "embed_scale"):
        plain = nn.Embedding(*lookup.weight.shape, padding_idx=lookup.padding_idx, device="meta")
        plain.weight, encoder.embed_scale = lookup.weight, float(lookup.embed_scale)
        encoder.embed_tokens = plain.train(lookup.training)
    return [
        transformer_block(
            f"text.blocks.{i}",
            b,
            (b, "self_attn"),
            (b, "self_attn_layer_norm"),
            (b, "mlp"),
            (b, "final_layer_norm"),
            rows,
        )
        for i, b in enumerate(encoder.layers)
    ]
