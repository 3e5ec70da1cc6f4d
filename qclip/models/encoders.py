"""One way to call every model: tensors in, embeddings out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import ModelError
from .family import Family, family_of
from .inputs import preprocess_from_config
from .tokenizer import tokenizer_from_config

Preprocessing = Callable[[Image.Image], Tensor]
Tokenizing = Callable[[list[str]], Tensor]


class Encoders:
    """A model's encoders and what feeds them; float or quantized, in explicit form or not. A model of no family is
    called by its own `encode_image` and `encode_text`.

    `preprocess` and `tokenizer` are None where the model has none; gradients are the caller's business.
    """

    def __init__(
        self, model: nn.Module, preprocess: Preprocessing | None = None, tokenizer: Tokenizing | None = None
    ) -> None:
        self.model: Any = model
        self.family = family_of(model) or Family()
        self.preprocess = preprocess if preprocess is not None else self._preprocess()
        self.tokenizer = tokenizer if tokenizer is not None else self._tokenizer()
        #: What it embeds: "vision", "text", or both.
        self.towers = self.family.encodes(model)
        if not self.towers:
            raise ModelError(f"{_name(model)} has no encode_image and encode_text")
        if len(self.towers) == 2 and not hasattr(model, "logit_scale"):
            raise ModelError(f"{_name(model)} has no logit_scale")

    @property
    def logit_scale(self) -> float:
        """The factor on the cosines (already `exp`). Raises ModelError for a tower alone, which has none."""
        if not hasattr(self.model, "logit_scale"):
            raise ModelError(f"{_name(self.model)} has one tower and no logit_scale, so it compares nothing")
        return float(self.model.logit_scale.detach().float().exp().reshape(-1)[0])

    @property
    def logit_bias(self) -> float | None:
        """What SigLIP adds to the scaled cosines; None elsewhere."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach().float().reshape(-1)[0])

    @property
    def image_size(self) -> int:
        """Side of the input in pixels (the height, where it is no square)."""
        size = self.family.image_size(self.model)
        if size is None:
            size = getattr(self.preprocess, "config", {}).get("image_size", 224)
        return int(size if isinstance(size, int) else size[0])

    @property
    def device(self) -> torch.device:
        return self._any().device

    @property
    def dtype(self) -> torch.dtype:
        """The type that images are given in."""
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d) or hasattr(module, "patch"):  # the first one, float or quantized
                return module.weight.dtype
        return self._any().dtype

    def encode_image(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]`, preprocessed -> `[B, E]`, not normalised."""
        self._need("vision")
        return self.family.encode_image(self.model, images.to(self.device, self.dtype))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, L]` -> `[B, E]`, not normalised."""
        self._need("text")
        return self.family.encode_text(self.model, tokens)

    def text_positions(self, tokens: Tensor) -> Tensor | None:
        """Which positions of the text tower reach the embeddings of `tokens`; see `Family.text_positions`."""
        return self.family.text_positions(self.model, tokens)

    def text_ends(self, tokens: Tensor) -> Tensor:
        """Where each text of `tokens` `[B, L]` ends; see `Family.text_ends`."""
        return self.family.text_ends(self.model, tokens)

    @property
    def pools(self) -> bool:
        """Whether embeddings are all that is read of the towers; see `Family.pools`."""
        return self.family.pools(self.model)

    def _any(self) -> Tensor:
        scale = getattr(self.model, "logit_scale", None)
        return next(self.model.parameters()) if scale is None else scale  # type: ignore[no-any-return]

    def _need(self, tower: str) -> None:
        if tower not in self.towers:
            raise ModelError(f"{_name(self.model)} has no {tower} tower")

    def _preprocess(self) -> Preprocessing | None:
        kept = self.model.__dict__.get("preprocess")
        if kept is not None:
            return kept
        config = self.family.preprocess_config(self.model)
        return None if config is None else preprocess_from_config(config)

    def _tokenizer(self) -> Tokenizing | None:
        kept = self.model.__dict__.get("tokenizer")
        if kept is not None:
            return kept
        config = self.family.tokenizer_config(self.model)
        return None if config is None or config["kind"] == "unknown" else tokenizer_from_config(config)


def _name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def encoders(
    model: nn.Module, preprocess: Preprocessing | None = None, tokenizer: Tokenizing | None = None
) -> Encoders:
    """How to embed images and texts, or one of them, with `model`; `preprocess` and `tokenizer` override what it brings
    along.

    Raises ModelError for a model without encoders, and for one of two towers without a logit scale.
    """
    return Encoders(model, preprocess, tokenizer)
