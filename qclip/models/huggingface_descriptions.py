"""What a Hugging Face model says of itself: the descriptions of its architecture and inputs."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

from . import huggingface_bert, huggingface_settings
from .allowed import pair
from .huggingface_kinds import kind_of, name_of, settings_of
from .inputs import Preprocess


def config_of(model: Any) -> dict[str, Any]:
    """A JSON-able description for `huggingface_files.create_from_config`: the settings that make the architecture."""
    name, kind = name_of(model), kind_of(model)
    parts: dict[str, Any] = {}
    for tower in kind.towers:
        allowed = huggingface_settings.settings(kind, tower)
        held = settings_of(model, tower).to_dict()
        parts[f"{tower}_config"] = {key: value for key, value in held.items() if key in allowed}
    if len(kind.towers) == 1:
        (config,) = parts.values()
    else:
        config = parts | ({"projection_dim": model.config.projection_dim} if kind.projected else {})
    return deepcopy({"family": "huggingface", "class": name, "config": config})


def image_size(model: Any) -> int | tuple[int, int] | None:
    """Of the images that the model has positions for; None for a text tower alone."""
    if "vision" not in kind_of(model).towers:
        return None
    config = settings_of(model, "vision")
    if not kind_of(model).naflex:
        return config.image_size  # type: ignore[no-any-return]
    side, (down, across) = math.isqrt(config.num_patches), pair(config.patch_size)
    return side * down if down == across else (side * down, side * across)


def preprocess_config(model: Any) -> dict[str, Any] | None:
    """The description of the image transform that the model's kind was trained with."""
    size = image_size(model)
    if size is None:
        return None
    if not kind_of(model).clip:
        return Preprocess({"image_size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}).config
    return Preprocess({"image_size": size}).config


def tokenizer_config(model: Any) -> dict[str, Any] | None:
    """The description of the model's tokenizer; unknown where it was not loaded with one, None without a text tower."""
    if "text" not in kind_of(model).towers:
        return None
    if kind_of(model).bert:
        return {"kind": "unknown", "context_length": huggingface_bert.context_of(model)}
    config = settings_of(model, "text")
    clip = kind_of(model).clip and config.vocab_size == 49408
    return {"kind": "clip-bpe" if clip else "unknown", "context_length": config.max_position_embeddings}
