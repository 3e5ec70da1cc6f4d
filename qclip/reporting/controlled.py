"""What controls say: of each metric whether the recipe is better than the float model, and what that is due to.

A gain in calibration that is gone once the temperature of both is refitted was a temperature. A gain that a control has
as well is that control's: of the steps (float continuation), of noise, of calibration alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from qclip.metrics import metric
from qclip.results import Results, Row

from . import units
from .index import Index
from .verdicts import Comparison, Question, Verdict, judge

SAID = {
    "float-tuned": "the float model with a tuned temperature",
    "float-continued": "float continuation",
    "noise": "the noise arm",
    "noise-measured": "the arm of measured noise",
    "untrained": "the recipe without training",
    "lsq-authors": "LSQ with the authors' objective",
}
WORDS = {Verdict.BETTER: "better", Verdict.WORSE: "worse", Verdict.SAME: "equal", Verdict.OPEN: "cannot be told"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of the mean over runs of an arm to that of another; `p` is Holm's, None where it was not tested."""

    compared: Comparison
    p: float | None

    @property
    def verdict(self) -> Verdict:
        return self.compared.verdict

    @property
    def word(self) -> str:
        return WORDS.get(self.verdict, self.verdict.word)

    @property
    def said(self) -> str:
        holm = "" if self.p is None else f", Holm p {units.probability(self.p)}"
        return f"{self.compared.said}{holm}"


class Controlled:
    """A table of results with means over runs (`qclip.controlled`); `arms[0]` is the recipe."""

    def __init__(self, index: Index) -> None:
        self.index = index
        rows = index.rows("difference_p")
        self.arms = list(dict.fromkeys(row["model"] for row in rows))
        self.reference = next((row["reference"] for row in rows), "")

    def __bool__(self) -> bool:
        return bool(self.arms)

    @property
    def recipe(self) -> str:
        return self.arms[0]

    @property
    def controls(self) -> list[str]:
        return self.arms[1:]

    @functools.cached_property
    def questions(self) -> list[Question]:
        """What was judged, each once."""
        return list(dict.fromkeys(_question(row) for row in self.index.rows("difference_holm_p")))

    def difference(self, question: Question, arm: str, against: str) -> Difference | None:
        """None where it was not measured."""
        key: dict[str, Any] = {"set": question.set, "corruption": question.corruption, "score": question.score}
        key["reference"] = against
        row = self.index.row(arm, question.metric, **key)
        if row is None or row["value"] is None:
            return None
        p = self.index.value(arm, "difference_holm_p", axis="metric", at=question.metric, **key)
        ends = row["value"], row["low"], row["high"]
        verdict = judge(metric(question.metric).better, *ends)
        return Difference(Comparison(question, arm, *ends, verdict), p)

    def due(self, question: Question) -> list[str]:
        """Of a metric in which the recipe is better than float: what has as much of it. Empty: no control has."""
        out = []
        refitted = dataclasses.replace(question, metric=f"{question.metric}_ts")
        after = self.difference(refitted, self.recipe, self.reference)
        if question.metric in ("ece", "nll") and after is not None and after.verdict is not Verdict.BETTER:
            out.append(f"explained by a temperature: with it refitted for both, {after.word}, {after.compared.said}")
        for control in self.controls:
            own = self.difference(question, control, self.reference)
            between = self.difference(question, self.recipe, control)
            if own is None or between is None or between.verdict is Verdict.BETTER:
                continue
            said, told = SAID.get(control, control), between.compared.said
            if own.verdict is Verdict.BETTER:
                does = "does better" if between.verdict is Verdict.WORSE else "does the same"
                out.append(f"{said} {does} ({told} between them)")
            else:
                out.append(f"it cannot be told from {said} ({told} between them)")
        return out

    def sentence(self, question: Question) -> str:
        """The verdict on one metric."""
        found = self.difference(question, self.recipe, self.reference)
        if found is None:
            return ""
        what = f"{question.name} on {question.set}"
        what += f" under {units.small(units.corruption(question.corruption))}" if question.corruption else ""
        text = f"{what}: {found.word}, {found.said}"
        if found.verdict is Verdict.BETTER:
            due = self.due(question)
            text += f"; {'; '.join(due)}" if due else "; more than any control" if self.controls else ""
        return text


def _question(row: Row) -> Question:
    return Question("Controls", str(row["at"]), row["set"], corruption=row["corruption"], score=row["score"])


def findings(results: Results) -> list[str]:
    """The verdicts in lines; empty for results without means over runs."""
    table = Controlled(Index(results))
    if not table:
        return []
    lines = [f"{table.recipe} against {table.reference}, means over seeds; intervals hold images and seeds:"]
    lines += [f"- {said}" for question in table.questions if (said := table.sentence(question))]
    return lines


def means(results: Results) -> Results:
    """Without the single runs, for a page: the reference and the means of the arms."""
    table = Controlled(Index(results))
    return results.where(model=["", table.reference, *table.arms]) if table else results
