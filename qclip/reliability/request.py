"""What is evaluated: sets with their roles, the conditions in which they are embedded, and what is asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qclip import data as qdata
from qclip.data.corruptions import SEVERITIES
from qclip.errors import InputError
from qclip.models import class_names

from .scores import Score

NEIGHBOURS = (1, 5, 10)  # how many of an image's nearest are looked at
SAMPLE = 1000  # images that are corrupted where not all are asked for


@dataclasses.dataclass(frozen=True, eq=False)
class EvalSet:
    """Images, what they are for (a role of `qclip.results.ROLES`), and the classes among which they are told apart.

    labels: positions in `classes`, int64 `[len(data)]`; None for a set of other classes. counts: how many people chose
    each class, int64 `[len(data), len(classes)]`; None where nobody was asked. classes, templates: empty where only
    embeddings are compared (roles "images" and "captions").
    """

    data: qdata.ImageSet
    role: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    labels: np.ndarray | None = None
    counts: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.data.name

    def take(self, rows: np.ndarray) -> EvalSet:
        """The images at these positions."""
        labels, counts = (None if part is None else part[rows] for part in (self.labels, self.counts))
        return dataclasses.replace(self, data=self.data.select(rows), labels=labels, counts=counts)


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """A set in its role, as it is or under a corruption. Embedded once, whoever wants it.

    vectors: the embeddings themselves are wanted, not only what is read from them. scores: OOD scores are wanted.
    """

    set: EvalSet
    corruption: str = ""
    severity: int = 0
    vectors: bool = False
    scores: bool = False

    @property
    def name(self) -> str:
        return f"{self.set.name} {self.corruption} {self.severity}" if self.corruption else self.set.name

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """With the role: a set may be evaluated and learned from, and something else is read of it then."""
        return self.set.role, self.set.name, self.set.data.digest, self.corruption, self.severity


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that `evaluate` was asked. The first of `models` is the reference of every difference; the first ID
    set is what OOD sets are told apart from."""

    models: tuple[str, ...]
    sets: tuple[EvalSet, ...]
    scores: Mapping[str, Score]  # by name, not fitted yet
    corruptions: tuple[str, ...]
    severities: tuple[int, ...] = SEVERITIES
    full: bool = False
    seed: int = 0
    negatives: tuple[str, ...] = ()  # words that are no class
    biased: Mapping[str, float] = dataclasses.field(default_factory=dict)  # logit biases of the models that have one
    scores_named: bool = False  # the user asked for these scores: one that cannot be fitted is an error, not left out
    texts: tuple[str, ...] = ()  # what sets without captions are searched by
    neighbours: tuple[int, ...] = NEIGHBOURS

    @property
    def dev(self) -> Condition | None:
        """The images on which thresholds are chosen, with scores where there are OOD sets."""
        return next((Condition(each, scores=bool(self.ood)) for each in self.of("dev")), None)

    def of(self, *roles: str) -> list[EvalSet]:
        """The sets of these roles."""
        return [each for each in self.sets if each.role in roles]

    @property
    def ood(self) -> list[EvalSet]:
        return self.of("ood", "ood-near", "ood-far")

    def sample(self, of: EvalSet) -> np.ndarray:
        """Positions of the images that are corrupted: all, or a fixed seeded choice."""
        if self.full or len(of.data) <= SAMPLE:
            return np.arange(len(of.data))
        return np.sort(np.random.default_rng(self.seed).permutation(len(of.data))[:SAMPLE])


def prompt_templates(templates: str | Sequence[str] | None) -> list[str]:
    """A list of prompts with a `{}` from a list, the name of one of ours, or one prompt. Raises InputError."""
    known = class_names.TEMPLATES
    if templates is None:
        templates = known["simple"]
    elif isinstance(templates, str):
        if "{}" not in templates and templates not in known:
            raise InputError(
                f"unknown templates {templates!r}; known: {', '.join(known)}, or give prompts with a '{{}}'"
            )
        templates = known.get(templates, [templates])
    templates = list(templates)
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(f"template {template!r} needs one '{{}}' where the class name goes")
    if not templates:
        raise InputError("the list of templates is empty; give at least one prompt with a '{}'")
    return templates
