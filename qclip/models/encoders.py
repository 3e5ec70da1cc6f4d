"""One way to call every model: tensors in, embeddings out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import ModelError
from . import huggingface
from . import open_clip as family

Preprocessing = Callable[[Image.Image], Tensor]
Tokenizing = Callable[[list[str]], Tensor]


class Encoders:
    """A model's two encoders and what feeds them; float or quantized, in explicit form or not.

    `preprocess` and `tokenizer` are None where the model has none; gradients are the caller's business.
    """

    def __init__(
        self, model: nn.Module, preprocess: Preprocessing | None = None, tokenizer: Tokenizing | None = None
    ) -> None:
        self.model: Any = model
        self.preprocess = preprocess if preprocess is not None else _preprocess(model)
        self.tokenizer = tokenizer if tokenizer is not None else _tokenizer(model)
        self._is_hf = huggingface.owns(model)
        self._takes_normalize = family.owns(model)
        if not self._is_hf and not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
            raise ModelError(f"{type(model).__module__}.{type(model).__name__} has no encode_image and encode_text")
        if not hasattr(model, "logit_scale"):
            raise ModelError(f"{type(model).__module__}.{type(model).__name__} has no logit_scale")

    @property
    def logit_scale(self) -> float:
        """The factor on the cosines (already `exp`)."""
        return float(self.model.logit_scale.detach().float().exp().reshape(-1)[0])

    @property
    def logit_bias(self) -> float | None:
        """What SigLIP adds to the scaled cosines; None elsewhere."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach().float().reshape(-1)[0])

    @property
    def image_size(self) -> int:
        """Side of the input in pixels (the height, where it is no square)."""
        if self._is_hf:
            return int(self.model.config.vision_config.image_size)
        size = getattr(getattr(self.model, "visual", None), "image_size", None)
        if size is None:
            size = getattr(self.preprocess, "config", {}).get("image_size", 224)
        return int(size if isinstance(size, int) else size[0])

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that images are given in."""
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d) or hasattr(module, "patch"):  # the first one, float or quantized
                return module.weight.dtype
        return self.model.logit_scale.dtype

    def encode_image(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]`, preprocessed -> `[B, E]`, not normalised."""
        images = images.to(self.device, self.dtype)
        if self._is_hf:
            return huggingface.image_features(self.model, images)
        return self.model.encode_image(images, **self._plain())

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, L]` -> `[B, E]`, not normalised. Tokens in host memory are cut at the last EOT before they
        move, where that is exact, so that a GPU need not be asked for the length."""
        if self._is_hf:
            return huggingface.text_features(self.model, tokens)
        if tokens.device != self.device:
            text = getattr(self.model, "text", self.model)
            tokens = (text.visible_tokens(tokens) if hasattr(text, "visible_tokens") else tokens).to(self.device)
        return self.model.encode_text(tokens, **self._plain())

    def text_positions(self, tokens: Tensor) -> Tensor | None:
        """Which positions of the text tower reach the embeddings of `tokens` `[B, L]`: bool `[B, S]`, or None where
        those that do not are left out by `encode_text`.

        CoCa pools a class token behind the padding, so its tower runs to the end; its mask says what it reads.
        """
        text: Any = getattr(self.model, "text", None)
        if getattr(text, "cls_emb", None) is None:
            return None
        mask = text._embeds(tokens.to(self.device))[1]  # additive, [B * heads, S, S]
        read = mask[:: len(mask) // len(tokens), -1] == 0
        read[:, -1] = True
        return read

    def _plain(self) -> dict[str, Any]:
        return {"normalize": False} if self._takes_normalize else {}  # CoCa normalises unless told not to


def _preprocess(model: nn.Module) -> Preprocessing | None:
    kept = model.__dict__.get("preprocess")
    if kept is not None:
        return kept
    config = huggingface.preprocess_config(model) if huggingface.owns(model) else family.preprocess_config(model)
    return None if config is None else family.preprocess_from_config(config)


def _tokenizer(model: nn.Module) -> Tokenizing | None:
    kept = model.__dict__.get("tokenizer")
    if kept is not None:
        return kept
    config = huggingface.tokenizer_config(model) if huggingface.owns(model) else family.tokenizer_config(model)
    return None if config is None or config["kind"] == "unknown" else family.tokenizer_from_config(config)


def encoders(
    model: nn.Module, preprocess: Preprocessing | None = None, tokenizer: Tokenizing | None = None
) -> Encoders:
    """How to embed images and texts with `model`; `preprocess` and `tokenizer` override what it brings along.

    Raises ModelError for a model without image and text encoders.
    """
    return Encoders(model, preprocess, tokenizer)
