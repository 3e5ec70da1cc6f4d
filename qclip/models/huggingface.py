"""Hugging Face's CLIP and SigLIP models as a family (transformers 4 and 5), without importing transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import huggingface_bert, huggingface_descriptions, huggingface_files, huggingface_settings, huggingface_towers
from .family import Family
from .huggingface_calls import device_of, image_features, text_features
from .huggingface_kinds import kind_of, owns
from .inputs import attach


class HuggingFace(Family):
    """CLIP, SigLIP and SigLIP 2 and the towers of each alone, AltCLIP and ChineseCLIP."""

    name = "huggingface"
    classes = huggingface_settings.CLASSES
    prefixes = ("hf:",)
    examples = (("hf:ID_OR_DIR", "a Hugging Face CLIP or SigLIP, or a tower of one (extra `hf`)"),)

    owns = staticmethod(owns)
    towers = staticmethod(huggingface_towers.towers)
    value_path = staticmethod(huggingface_towers.value_path)
    encode_image = staticmethod(image_features)
    encode_text = staticmethod(text_features)
    image_size = staticmethod(huggingface_descriptions.image_size)
    preprocess_config = staticmethod(huggingface_descriptions.preprocess_config)
    tokenizer_config = staticmethod(huggingface_descriptions.tokenizer_config)
    config_of = staticmethod(huggingface_descriptions.config_of)
    grid = staticmethod(huggingface_settings.grid)
    sizes = staticmethod(huggingface_settings.sizes)
    plain = staticmethod(huggingface_settings.plain)

    def encodes(self, model: Any) -> tuple[str, ...]:
        return kind_of(model).towers

    def pools(self, model: Any) -> bool:
        """CLIP's towers alone and without a projection are read token by token, by diffusion and language models."""
        kind = kind_of(model)
        return len(kind.towers) == 2 or kind.projected

    def text_positions(self, model: Any, tokens: Tensor) -> Tensor | None:
        if not kind_of(model).bert:
            return None
        read = huggingface_bert.real(model, huggingface_bert.visible(model, tokens))
        return None if bool(read.all()) else read.to(device_of(model))

    def text_ends(self, model: Any, tokens: Tensor) -> Tensor:
        bert = kind_of(model).bert
        return huggingface_bert.ends(model, tokens) if bert else super().text_ends(model, tokens)

    def create_from_config(self, config: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
        return huggingface_files.create_from_config(config, device)

    def load(self, name: str, device: str | torch.device = "cpu", arch: str | dict | None = None) -> nn.Module:
        source = name.removeprefix("hf:")
        return attach(*huggingface_files.load(source, device), source=name)

    def rebuild_buffers(self, model: nn.Module) -> None:
        for module in model.modules():
            for name in ("position_ids", "token_type_ids"):
                ids = module._buffers.get(name)
                if ids is None or not ids.is_meta:
                    continue
                fresh = torch.arange(ids.shape[-1], device="cpu").expand((1, -1))
                module._buffers[name] = fresh if name == "position_ids" else torch.zeros_like(fresh)


FAMILY = HuggingFace()
