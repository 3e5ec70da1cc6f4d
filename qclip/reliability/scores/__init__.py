"""Out-of-distribution scores, one per file. Higher = in distribution (ID).

Another package adds one by an entry point of the group `qclip.scores`, a script by `SCORES.register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from qclip.errors import InputError
from qclip.registry import Registry

from ..sample import Known, Sample

#: What `evaluate` can give a score beside the images that it is asked about, and the argument that gives it.
NEEDS = {
    "train": ("learns from training images; name a set", "train"),
    "labels": ("learns from the labels of training images; name a labelled set", "train"),
    "negatives": ("compares with words that are no class; name a file of them", "negatives"),
    "patches": ("looks at patches", ""),
}


class UnfitError(InputError):
    """A score cannot learn from what it was given: too few images, no variance."""


class Score(Protocol):
    """needs: what it cannot do without, of `NEEDS`. "train": `Known.train` is there when it is fitted; "labels": and
    has labels; "negatives": `Known.negatives` is there; "patches": the samples that it is asked about have patches;
    such a score learns from the classes alone. A score may say how many training images it needs at `least`.

    The score of an image depends on that image and on what was fitted, not on the images beside it: samples come in
    parts. A fitted score may have a `remark`: a choice that its data made for it, which becomes a note.
    """

    name: str
    label: str
    needs: frozenset[str]

    def fit(self, known: Known) -> Score:
        """The score for one model; `self` where nothing is learned. Raises UnfitError."""
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

    def fit(self, known: Known) -> Formula:
        return self

    def __call__(self, sample: Sample) -> Any:
        return self.of(sample)


_HERE = "qclip.reliability.scores"
SCORES: Registry[Score] = Registry(
    "score",
    "qclip.scores",
    {
        "mcm": f"{_HERE}.mcm:MCM",
        "maxlogit": f"{_HERE}.maxlogit:MAXLOGIT",
        "energy": f"{_HERE}.energy:ENERGY",
        "msp": f"{_HERE}.msp:MSP",
        "entropy": f"{_HERE}.entropy:ENTROPY",
        "gen": f"{_HERE}.gen:GEN",
        "glmcm": f"{_HERE}.glmcm:GlobalLocal",
        "neglabel": f"{_HERE}.neglabel:NegativeLabels",
        "mahalanobis": f"{_HERE}.mahalanobis:Mahalanobis",
        "relative_mahalanobis": f"{_HERE}.mahalanobis:RelativeMahalanobis",
        "knn": f"{_HERE}.knn:Nearest",
        "vim": f"{_HERE}.vim:Vim",
    },
    ("label", "needs", "fit", "__call__"),
)
