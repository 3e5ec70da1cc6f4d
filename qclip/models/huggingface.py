"""Hugging Face's CLIPModel and SiglipModel (transformers 4 and 5), without importing transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from . import huggingface_files, huggingface_settings, replay
from .explicit import (
    Form,
    activation_name,
    attention_sites,
    become,
    by_name,
    embedding_site,
    from_multihead_attention,
    mlp_sites,
    no_dropout,
    patch_site,
    projection_site,
    succeed,
    transformer_block,
    unsupported,
)
from .family import Family
from .hooks import watched
from .huggingface_descriptions import NAMES, class_names, config_of, kind_of, preprocess_config, tokenizer_config
from .inputs import attach
from .open_clip_form import visible
from .tower import Attention, Block, Mlp, Site, Tower, fuse, normed
from .value_path import ValuePath, undefined


def owns(model: nn.Module) -> bool:
    """Whether this adapter is for `model`, or ought to say why it is not."""
    return bool(class_names(model) & {*NAMES, "AlignModel", "PreTrainedModel"})


# ---- explicit form ---------------------------------------------------------------------------------------------------


class ExplicitModel(Form):
    """A whole model that refuses to be saved by transformers: its own class could not read those names and weights."""

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        self._refuse("save_pretrained would write")

    def push_to_hub(self, *args: object, **kwargs: object) -> None:
        self._refuse("push_to_hub would upload")

    def _refuse(self, what: str) -> None:
        raise ModelError(
            f"{what} what {type(self).__name__} cannot load: its layers were replaced; write the quantized model with "
            "qclip.save(model, FOLDER) and read it with qclip.load (a float model: save it before, or load it again)"
        )


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
        return (hidden_states,) if _gives_a_tuple(super().forward.__func__) else hidden_states  # type: ignore[misc]


@functools.cache
def _gives_a_tuple(forward: Callable[..., Any]) -> bool:
    """Whether a layer of transformers gives a tuple: it differs between families in the same version, and they say."""
    return "tuple" in str(inspect.signature(forward).return_annotation).lower()


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

    WRAPS = frozenset({"forward"})

    def _asks(self, what: str, kwargs: dict[str, Any]) -> bool:
        """Whether the caller, or else the configuration, wants `what` in the output."""
        given = kwargs.get(what)
        return bool(getattr(self.config, what, False) if given is None else given or isinstance(given, int | list))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        whole = super().forward  # type: ignore[misc]
        if self._asks("output_attentions", kwargs):
            raise ModelError(
                "output_attentions: attention weights are never formed here (one fused kernel); take them from the "
                "float model, loaded with attn_implementation='eager'"
            )
        if self._asks("output_hidden_states", kwargs):
            return whole(*args, **kwargs)  # recorded by hooks on the layers
        name = "pixel_values" if hasattr(self.embeddings, "patch_embedding") else "input_ids"
        inputs = args[0] if args else kwargs.get(name)
        rest = {key: value for key, value in kwargs.items() if key != name}
        simple = all(isinstance(value, bool | None) for value in rest.values())
        if not isinstance(inputs, Tensor) or len(args) > 1 or not simple:
            return whole(*args, **kwargs)
        return replay.run(self, lambda x: whole(x, **rest), inputs, settings=tuple(sorted(rest.items())))


class ExplicitPoolingHead(Form):
    """SigLIP's attention pool with the explicit cores."""

    def forward(self, hidden_state: Tensor, *args: object) -> Tensor:
        query = self.probe.expand(hidden_state.shape[0], -1, -1)
        hidden_state = self.attention(hidden_state, query=query)
        hidden_state = hidden_state + normed(self.layernorm, self.mlp, hidden_state)
        return hidden_state[:, 0]


def _explicit_layer(layer: Any) -> None:
    attention = layer.self_attn
    if isinstance(attention, ExplicitAttention):
        return
    if not all(hasattr(attention, f"{name}_proj") for name in ("q", "k", "v", "out")):
        raise unsupported(attention)
    no_dropout(attention, attention.dropout)
    mlp = _mlp(layer.mlp)  # before anything is changed: it may be refused
    core = Attention(
        attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, attention.num_heads, attention.scale
    )
    del attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    attention.core = core.train(attention.training)
    become(attention, ExplicitAttention)
    layer.mlp = mlp
    become(layer, ExplicitLayer)


def _mlp(mlp: Any) -> Mlp:
    return succeed(mlp, Mlp(mlp.fc1, mlp.fc2, activation_name(mlp.activation_fn)))


def _blocks(tower: str, encoder: Any, rows: int) -> list[Block]:
    for layer in encoder.layers:
        _explicit_layer(layer)
    return [
        transformer_block(
            f"{tower}.blocks.{i}", b, (b.self_attn, "core"), (b, "layer_norm1"), (b, "mlp"), (b, "layer_norm2"), rows
        )
        for i, b in enumerate(encoder.layers)
    ]


def _inner(model: nn.Module, name: str) -> Any:
    """The transformer itself: version 4 wraps SigLIP's towers once more."""
    outer = getattr(model, f"{name}_model")
    return getattr(outer, f"{name}_model", outer)


def towers(model: Any) -> dict[str, Tower]:
    """Both towers of a CLIPModel or SiglipModel, brought into explicit form in place. Raises ModelError for others."""
    siglip = kind_of(model) == "SiglipModel"
    vision, text = _inner(model, "vision"), _inner(model, "text")
    for whole in {model, model.vision_model, model.text_model} - {vision, text}:
        become(whole, ExplicitModel)
    become(vision, ExplicitTower)
    become(text, ExplicitTower)
    patches = vision.embeddings.num_patches
    tokens = vision.embeddings.num_positions
    blocks = _blocks("vision", vision.encoder, tokens)
    tail: list[Site] = []
    if siglip and hasattr(vision, "head"):
        blocks.append(_pool(vision.head, tokens))
    elif not siglip:
        tail = projection_site("vision", model, "visual_projection")
    sites = by_name(
        patch_site("vision", vision.embeddings, "patch_embedding", patches),
        *(list(b.sites.values()) for b in blocks),
        tail,
    )
    found = {"vision": Tower("vision", vision if siglip else Features(model, "vision"), blocks, sites, tokens, vision)}
    length = text.embeddings.position_embedding.weight.shape[0]
    blocks = _blocks("text", text.encoder, length)
    owner, attribute = (text, "head") if siglip else (model, "text_projection")
    sites = by_name(
        embedding_site(text.embeddings, "token_embedding", length),
        *(list(b.sites.values()) for b in blocks),
        projection_site("text", owner, attribute),
    )
    found["text"] = Tower("text", text if siglip else Features(model, "text"), blocks, sites, length, text)
    return found


def _pool(head: Any, rows: int) -> Block:
    if isinstance(head.attention, nn.MultiheadAttention):
        head.attention, head.mlp = from_multihead_attention(head.attention), _mlp(head.mlp)
        become(head, ExplicitPoolingHead)
    sites = attention_sites("vision.pool", head.attention, None, rows, "pool_", 1)
    place = (head, "layernorm")
    sites |= mlp_sites("vision.pool.mlp", head.mlp, place, 1)
    return Block("vision.pool", head, (head, "attention"), None, (head, "mlp"), place, sites)


def value_path(model: Any, tower: Tower) -> ValuePath:
    """Of a CLIPModel, which pools its class token. Raises ModelError for SigLIP, which pools by attention."""
    if kind_of(model) != "CLIPModel":
        raise undefined(model, "it pools by attention")
    norm, projection = _inner(model, "vision").post_layernorm, model.visual_projection
    return ValuePath.of(tower.blocks[-1], lambda x: projection(norm(x)))


class Features(nn.Module):
    """One tower of CLIPModel with its projection, seen as one module; it owns nothing."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["clip"] = model
        self.tower = name

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True):  # noqa: ANN201
        memo = set() if memo is None else memo
        yield prefix, self
        projection = "visual_projection" if self.tower == "vision" else "text_projection"
        for name in (f"{self.tower}_model", projection):
            below = f"{prefix}.{name}" if prefix else name
            yield from getattr(self.clip, name).named_modules(memo, below, remove_duplicate)

    def forward(self, inputs: Tensor) -> Tensor:
        return (image_features if self.tower == "vision" else text_features)(self.clip, inputs)


# ---- calling ---------------------------------------------------------------------------------------------------------


def _tensor(output: Any) -> Tensor:
    """Version 5 gives an output object, version 4 the features themselves."""
    return output if isinstance(output, Tensor) else output.pooler_output


def image_features(model: Any, images: Tensor) -> Tensor:
    """`[B, 3, H, W]` -> `[B, E]`, not normalised."""
    return _tensor(model.get_image_features(pixel_values=images))


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """Token ids `[B, L]` -> `[B, E]`, not normalised. CLIP is causal: what follows the last EOT is left out."""
    if kind_of(model) == "CLIPModel":
        eos = _inner(model, "text").eos_token_id
        tokens = visible(tokens, "argmax" if eos == 2 else "eos", eos)
    return _tensor(model.get_text_features(input_ids=tokens.to(model.logit_scale.device)))


class HuggingFace(Family):
    """CLIPModel and SiglipModel."""

    name = "huggingface"
    classes = huggingface_settings.CLASSES
    prefixes = ("hf:",)
    examples = (("hf:ID_OR_DIR", "a Hugging Face CLIP or SigLIP (extra `hf`)"),)

    owns = staticmethod(owns)
    towers = staticmethod(towers)
    value_path = staticmethod(value_path)
    encode_image = staticmethod(image_features)
    encode_text = staticmethod(text_features)
    preprocess_config = staticmethod(preprocess_config)
    tokenizer_config = staticmethod(tokenizer_config)
    config_of = staticmethod(config_of)
    grid = staticmethod(huggingface_settings.grid)
    sizes = staticmethod(huggingface_settings.sizes)

    def encodes(self, model: Any) -> bool:
        return True

    def image_size(self, model: Any) -> int:
        return int(model.config.vision_config.image_size)

    def create_from_config(self, config: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
        return huggingface_files.create_from_config(config, device)

    def load(self, name: str, device: str | torch.device = "cpu", arch: str | dict | None = None) -> nn.Module:
        source = name.removeprefix("hf:")
        return attach(*huggingface_files.load(source, device), source=name)

    def rebuild_buffers(self, model: nn.Module) -> None:
        for module in model.modules():
            ids = module._buffers.get("position_ids")
            if ids is not None and ids.is_meta:
                module._buffers["position_ids"] = torch.arange(ids.shape[-1], device="cpu").expand((1, -1))


FAMILY = HuggingFace()
