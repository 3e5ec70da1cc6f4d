"""What a Hugging Face model says of itself: its kind, and the descriptions of its architecture and inputs."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from ..errors import ModelError
from . import huggingface_settings
from .explicit import unsupported
from .inputs import Preprocess

ALIGN = "its EfficientNet and BERT towers have no kernels here"
NAMES = ("CLIPModel", "SiglipModel")


def class_names(model: nn.Module) -> set[str]:
    """Names of the transformers classes above an object, told without importing transformers."""
    return {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.")}


def kind_of(model: nn.Module) -> str:
    found = [name for name in NAMES if name in class_names(model)]
    if found:
        return found[0]
    if "AlignModel" in class_names(model):
        raise ModelError(f"ALIGN (AlignModel) is not supported: {ALIGN}; use a CLIP or SigLIP model")
    raise unsupported(model)


def config_of(model: Any) -> dict[str, Any]:
    """A JSON-able description for `huggingface_files.create_from_config`: the settings that make the architecture."""
    config: dict[str, Any] = {
        name: {key: value for key, value in getattr(model.config, name).to_dict().items() if key in settings}
        for name, settings in huggingface_settings.SETTINGS.items()
    }
    if kind_of(model) == "CLIPModel":
        config["projection_dim"] = model.config.projection_dim
    return deepcopy({"family": "huggingface", "class": kind_of(model), "config": config})


def preprocess_config(model: Any) -> dict[str, Any]:
    """The description of the image transform that the model's kind was trained with."""
    size = model.config.vision_config.image_size
    if kind_of(model) == "SiglipModel":
        return Preprocess({"image_size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}).config
    return Preprocess({"image_size": size}).config


def tokenizer_config(model: Any) -> dict[str, Any]:
    """The description of the model's tokenizer; unknown where it was not loaded with one."""
    length = model.config.text_config.max_position_embeddings
    if kind_of(model) == "CLIPModel" and model.config.text_config.vocab_size == 49408:
        return {"kind": "clip-bpe", "context_length": length}
    return {"kind": "unknown", "context_length": length}
