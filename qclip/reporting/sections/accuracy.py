"""Accuracy and calibration on the ID sets."""

from __future__ import annotations

from .. import labelled, units
from ..index import Cohort, Index
from ..parts import Panel, Table
from ..verdicts import Answers, Comparison, Question, Verdict, confidence_said
from . import Section

CALIBRATION = ("ece", "ece_ts", "signed_gap", "nll", "brier")
MOST_SUBSETS = 4


class AccuracySection(Section):
    name = "accuracy"
    title = "Accuracy and calibration"
    intro = (
        "Bars show how often the model was right at each confidence; the diagonal is perfect calibration. Where "
        "confidence exceeds accuracy the gap is hatched orange, where it falls short, blue. A dot is where the "
        "reference stood in that bin, a line the way from there. Below is the number of "
        "images in each bin: bins with few images wobble."
    )
    absent = "No labelled set was evaluated, so there is neither accuracy nor calibration."

    def questions(self, index: Index) -> list[Question]:
        out: list[Question] = []
        for name in index.id_sets:
            out += [Question("Accuracy", "top1", name, leading=True), Question("Accuracy", "balanced_accuracy", name)]
            parts = index.parts(name)
            if name not in index.spurious_sets and len(parts) <= MOST_SUBSETS:
                out += [Question("Accuracy", "top1", name, part) for part in parts]
        for name in index.id_sets:
            out += [Question("Calibration", metric, name, leading=metric == "ece") for metric in CALIBRATION]
        return out

    def lines(self, index: Index) -> dict[str, list[Question]]:
        leading = [question for question in self.questions(index) if question.leading]
        return {axis: [q for q in leading if q.axis == axis] for axis in ("Accuracy", "Calibration")}

    def panels(self, index: Index) -> list[Panel]:
        return labelled.trajectory(index, index.id_sets) + labelled.diagrams(index, index.id_sets)

    def tables(self, index: Index) -> list[Table]:
        return labelled.tables(index, index.id_sets) + labelled.details(index, index.id_sets)

    def about(self, index: Index, cohort: Cohort, model: str, answers: Answers) -> list[str]:
        return _bound(model, answers) + _calibration(index, cohort, model, answers)


def _bound(model: str, answers: Answers) -> list[str]:
    """How large a loss of accuracy an open verdict still allows."""
    for question, by_model in answers.items():
        answer: Comparison = by_model[model]
        wanted = question.leading and question.metric == "top1" and question.axis == "Accuracy"
        if wanted and answer.verdict is Verdict.OPEN and answer.low is not None and answer.low < 0:
            worst = units.metric("top1").difference(answer.low).lstrip(units.MINUS)
            return [
                f"A loss of top-1 on {question.where} beyond {worst} points is unlikely (lower end of its interval)."
            ]
    return []


def _calibration(index: Index, cohort: Cohort, model: str, answers: dict[Question, dict[str, Comparison]]) -> list[str]:
    """Which way confidence is off, and whether one scalar explains a change of ECE."""
    found = {(q.metric, q.set): by_model[model] for q, by_model in answers.items() if q.axis == "Calibration"}
    out = []
    for name in index.id_sets[:1]:
        gap = index.row(model, "signed_gap", set=name)
        if gap is not None and gap["value"] is not None:
            out.append(
                f"It is {confidence_said(gap['value'], gap['low'], gap['high'])}; "
                f"{cohort.reference} is {_reference_confidence(index, cohort, name)}."
            )
        ece, fitted = found.get(("ece", name)), found.get(("ece_ts", name))
        if ece is None or ece.verdict not in (Verdict.BETTER, Verdict.WORSE):
            continue
        if fitted is None or fitted.verdict is Verdict.MISSING:
            out.append("Whether a fitted temperature would undo the change of ECE is open: none was fitted.")
        elif fitted.verdict in (Verdict.OPEN, Verdict.SAME):
            out.append(
                "With a temperature fitted to each model the difference in ECE can no longer be told: "
                "one scalar may explain it."
            )
        elif fitted.verdict is ece.verdict:
            out.append("The difference in ECE stays with a temperature fitted to each model.")
        else:
            out.append("With a temperature fitted to each model the difference in ECE turns round.")
    return out


def _reference_confidence(index: Index, cohort: Cohort, name: str) -> str:
    gap = index.row(cohort.reference, "signed_gap", set=name)
    return "not measured" if gap is None else confidence_said(gap["value"], gap["low"], gap["high"])
