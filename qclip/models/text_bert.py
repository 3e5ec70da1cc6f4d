"""The explicit form of transformers' text encoders, and BERT's: its norms stand behind the cores."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ..errors import ModelError
from . import replay
from .explicit import (
    Form,
    activation_name,
    attention_sites,
    become,
    mlp_sites,
    no_dropout,
    unsupported,
)
from .huggingface_form import ExplicitModel, asks, gives_a_tuple, known, refuse_attentions, refuse_length
from .tower import Attention, Block, Mlp, Site

BERTS = ("Bert", "Roberta", "XLMRoberta", "ChineseCLIPText", "AltRoberta")
BERT_LAYERS, BERT_ATTENTIONS, BERT_PROJECTIONS, BERT_MLPS, BERT_OUTPUTS = (
    frozenset(f"{kind}{part}" for kind in BERTS)
    for part in ("Layer", "SelfAttention", "SelfOutput", "Intermediate", "Output")
)


def keep(mask: Tensor | None) -> Tensor | None:
    """Tokens that count, 0 and 1 `[B, L]`, as the cores take them: bool `[B, 1, 1, L]`."""
    return None if mask is None else mask.bool()[:, None, None, :]


class ExplicitEncoder(ExplicitModel):
    """A text encoder called with token ids and a mask. Other arguments go to the library's own code, if it can run the
    explicit blocks, or are refused."""

    WRAPS = ExplicitModel.WRAPS
    FALLS_BACK = False

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        refuse_attentions(self.config, rest)
        plain = not any(value is not None and value is not False for key, value in rest.items() if key != "return_dict")
        if input_ids is not None and (limit := self.positions()) is not None:
            refuse_length(input_ids, limit, self)
        hidden = asks(self.config, "output_hidden_states", rest)
        if plain and not hidden and input_ids is not None and rest.get("return_dict") is not False:
            inputs = (input_ids,) if attention_mask is None else (input_ids, attention_mask)
            return replay.run(self, self.encode, *inputs)
        if not self.FALLS_BACK:
            raise ModelError(
                f"{type(self).__name__} in explicit form takes input_ids and attention_mask alone, not "
                f"{', '.join(sorted(rest)) or 'anything else'}; ask the float model"
            )
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **rest)  # type: ignore[misc]

    def positions(self) -> int | None:
        """How many tokens there are positions for; None: no limit."""
        return None

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        raise NotImplementedError


# ---- BERT ------------------------------------------------------------------------------------------------------------


def bert_positions(encoder: Any) -> int:
    """How many tokens BERT has positions for; RoBERTa's begin behind the row of padding."""
    rows: int = encoder.embeddings.position_embeddings.weight.shape[0]
    begins = getattr(encoder.embeddings, "padding_idx", None)
    return rows if begins is None else rows - begins - 1


class ExplicitBert(ExplicitEncoder):
    """BERT, RoBERTa and XLM-RoBERTa."""

    FALLS_BACK = True

    def positions(self) -> int:
        return bert_positions(self)

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        x = self.encoder(self.embeddings(input_ids=tokens), attention_mask=keep(mask))[0]
        pooled = None if self.pooler is None else self.pooler(x)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=x, pooler_output=pooled)


class ExplicitBertLayer(Form):
    """`attention` and `mlp` are the cores; their norms stand behind, over the sum with their input."""

    REPLACES = frozenset({"feed_forward_chunk"})

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: object, **__: object) -> Any:
        x = self.attention_norm(hidden_states + self.attention(hidden_states, mask=attention_mask))
        x = self.mlp_norm(x + self.mlp(x))
        return (x,) if self.qclip_tuple else x


def _explicit_bert(layer: Any) -> None:
    if isinstance(layer, ExplicitBertLayer):
        return
    known(layer, BERT_LAYERS)
    if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
        raise unsupported(layer, "a decoder, or cross attention")
    attention, joined = known(layer.attention.self, BERT_ATTENTIONS), known(layer.attention.output, BERT_PROJECTIONS)
    first, second = known(layer.intermediate, BERT_MLPS), known(layer.output, BERT_OUTPUTS)
    if getattr(attention, "position_embedding_type", None) not in (None, "absolute"):
        raise unsupported(attention, f"{attention.position_embedding_type} positions")
    no_dropout(layer, attention.dropout.p, joined.dropout.p, second.dropout.p)
    mlp = Mlp(first.dense, second.dense, activation_name(first.intermediate_act_fn))
    core = Attention(attention.query, attention.key, attention.value, joined.dense, attention.num_attention_heads)
    layer.attention, layer.attention_norm = core.train(layer.training), joined.LayerNorm
    layer.mlp, layer.mlp_norm = mlp.train(layer.training), second.LayerNorm
    layer.qclip_tuple = gives_a_tuple(layer)
    del layer.intermediate, layer.output
    become(layer, ExplicitBertLayer)


def _bert_block(name: str, layer: Any, rows: int) -> Block:
    """A scale stays with the site, so it needs no norm to be folded into: the norms before serve the residuals, too."""
    sites = attention_sites(f"{name}.attn", layer.attention, None, rows)
    sites |= mlp_sites(f"{name}.mlp", layer.mlp, None, rows)
    sites = {kind: _scalable(site) if kind != "fc2" else site for kind, site in sites.items()}
    return Block(name, layer, (layer, "attention"), None, (layer, "mlp"), None, sites)


def _scalable(site: Site) -> Site:
    return dataclasses.replace(site, smoothable=True)


def bert_blocks(encoder: Any, rows: int) -> list[Block]:
    """Of BERT's encoder in explicit form, in place."""
    layers = encoder.layer if hasattr(encoder, "layer") else encoder.layers
    for layer in layers:
        _explicit_bert(layer)
    return [_bert_block(f"text.blocks.{i}", layer, rows) for i, layer in enumerate(layers)]
