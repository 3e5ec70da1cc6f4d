"""Image transforms, described by JSON so that an artifact can build them again; models get them and tokenizers here."""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn
from torchvision.transforms import Compose

from .allowed import check_preprocess
from .tokenizer import tokenizer_from_config

VOCABULARY = 49408  # of CLIP's BPE


class Preprocess(Compose):
    """PIL image -> float32 `[3, H, W]`: open_clip's inference transform. `config` rebuilds it."""

    def __init__(self, config: dict[str, Any]) -> None:
        """`config`: image_size (int or [H, W]), and optionally mean, std, interpolation, resize_mode, fill_color.

        Raises ModelError for a setting that does not exist.
        """
        defaults = {
            "mean": open_clip.OPENAI_DATASET_MEAN,
            "std": open_clip.OPENAI_DATASET_STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        }
        check_preprocess(config)
        merged = defaults | config
        size = merged["image_size"]
        if not isinstance(size, int):
            height, width = size
            size = int(height) if height == width else (int(height), int(width))
        self.config = {
            "image_size": size if isinstance(size, int) else list(size),
            "mean": [float(v) for v in merged["mean"]],
            "std": [float(v) for v in merged["std"]],
            "interpolation": merged["interpolation"],
            "resize_mode": merged["resize_mode"],
            "fill_color": merged["fill_color"],
        }
        cfg = PreprocessCfg(
            size=size,
            mean=tuple(self.config["mean"]),
            std=tuple(self.config["std"]),
            interpolation=merged["interpolation"],
            resize_mode=merged["resize_mode"],
            fill_color=merged["fill_color"],
        )
        super().__init__(image_transform_v2(cfg, is_train=False).transforms)

    def __deepcopy__(self, memo: dict) -> Preprocess:
        return self  # never changes, and a model's copies need no copies of it


def preprocess_from_config(config: dict[str, Any]) -> Preprocess:
    """The image transform that `config` describes (see `Preprocess`)."""
    return Preprocess(config)


def attach(
    model: Any,
    preprocess: dict[str, Any] | None,
    tokenizer: dict[str, Any] | None,
    source: str = "",
    file: bytes | None = None,
) -> nn.Module:
    """Give `model` its `.preprocess` and `.tokenizer` (from their descriptions, and the tokenizer's `file`) and
    `.qclip_source`."""
    model.preprocess = None if preprocess is None else preprocess_from_config(preprocess)
    model.tokenizer = None if tokenizer is None else tokenizer_from_config(tokenizer, file)
    model.qclip_source = source
    return model
