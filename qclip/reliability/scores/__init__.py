"""Out-of-distribution scores, one per file. Higher = in distribution (ID).

Another package adds one by an entry point of the group `qclip.scores`, a script by `SCORES.register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from qclip.registry import Registry

from ..sample import Sample

NEEDS = frozenset({"train"})  # what `evaluate` can give a score beside the images that it is asked about


class Score(Protocol):
    """needs: what it cannot do without, of `NEEDS`. "train": `fit` gets the training sample of its model.

    The score of an image depends on that image and on what was fitted, not on the images beside it: samples come in
    parts.
    """

    name: str
    label: str
    needs: frozenset[str]

    def fit(self, train: Sample | None) -> Score:
        """The score for one model; `self` where nothing is learned."""
        ...

    def __call__(self, sample: Sample) -> Any:
        """float64 `[n]`, finite, higher = ID."""
        ...


@dataclasses.dataclass(frozen=True)
class Formula:
    """A score that learns nothing."""

    name: str
    label: str
    of: Callable[[Sample], Any]
    needs: frozenset[str] = frozenset()

    def fit(self, train: Sample | None) -> Formula:
        return self

    def __call__(self, sample: Sample) -> Any:
        return self.of(sample)


_HERE = "qclip.reliability.scores"
SCORES: Registry[Score] = Registry(
    "score",
    "qclip.scores",
    {"mcm": f"{_HERE}.mcm:MCM", "maxlogit": f"{_HERE}.maxlogit:MAXLOGIT", "energy": f"{_HERE}.energy:ENERGY"},
    ("label", "needs", "fit", "__call__"),
)
