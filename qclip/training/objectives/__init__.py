"""What training makes small: a sum of terms, each of the embeddings of a whole batch, whatever parts of it were
embedded at a time or on which machine."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, Protocol

from torch import Tensor

from ...errors import InputError
from ...registry import Registry


@dataclasses.dataclass(frozen=True)
class Features:
    """Unit embeddings of a batch: image i belongs to text i. `teacher_*` are the float model's, for the same inputs."""

    image: Tensor  # [B, E]
    text: Tensor  # [B, E]
    scale: Tensor  # []: the factor on cosines, exp of the logit scale
    teacher_image: Tensor
    teacher_text: Tensor
    teacher_scale: Tensor
    captions: Tensor  # int64 [B]: which caption; equal ones are the same text
    classes: Tensor | None = None  # [K, E]: embeddings of a list of class names, where the objective asks for one
    teacher_classes: Tensor | None = None


class Term(Protocol):
    """One term. `needs`: "classes" for a list of class names, "pairs" where a batch of one says nothing."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def __call__(self, features: Features) -> Tensor: ...


#: Classes of terms: ours, those of entry points "qclip.objectives", and registered ones.
OBJECTIVES: Registry[type[Term]] = Registry(
    "objective",
    "qclip.objectives",
    {
        "contrastive": "qclip.training.objectives.contrastive:Contrastive",
        "mse": "qclip.training.objectives.feature_mse:FeatureMSE",
        "similarity": "qclip.training.objectives.similarity:Similarity",
        "zero-shot": "qclip.training.objectives.zero_shot:ZeroShot",
    },
    attributes=("needs", "__call__"),
)


class Objective:
    """A weighted sum of terms from its name: `"contrastive+10*mse"`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terms: list[tuple[float, Term]] = []
        for part in name.split("+"):
            weight, _, kind = part.rpartition("*")
            if weight and not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", weight):
                raise InputError(
                    f"objective {name!r}: the weight {weight!r} is no number; write it as in 'contrastive+10*mse'"
                )
            if kind in [term.name for _, term in self.terms]:
                raise InputError(f"objective {name!r} names {kind!r} twice; keep one")
            self.terms.append((float(weight or 1), OBJECTIVES.get(kind)()))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(term.needs for _, term in self.terms))

    def __call__(self, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [], and each term's part of it by name."""
        parts = {term.name: weight * term(features) for weight, term in self.terms}
        return sum(parts.values()), parts  # type: ignore[return-value]
