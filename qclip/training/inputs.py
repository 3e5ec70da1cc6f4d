"""What a step embeds: a batch of pairs, and what terms ask for beside it.

All of it follows from the seed and the step's number, input by input, so that it is the same however a batch is cut,
shared by processes, or gone on with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import seeds
from . import alterations
from .pairs import Pairs, Rows
from .settings import Settings

SAMPLE = 128  # negatives of which the float model's scores are known


@dataclasses.dataclass(frozen=True)
class Images:
    """So many images; `pixels` gives those at some places, `[n, 3, H, W]`."""

    count: int
    pixels: Callable[[Rows], Tensor]


@dataclasses.dataclass(frozen=True)
class Batch:
    """`rows` of the pairs' images and `captions`, places of their texts. By name: images to embed, and places of
    captions to embed."""

    rows: Rows
    captions: Rows
    images: dict[str, Images]
    texts: dict[str, Rows]


class Inputs:
    """Of every step. `pairs`: what is learned from; `apart`: pairs for terms that need such; `processes`: how many
    share a step, each of which has as many of everything."""

    def __init__(
        self, pairs: Pairs, needs: frozenset[str], settings: Settings, processes: int = 1, apart: Pairs | None = None
    ) -> None:
        self.pairs, self.needs, self.settings, self.processes = pairs, needs, settings, processes
        self.apart = apart if "apart" in needs else None
        self.beside = max(1, round(settings.batch * settings.beside / processes)) * processes
        drawn = needs & {"views", "negatives", "mixtures"}
        self.bounds = alterations.bounds_of(pairs.pixels(np.arange(min(len(pairs), 64)))) if drawn else None

    def of(self, step: int) -> Batch:
        settings = self.settings
        rows, captions = self.pairs.batch(step, settings.batch, settings.seed)
        images, texts = {"image": Images(len(rows), lambda at: self.pairs.pixels(rows[at]))}, {"text": captions}
        if "views" in self.needs:
            images["views"] = Images(self.beside, lambda at: self._views(rows[at], f"view {step}", at))
        if "negatives" in self.needs:
            images["negatives"] = Images(
                self.beside,
                lambda at: self._negatives(rows[-1 - at], rows[(-2 - at) % len(rows)], f"negative {step}", at),
            )
        if "mixtures" in self.needs:
            images["mixtures"] = Images(
                self.beside, lambda at: self._mixtures(rows[at], rows[at - 1], f"mixture {step}", at)
            )
        if self.apart is not None:
            apart, count = self.apart, min(self.beside, len(self.apart) // self.processes * self.processes)
            others, texts["apart text"] = apart.batch(step, count, settings.seed)
            images["apart"] = Images(len(others), lambda at: apart.pixels(others[at]))
        return Batch(rows, captions, images, texts)

    def sample(self) -> Tensor:
        """Some negatives, the same in every run of the seed."""
        rows = seeds.generator(self.settings.seed, "negatives").permutation(len(self.pairs))
        at = np.arange(min(SAMPLE, len(rows)))
        return self._negatives(rows[at], rows[at - 1], "negative of the float model", at)

    def _chance(self, name: str, place: int) -> np.random.Generator:
        return seeds.generator(self.settings.seed, f"{name} {place}")

    def _views(self, rows: Rows, name: str, at: Rows) -> Tensor:
        assert self.bounds is not None
        found = zip(self.pairs.pixels(rows), at, strict=True)
        return torch.stack([alterations.view(x, self.bounds, self._chance(name, place)) for x, place in found])

    def _negatives(self, rows: Rows, others: Rows, name: str, at: Rows) -> Tensor:
        return self._of_two(alterations.negative, rows, others, name, at)

    def _mixtures(self, rows: Rows, others: Rows, name: str, at: Rows) -> Tensor:
        return self._of_two(alterations.mixture, rows, others, name, at)

    def _of_two(
        self, made: Callable[[Tensor, Tensor, Any, Any], Tensor], rows: Rows, others: Rows, name: str, at: Rows
    ) -> Tensor:
        assert self.bounds is not None
        found = zip(self.pairs.pixels(rows), self.pairs.pixels(others), at, strict=True)
        return torch.stack([made(x, y, self.bounds, self._chance(name, place)) for x, y, place in found])
