"""A model and image sets small enough that every number can be computed again by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qclip.data import ImageSet, UnreadableImage

SIDE = 8
CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]


class Pictures:
    """Images in memory: a class's own pattern under noise. Counts how often an image is read."""

    def __init__(self, labels: np.ndarray, seed: int, bad: Sequence[int] = (), noise: float = 60.0) -> None:
        self.reads = 0
        self.bad = set(bad)
        patterns = np.random.default_rng(7).integers(60, 196, (len(CLASSES) + 1, SIDE, SIDE, 3))
        blur = np.random.default_rng(seed).normal(0, noise, (len(labels), SIDE, SIDE, 3))
        self.pixels = np.clip(patterns[labels] + blur, 0, 255).astype(np.uint8)

    def digest(self, rows: Sequence[int]) -> str:
        return hashlib.sha256(self.pixels[list(rows)].tobytes() + bytes(r in self.bad for r in rows)).hexdigest()

    def read(self, rows: Sequence[int]) -> list[Image.Image | UnreadableImage]:
        self.reads += len(rows)
        return [
            UnreadableImage(f"row {r} is broken") if r in self.bad else Image.fromarray(self.pixels[r]) for r in rows
        ]


def pictures(
    name: str = "pets",
    n: int = 90,
    seed: int = 0,
    groups: dict | None = None,
    bad: Sequence[int] = (),
    strange: bool = False,
) -> ImageSet:
    """`strange`: an OOD set, without labels."""
    labels = np.full(n, len(CLASSES)) if strange else np.arange(n) % len(CLASSES)
    source = Pictures(labels, seed, bad)
    return ImageSet(
        name=name,
        spec=f"memory:{name}",
        classes=None if strange else CLASSES,
        labels=None if strange else labels.astype(np.int64),
        captions=None,
        groups=groups or {},
        prompts=None,
        source=source,
        rows=np.arange(n),
    )


def preprocess(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1).float() / 255
    return (pixels - 0.5) / 0.25


class Tiny(nn.Module):
    """One linear image encoder; a prompt's embedding is that of its class's pattern, turned a bit by the template."""

    def __init__(self, disturbance: float = 0.0, width: int = 16, bias: float | None = None) -> None:
        super().__init__()
        self.bias = bias
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(width, 3 * SIDE * SIDE, generator=generator) / 10
        self.image = nn.Linear(3 * SIDE * SIDE, width, bias=False)
        self.image.weight = nn.Parameter(
            weight + disturbance * weight.std() * torch.randn(weight.shape, generator=generator)
        )
        patterns = np.random.default_rng(7).integers(60, 196, (len(CLASSES) + 1, SIDE, SIDE, 3)).astype(np.uint8)
        known = torch.stack([preprocess(Image.fromarray(p)).flatten() for p in patterns[:-1]])
        self.register_buffer("words", known @ weight.T)
        self._seen: list[Tensor] = []
        self._stop_after: int | None = None

    def encode_image(self, images: Tensor) -> Tensor:
        if self._stop_after is not None and len(self._seen) >= self._stop_after:
            raise KeyboardInterrupt
        self._seen.append(images.clone())
        return self.image(images.flatten(1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.words[tokens[:, 0]] + 0.3 * torch.sin(tokens[:, 1:].float() + torch.arange(self.words.shape[1]))

    def encoders(self) -> SimpleNamespace:
        calls = {"encode_image": self.encode_image, "encode_text": self.encode_text}
        feeds = {"preprocess": preprocess, "tokenizer": tokenizer, "logit_scale": 20.0, "logit_bias": self.bias}
        return SimpleNamespace(
            **calls, **feeds, towers=("vision", "text"), device=torch.device("cpu"), dtype=torch.float32
        )

    @property
    def seen(self) -> list[Tensor]:
        return self._seen

    def stop(self, batches: int) -> None:
        """Be killed after so many batches. Names with an underscore: a key must not depend on them."""
        self._stop_after = batches

    @property
    def images_seen(self) -> int:
        return sum(len(batch) for batch in self._seen)


def tokenizer(prompts: list[str]) -> Tensor:
    return torch.tensor([[next(k for k, name in enumerate(CLASSES) if name in p), len(p)] for p in prompts])
