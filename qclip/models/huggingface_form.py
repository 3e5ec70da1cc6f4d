"""The explicit form of transformers' CLIP and SigLIP (versions 4 and 5), and their towers, without importing it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from . import replay
from .explicit import (
    Form,
    activation_name,
    attention_sites,
    become,
    from_multihead_attention,
    mlp_sites,
    no_dropout,
    succeed,
    transformer_block,
    unsupported,
)
from .hooks import watched
from .huggingface_kinds import class_names
from .tower import Attention, Block, Mlp, fuse, normed

# Blocks that compute the same, by the names of their classes: what is called otherwise may compute something else.
PARTS = ("CLIP", "Siglip", "Siglip2", "AltCLIP")
LAYERS, ATTENTIONS, MLPS = (
    frozenset((*(f"{part}{name}" for part in PARTS), chinese))
    for name, chinese in (
        ("EncoderLayer", "ChineseCLIPVisionLayer"),
        ("Attention", "ChineseCLIPVisionAttention"),
        ("MLP", "ChineseCLIPVisionMLP"),
    )
)

HEADS = frozenset({"SiglipMultiheadAttentionPoolingHead", "Siglip2MultiheadAttentionPoolingHead"})


class ExplicitModel(Form):
    """A whole model that refuses to be saved by transformers: its own class could not read those names and weights."""

    WRAPS = frozenset({"resize_token_embeddings"})

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        self._refuse("save_pretrained would write")

    def push_to_hub(self, *args: object, **kwargs: object) -> None:
        self._refuse("push_to_hub would upload")

    def _refuse(self, what: str) -> None:
        raise ModelError(
            f"{what} what {type(self).__name__} cannot load: its layers were replaced; write the quantized model with "
            "qclip.save(model, FOLDER) and read it with qclip.load (a float model: save it before, or load it again)"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self.get_input_embeddings(), "codes"):
            raise ModelError(
                "resize_token_embeddings: the token embedding is quantized; resize the float model, then quantize it"
            )
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]


class ExplicitLayer(Form):
    """transformers' encoder layer, which hands its norms to the cores."""

    MASKS = ("attention_mask", "causal_attention_mask")

    def forward(self, hidden_states: Tensor, *masks: Tensor | None, **kwargs: Any) -> Any:
        kwargs |= dict(zip(self.MASKS, masks, strict=False))
        if fuse(self.layer_norm1, self.self_attn):
            kwargs |= {"hidden_states": hidden_states, "norm": self.layer_norm1}
        else:
            kwargs["hidden_states"] = self.layer_norm1(hidden_states)
        hidden_states = hidden_states + self.self_attn(**kwargs)[0]
        hidden_states = hidden_states + normed(self.layer_norm2, self.mlp, hidden_states)
        return (hidden_states,) if self.qclip_tuple else hidden_states


def gives_a_tuple(layer: nn.Module) -> bool:
    """Whether a layer of transformers gives a tuple: it differs between families in the same version, and they say."""
    return "tuple" in str(inspect.signature(type(layer).forward).return_annotation).lower()


class ExplicitAttention(Form):
    """transformers' attention module around the explicit `core`; it gives no attention weights."""

    def fuses(self, norm: nn.Module) -> bool:
        fuses = getattr(self.core, "fuses", None)
        return fuses is not None and not watched(self.core) and fuses(norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        is_causal: bool | None = None,
        norm: nn.Module | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        # Version 4 hands over two masks that add up, version 5 one mask or the word that the causal one is meant.
        mask = attention_mask
        if causal_attention_mask is not None:
            mask = causal_attention_mask if mask is None else mask + causal_attention_mask
        fused = {} if norm is None else {"norm": norm}
        return self.core(hidden_states, mask=mask, causal=bool(is_causal) and mask is None, **fused), None


class ExplicitTower(ExplicitModel):
    """The transformer of one tower."""

    WRAPS = ExplicitModel.WRAPS | {"forward"}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        whole = super().forward  # type: ignore[misc]
        refuse_attentions(self.config, kwargs)
        name = "pixel_values" if hasattr(self.embeddings, "patch_embedding") else "input_ids"
        inputs = args[0] if args else kwargs.get(name)
        if name == "input_ids" and isinstance(inputs, Tensor):
            refuse_length(inputs, self.embeddings.position_embedding.weight.shape[0], self)
        if asks(self.config, "output_hidden_states", kwargs):
            return whole(*args, **kwargs)  # recorded by hooks on the layers
        rest = {key: value for key, value in kwargs.items() if key != name}
        simple = all(isinstance(value, bool | None) for value in rest.values())
        if not isinstance(inputs, Tensor) or len(args) > 1 or not simple:
            return whole(*args, **kwargs)
        return replay.run(self, lambda x: self.encode(whole, x, rest), inputs, settings=tuple(sorted(rest.items())))

    def encode(self, whole: Callable[..., Any], x: Tensor, rest: dict[str, bool | None]) -> Any:
        return whole(x, **rest)


class ExplicitCausalTower(ExplicitTower):
    """CLIP's text transformer. To the cores causal attention is a word; the library's version 4 makes a mask in place,
    which no program can."""

    def encode(self, whole: Callable[..., Any], x: Tensor, rest: dict[str, bool | None]) -> Any:
        plain = x.ndim == 2 and not any(value for key, value in rest.items() if key != "return_dict")
        if not plain or rest.get("return_dict") is False or watched(self.encoder):
            return whole(x, **rest)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        hidden = self.embeddings(input_ids=x)
        for layer in self.encoder.layers:
            hidden = layer(hidden, is_causal=True)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden, eos = self.final_layer_norm(hidden), self.eos_token_id
        ends = (x if eos == 2 else x == eos).int().argmax(-1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), ends.to(hidden.device)]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


def asks(config: Any, what: str, kwargs: dict[str, Any]) -> bool:
    """Whether the caller, or else the configuration, wants `what` in the output."""
    given = kwargs.get(what)
    return bool(getattr(config, what, False) if given is None else given or isinstance(given, int | list))


def refuse_attentions(config: Any, kwargs: dict[str, Any]) -> None:
    if asks(config, "output_attentions", kwargs):
        raise ModelError(
            "output_attentions: attention weights are never formed here (one fused kernel); take them from the "
            "float model, loaded with attn_implementation='eager'"
        )


def refuse_length(tokens: Tensor, positions: int, model: nn.Module) -> None:
    if tokens.shape[-1] > positions:
        raise ModelError(
            f"{type(model).__name__} has positions for {positions} tokens and was given {tokens.shape[-1]}; cut the "
            "texts (truncation=True)"
        )


class ExplicitPoolingHead(Form):
    """SigLIP's attention pool with the explicit cores."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`attention_mask`: bool or 0 and 1, `[B, N]`: which of the tokens count."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        query = self.probe.expand(hidden_state.shape[0], -1, -1)
        hidden_state = self.attention(hidden_state, query=query, mask=mask)
        hidden_state = hidden_state + normed(self.layernorm, self.mlp, hidden_state)
        return hidden_state[:, 0]


# ---- cores -----------------------------------------------------------------------------------------------------------


def known(module: nn.Module, names: frozenset[str]) -> Any:
    """`module`. Raises ModelError unless it is of one of these classes of transformers."""
    if not class_names(module) & names:
        raise unsupported(module)
    return module


def _explicit_layer(layer: Any) -> None:
    if isinstance(layer, ExplicitLayer):
        return
    attention = known(known(layer, LAYERS).self_attn, ATTENTIONS)
    no_dropout(attention, attention.dropout)
    mlp = _mlp(layer.mlp)  # before anything is changed: it may be refused
    core = Attention(
        attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, attention.num_heads, attention.scale
    )
    del attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    attention.core = core.train(attention.training)
    become(attention, ExplicitAttention)
    layer.mlp, layer.qclip_tuple = mlp, gives_a_tuple(layer)
    become(layer, ExplicitLayer)


def _mlp(mlp: Any) -> Mlp:
    known(mlp, MLPS)
    return succeed(mlp, Mlp(mlp.fc1, mlp.fc2, activation_name(mlp.activation_fn)))


def blocks_of(tower: str, encoder: Any, rows: int) -> list[Block]:
    for layer in encoder.layers:
        _explicit_layer(layer)
    return [
        transformer_block(
            f"{tower}.blocks.{i}", b, (b.self_attn, "core"), (b, "layer_norm1"), (b, "mlp"), (b, "layer_norm2"), rows
        )
        for i, b in enumerate(encoder.layers)
    ]


def pool_of(head: Any, rows: int) -> Block:
    if not isinstance(head, ExplicitPoolingHead):
        known(head, HEADS)
        mlp = _mlp(head.mlp)
        head.attention, head.mlp = from_multihead_attention(head.attention), mlp
        become(head, ExplicitPoolingHead)
    sites = attention_sites("vision.pool", head.attention, None, rows, "pool_", 1)
    place = (head, "layernorm")
    sites |= mlp_sites("vision.pool.mlp", head.mlp, place, 1)
    return Block("vision.pool", head, (head, "attention"), None, (head, "mlp"), place, sites, rows)
