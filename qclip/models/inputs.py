"""What turns images and texts into a model's inputs, described by JSON so that an artifact needs no source."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torchvision.transforms import Compose

from ..errors import ModelError

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
        odd = set(config) - set(defaults) - {"image_size"}
        if odd or "image_size" not in config:
            raise ModelError(f"preprocessing needs 'image_size' and knows {', '.join(defaults)}; got {sorted(config)}")
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
        if merged["interpolation"] not in ("bicubic", "bilinear", "random"):
            raise ModelError(f"interpolation is bicubic, bilinear or random, not {merged['interpolation']!r}")
        if merged["resize_mode"] not in ("shortest", "longest", "squash"):
            raise ModelError(f"resize_mode is shortest, longest or squash, not {merged['resize_mode']!r}")
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


class Tokenizer:
    """Texts -> int64 token ids `[n, context_length]`. `config` rebuilds it; it is loaded when first called.

    `config["kind"]`: "clip-bpe" (built into open_clip), "siglip" (open_clip's, with `variant`), "hf" (a Hugging Face
    tokenizer through open_clip, with `name` and `options`), "hf-auto" (the tokenizer of a Hugging Face model, with
    `name`), or "unknown" (none: calling it is a ModelError).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("kind") not in ("clip-bpe", "siglip", "hf", "hf-auto", "unknown"):
            raise ModelError(f"tokenizer kind {config.get('kind')!r} is unknown; known: clip-bpe, siglip, hf, hf-auto")
        self.config = dict(config)
        self.context_length: int = int(config.get("context_length", 77))
        self._loaded: Any = None

    def __call__(self, texts: str | list[str]) -> Tensor:
        if self._loaded is None:
            self._loaded = self._load()
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self._loaded(texts)

    def _load(self) -> Any:
        kind, options = self.config["kind"], self.config.get("options") or {}
        name = self.config.get("name")
        if kind == "clip-bpe":
            return open_clip.SimpleTokenizer(context_length=self.context_length, **options)
        if kind == "unknown":
            raise ModelError("the model's tokenizer is not known; set model.tokenizer to a function of list[str]")
        try:
            if kind == "siglip":
                return SigLipTokenizer(self.config["variant"], context_length=self.context_length)
            if kind == "hf":
                return HFTokenizer(
                    name, context_length=self.context_length, tokenizer_mode=self.config.get("mode"), **options
                )
            return self._load_auto(name)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            what = name if kind != "siglip" else f"SigLIP {self.config['variant']}"
            raise ModelError(
                f"tokenizer {what!r} could not be loaded ({first_line(error)}); it needs transformers "
                "and the network or a local copy, or set model.tokenizer"
            ) from error

    def _load_auto(self, name: str | None) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)

        def encode(texts: list[str]) -> Tensor:
            out = tokenizer(
                texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
            )
            return out["input_ids"].to(torch.int64)

        return encode

    def __deepcopy__(self, memo: dict) -> Tokenizer:
        return self


def first_line(error: Exception) -> str:
    """What other libraries' errors say, as part of one sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def preprocess_from_config(config: dict[str, Any]) -> Preprocess:
    """The image transform that `config` describes (see `Preprocess`)."""
    return Preprocess(config)


def tokenizer_from_config(config: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `config` describes (see `Tokenizer`)."""
    return Tokenizer(config)
