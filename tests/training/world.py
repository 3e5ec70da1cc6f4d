"""A small model and pairs to train it on, in a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.small import small_clip

WORDS = ("red", "dog", "bird", "house", "two cats", "a blue car", "old boat", "tree", "night", "snow", "sea", "child")
PAIRS = 24


def pairs(count: int = PAIRS) -> tuple[Tensor, list[list[str]]]:
    """Images, and two captions of each."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    texts = [[f"a photo of {WORDS[i % 12]} {i}", f"{WORDS[(5 * i) % 12]} and {WORDS[i % 7]} {i}"] for i in range(count)]
    return images, texts


SETTINGS = {"steps": 6, "batch": 8, "rate": 1e-3, "save_every": 2, "held_out": 0.2}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


__all__ = ["PAIRS", "SETTINGS", "pairs", "parameters", "small_clip"]
