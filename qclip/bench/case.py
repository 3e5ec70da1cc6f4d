"""What every contender runs: one tower of one float model on one input."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qclip.errors import InputError

Run = Callable[[], Tensor]
BATCH = {"image": 16, "text": 64}


class Encoder(nn.Module):
    """One encoder of a model as a module of its own, for exporters."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        self.model, self.encode = model, encode(model, tower)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a peer is given.

    original: the float model; `model()` and `explicit()` are copies that a peer may change. tower: "image" or "text".
    x: float32 images [B, 3, H, W] or int64 tokens [B, L]. threads: that the peer shall use. folder: for its files.
    saturates: whether INT8 sums of unsigned by signed bytes can overflow 16 bits where it runs, for want of VNNI.
    say: takes a few words on what the peer does now.
    """

    original: nn.Module
    tower: str
    x: Tensor
    threads: int
    folder: Path
    saturates: bool = False
    say: Callable[[str], None] = lambda words: None

    def model(self) -> nn.Module:
        return copy.deepcopy(self.original).eval()

    def explicit(self) -> nn.Module:
        """With every linear map, those of attention too, as a module (`qclip.towers`); the numbers are the same."""
        from qclip import models  # late, here and below: it takes seconds, and not every peer's process wants it

        model = self.model()
        models.towers(model)
        return model

    def run(self, model: nn.Module, x: Tensor | None = None) -> Run:
        """A call of `model`'s tower with the input, or with `x` in its place."""
        call, given = encode(model.eval(), self.tower), self.x if x is None else x
        return lambda: call(given)

    def exported(self) -> Encoder:
        """The encoder alone, in explicit form, for `torch.onnx.export` and its like."""
        return Encoder(self.explicit(), self.tower).eval()


def encode(model: nn.Module, tower: str) -> Callable[[Tensor], Tensor]:
    from qclip import models

    encoders = models.encoders(model)
    return encoders.encode_image if tower == "image" else encoders.encode_text


def make_input(model: nn.Module, tower: str, batch: int, seed: int, full: bool) -> Tensor:
    """`batch` images of standard normal pixels, or prompts "a photo of a NAME" (`full`: that fill the context).
    Raises InputError where prompts are wanted and there is no tokenizer."""
    from qclip import models
    from qclip.models.class_names import IMAGENET

    encoders = models.encoders(model)
    if ("text" if tower == "text" else "vision") not in encoders.towers:
        raise InputError(f"the model has no {tower} tower")
    if tower == "text":
        if encoders.tokenizer is None:
            raise InputError("the model has no tokenizer, so its text tower gets no prompts; use --tower image")
        names = [IMAGENET[i % len(IMAGENET)] for i in range(batch)]
        return encoders.tokenizer([f"a photo of a {name}" + f" and a {name}" * (100 * full) for name in names])
    side = encoders.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))
