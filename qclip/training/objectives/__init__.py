"""What training makes small: a sum of terms, each of the embeddings of a whole batch, whatever parts of it were
embedded at a time or on which machine."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from ...errors import InputError
from ...registry import Registry


class Views(NamedTuple):
    """Altered images (`inputs.Inputs`), and the float model's embeddings of the same images as they are."""

    image: Tensor  # [V, E]
    teacher: Tensor  # [V, E]


class Negatives(NamedTuple):
    """Images that show nothing any caption says (`inputs.Inputs`), and the float model's of other such images."""

    image: Tensor  # [N, E]
    teacher: Tensor  # [M, E]


class Mixtures(NamedTuple):
    """Images made of the pairs' (`inputs.Inputs`), and the float model's embeddings of the same ones."""

    image: Tensor  # [M, E]
    teacher: Tensor  # [M, E]


class Apart(NamedTuple):
    """Pairs that no term but those that need "apart" ever sees: image i belongs to text i."""

    image: Tensor  # [A, E]
    text: Tensor  # [A, E]
    captions: Tensor  # int64 [A]


class Basis(NamedTuple):
    """Principal directions of the float model's image embeddings of all pairs, as columns, by falling variance."""

    mean: Tensor  # [E]
    vectors: Tensor  # [E, E]


@dataclasses.dataclass(frozen=True)
class Features:
    """Unit embeddings of a batch: image i belongs to text i. `teacher_*` are the float model's, for the same inputs.
    Below them is what is there only where the objective asks for it (`Term.needs`)."""

    image: Tensor  # [B, E]
    text: Tensor  # [B, E]
    scale: Tensor  # []: the factor on cosines, exp of the logit scale
    teacher_image: Tensor
    teacher_text: Tensor
    teacher_scale: Tensor
    captions: Tensor  # int64 [B]: which caption; equal ones are the same text
    classes: Tensor | None = None  # [K, E]: embeddings of a list of class names
    teacher_classes: Tensor | None = None
    views: Views | None = None
    negatives: Negatives | None = None
    mixtures: Mixtures | None = None
    apart: Apart | None = None
    basis: Basis | None = None
    consensus: Tensor | None = None  # [B, E]: unit mean of the float model's embeddings of flipped and shifted images


NEEDS = ("pairs", "classes", "views", "negatives", "mixtures", "apart", "basis", "consensus")


class Term(Protocol):
    """One term. `needs`, of `NEEDS`: fields of `Features` that it reads, and "pairs" where a batch of one says
    nothing."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def __call__(self, features: Features) -> Tensor: ...


_HERE = "qclip.training.objectives"

#: Classes of terms: ours, those of entry points "qclip.objectives", and registered ones.
OBJECTIVES: Registry[type[Term]] = Registry(
    "objective",
    "qclip.objectives",
    {
        "contrastive": f"{_HERE}.contrastive:Contrastive",
        "mse": f"{_HERE}.feature_mse:FeatureMSE",
        "similarity": f"{_HERE}.similarity:Similarity",
        "zero-shot": f"{_HERE}.zero_shot:ZeroShot",
        "imitation": f"{_HERE}.imitation:Imitation",
        "consensus": f"{_HERE}.consensus:Consensus",
        "noise": f"{_HERE}.noise:Noise",
        "esd": f"{_HERE}.esd:ESD",
        "mmce": f"{_HERE}.mmce:MMCE",
        "margin": f"{_HERE}.margin:Margin",
        "energy": f"{_HERE}.energy:Energy",
        "spectral": f"{_HERE}.spectral:Spectral",
        "tail": f"{_HERE}.tail:Tail",
    },
    attributes=("needs", "__call__"),
)


class Objective:
    """A weighted sum of terms from its name: `"contrastive+10*mse"`. Raises InputError."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terms: list[tuple[float, Term]] = []
        for part in name.split("+"):
            weight, _, kind = part.rpartition("*")
            if weight and not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", weight):
                raise InputError(
                    f"objective {name!r}: the weight {weight!r} is no number from 0 to below 1e9 in plain digits; "
                    "write it as in 'contrastive+0.5*mse'"
                )
            if kind in [term.name for _, term in self.terms]:
                raise InputError(f"objective {name!r} names {kind!r} twice; keep one")
            self.terms.append((float(weight or 1), OBJECTIVES.get(kind)()))
        if not any(weight for weight, _ in self.terms):
            raise InputError(f"objective {name!r} has weights of 0 alone, from which nothing is learned; raise one")
        if odd := sorted(self.needs - set(NEEDS)):
            raise InputError(f"objective {name!r} needs {odd[0]!r}, and there is only {', '.join(NEEDS)}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(term.needs for _, term in self.terms))

    def __call__(self, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [], and each term's part of it by name."""
        parts = {term.name: weight * term(features) for weight, term in self.terms}
        return sum(parts.values()), parts  # type: ignore[return-value]

    def of_pairs(self) -> Objective | None:
        """Its terms that held-out pairs can be judged by: those that read nothing that is drawn beside a batch."""
        drawn = {"views", "negatives", "mixtures", "apart"}
        kept = copy.copy(self)
        kept.terms = [(weight, term) for weight, term in self.terms if not term.needs & drawn]
        return kept if kept.terms else None
