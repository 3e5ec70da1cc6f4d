"""From differences with intervals to words. An interval clear of 0 decides; else no difference is shown."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable
from typing import Any

from qclip.results import Row

from . import units
from .index import WHOLE, Cohort, Index, Part

FEW = 30  # images: below it an interval says little


class Verdict(enum.Enum):
    """(word, symbol). The symbol carries the verdict where colour cannot."""

    BETTER = ("better", "\N{CHECK MARK}")
    WORSE = ("worse", "\N{BALLOT X}")
    MIXED = ("better and worse", "\N{PLUS-MINUS SIGN}")  # on different sets of one axis
    OPEN = ("no difference shown", "\N{WHITE CIRCLE}")
    SAME = ("equal", "=")
    CHANGED = ("changed", "\N{NOT EQUAL TO}")  # neither better nor worse by itself
    NOTED = ("without an interval", "\N{ALMOST EQUAL TO}")
    UP = ("more confident", "\N{UPWARDS ARROW}")
    DOWN = ("less confident", "\N{DOWNWARDS ARROW}")
    MISSING = ("not measured", units.ABSENT)

    @property
    def word(self) -> str:
        return self.value[0]

    @property
    def symbol(self) -> str:
        return self.value[1]

    @property
    def css(self) -> str:
        moved = dict.fromkeys(("UP", "DOWN", "CHANGED"), "moved")
        return ({"SAME": "open", "NOTED": "open", "MIXED": "worse"} | moved).get(self.name, self.name.lower())


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing that is compared: a metric on a set. `leading` ones speak for their axis in the sentences."""

    axis: str
    metric: str
    set: str
    part: Part = WHOLE
    corruption: str = ""
    score: str = ""
    leading: bool = False
    k: int | None = None  # of a recall

    @property
    def measure(self) -> units.Measure:
        return units.metric(self.metric)

    @property
    def name(self) -> str:
        score = units.score(self.score)
        name = self.measure.name if self.k is None else f"{self.measure.name} at {self.k}"
        return f"{name}, {score}" if score else name

    @property
    def where(self) -> str:
        """The set, and its part where it is not the whole."""
        return f"{self.set} \N{MIDDLE DOT} {self.part.name}" if self.part.name else self.set

    @property
    def place(self) -> str:
        """Where it was measured, in a few words: the corruption, else the set."""
        return units.corruption(self.corruption) if self.corruption else self.where

    @property
    def direction(self) -> str:
        return {1: "higher is better", -1: "lower is better", 0: "+ is overconfident"}[self.measure.better]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The answer to a question for one model: the paired difference to its reference."""

    question: Question
    model: str
    value: float | None
    low: float | None
    high: float | None
    verdict: Verdict

    @property
    def difference(self) -> str:
        return self.question.measure.difference(self.value)

    @property
    def interval(self) -> str:
        return self.question.measure.difference_interval(self.low, self.high)

    @property
    def said(self) -> str:
        """ "-1.20 points [-1.90, -0.40]"."""
        return " ".join(part for part in (self.difference, self.question.measure.unit, self.interval) if part)


def judge(better: int, value: float | None, low: float | None, high: float | None) -> Verdict:
    """The verdict on a difference: `better` is 1 where more is better, -1 where less is, 0 where neither."""
    if value is None:
        return Verdict.MISSING
    if value == 0 and low == 0 and high == 0:
        return Verdict.SAME
    if low is None or high is None or math.isnan(low) or math.isnan(high) or low <= 0 <= high:
        return Verdict.OPEN
    if better == 0:
        return Verdict.UP if low > 0 else Verdict.DOWN
    return Verdict.BETTER if (low > 0) == (better > 0) else Verdict.WORSE


def changed(row: Row) -> Verdict:
    """Of a share that is 1 where two models agree in all: equal, or changed, which is neither better nor worse."""
    if row["value"] is None:
        return Verdict.MISSING
    return Verdict.SAME if row["value"] == 1 else Verdict.CHANGED


Answers = dict[Question, dict[str, Comparison]]  # by question and model


def compare(index: Index, cohort: Cohort, questions: Iterable[Question]) -> Answers:
    """The comparisons of a cohort, question by question; questions that no variant answers are left out."""
    out = {}
    for question in questions:
        answers = {model: _answer(index, cohort.reference, model, question) for model in cohort.variants}
        if any(answer.verdict is not Verdict.MISSING for answer in answers.values()):
            out[question] = answers
    return out


def absolute(index: Index, model: str, question: Question) -> float | None:
    """The model's own value behind a question."""
    row = index.row(model, question.metric, **_key(question))
    value = None if row is None else row["value"]
    if row is None and question.metric == "mean_top1":
        found = [
            index.value(model, "top1", **(_key(question) | {"severity": s}))
            for s in index.severities(question.set, question.corruption)
            if s
        ]
        known = [v for v in found if v is not None]
        value = sum(known) / len(known) if known and len(known) == len(found) else None
    return value


def _key(question: Question) -> dict[str, Any]:
    key = {"set": question.set, "corruption": question.corruption, "score": question.score} | question.part.key
    return key if question.k is None else key | {"axis": "k", "at": question.k}


def _answer(index: Index, reference: str, model: str, question: Question) -> Comparison:
    row = index.row(model, question.metric, reference=reference, **_key(question))
    if row is None:
        value, low, high = None, None, None
        if question.metric == "mean_top1":  # without the mean's own row there is a difference, but no interval
            ours, theirs = absolute(index, model, question), absolute(index, reference, question)
            value = None if ours is None or theirs is None else ours - theirs
    else:
        value, low, high = row["value"], row["low"], row["high"]
    verdict = judge(question.measure.better, value, low, high)
    if verdict is not Verdict.MISSING and low is not None and low == high and row is not None and _few(row["n"]):
        verdict = Verdict.OPEN  # every replicate drew the same few images: that is no certainty
    return Comparison(question, model, value, low, high, verdict)


def _few(n: int | None) -> bool:
    return n is not None and 0 < n < FEW


def few_images(index: Index) -> list[str]:
    """A note for every set, or part of one, that has few images."""
    out = []
    for name in dict.fromkeys([*index.labelled_sets, *(name for name, _ in index.ood_sets)]):
        for part in (WHOLE, *index.parts(name)):
            n = index.n(name, part=part)
            if _few(n):
                where = f"{name}, {part.name}" if part.name else name
                images = "1 image" if n == 1 else f"{units.count(n)} images"
                out.append(f"{where}: {images}; intervals from fewer than {FEW} mean little")
    return out


def tally(answers: Answers) -> dict[Verdict, int]:
    """How often each verdict was given; confidence that only moved is not counted."""
    out = dict.fromkeys(Verdict, 0)
    for by_model in answers.values():
        for answer in by_model.values():
            out[answer.verdict] += 1
    return out


def about(cohort: Cohort, model: str, answers: Answers) -> list[str]:
    """What can be said of one model against its reference: better, worse and open axes."""
    mine = [by_model[model] for question, by_model in answers.items() if question.leading]
    named = _axis_names([answer.question for answer in mine])
    sentences = []
    for verdict, lead in ((Verdict.BETTER, "Better in"), (Verdict.WORSE, "Worse in")):
        parts = [f"{named[a.question]} ({a.said})" for a in mine if a.verdict is verdict]
        if parts:
            sentences.append(f"{lead} {units.words(parts)}.")
    unsure = [named[a.question] for a in mine if a.verdict is Verdict.OPEN]
    same = [named[a.question] for a in mine if a.verdict is Verdict.SAME]
    if unsure:
        if sentences or same:
            sentences.append(f"No difference shown in {units.words(unsure)}.")
        else:
            sentences.append(f"No difference to {cohort.reference} is shown in {units.words(unsure)}.")
    if same:
        sentences.append(f"Equal in {units.words(same)}.")
    if not mine or not sentences:
        sentences.append("Nothing was measured on which it could be judged.")
    return sentences


def _axis_names(asked: list[Question]) -> dict[Question, str]:
    """A name for each leading question, with its set where the axis has several, and by its metric where these are
    of one set."""
    said = {"Accuracy": "top-1 accuracy", "Calibration": "calibration"}
    names = {}
    for question in asked:
        name = said.get(question.axis, question.axis)
        name = units.small(name)
        beside = [other for other in asked if other.axis == question.axis]
        if sum(other.where == question.where for other in beside) > 1:
            name = units.small(question.name)
        names[question] = f"{name} on {question.where}" if len(beside) > 1 else name
    return names


def confidence_said(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "not measured"
    shown = f"{units.metric('signed_gap').value(value)} points"
    if low is not None and high is not None and low <= 0 <= high:
        return f"neither over- nor underconfident as far as can be told ({shown})"
    return f"{'over' if value > 0 else 'under'}confident ({shown})"


def multiplicity(answers: list[Answers]) -> str:
    """What chance alone would give among that many comparisons."""
    counts = dict.fromkeys(Verdict, 0)
    for part in answers:
        for verdict, number in tally(part).items():
            counts[verdict] += number
    better, worse = counts[Verdict.BETTER], counts[Verdict.WORSE]
    asked = better + worse + counts[Verdict.OPEN] + counts[Verdict.SAME]
    if not asked:
        return ""
    return (
        f"{better} better and {worse} worse among {asked} comparisons. If nothing had changed at all, about "
        f"{0.05 * asked:.1f} intervals of 95 % would still be clear of 0 by chance, half of them as wins. The "
        "comparisons share images, so they are not independent, and the intervals are not widened for their "
        "number: read a single narrow win or loss with doubt."
    )
