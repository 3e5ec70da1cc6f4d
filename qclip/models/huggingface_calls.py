"""How Hugging Face's models are called: tensors in, embeddings out, in both versions and for towers alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from . import huggingface_bert
from .huggingface_kinds import inner, kind_of
from .huggingface_naflex import patches
from .open_clip_form import visible


def _embedding(output: Any, projected: str, model: nn.Module) -> Tensor:
    """From what a version or a class gives: features, or an object that holds them, projected or not."""
    if isinstance(output, Tensor):
        return output
    for name in (projected, "pooler_output"):
        if (found := getattr(output, name, None)) is not None:
            return found  # type: ignore[no-any-return]
    raise ModelError(f"{type(model).__name__} gives no pooled embedding (vision_use_head is false)")


def image_features(model: Any, images: Tensor) -> Tensor:
    """`[B, 3, H, W]` -> `[B, E]`, not normalised: what the projection gives, or without one the pooled output."""
    inputs = patches(model, images) if kind_of(model).naflex else {"pixel_values": images}
    call = model.get_image_features if hasattr(model, "get_image_features") else model
    return _embedding(call(**inputs), "image_embeds", model)


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """Token ids `[B, L]` -> `[B, E]`, not normalised, as `image_features`. CLIP is causal: what follows the last EOT is
    left out where the projected embedding is all that can be read. BERT is told which tokens are padding."""
    kind, more = kind_of(model), {}
    if kind.bert:
        tokens = huggingface_bert.visible(model, tokens)
        more = {"attention_mask": huggingface_bert.real(model, tokens).long().to(device_of(model))}
    elif kind.clip and kind.projected:
        eos = inner(model, "text").eos_token_id
        tokens = visible(tokens, "argmax" if eos == 2 else "eos", eos)
    call = model.get_text_features if hasattr(model, "get_text_features") else model
    return _embedding(call(input_ids=tokens.to(device_of(model)), **more), "text_embeds", model)


def device_of(model: nn.Module) -> Any:
    return next(model.parameters()).device
