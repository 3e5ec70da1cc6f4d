"""The overview: a line for each axis, with one mark for each variant, and what they say together in a few sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from . import units
from .index import Cohort, Index
from .verdicts import Answers, Comparison, Question, Verdict

NAMED = 6  # variants that a sentence names


@dataclasses.dataclass(frozen=True)
class Mark:
    """One variant on one axis. said: the number behind the verdict; whole: with its interval and where it was taken."""

    verdict: Verdict
    said: str = ""
    whole: str = ""
    size: float = 0.0  # how far from no difference, to find the worst


MISSING = Mark(Verdict.MISSING)


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis. marks: by variant. basis: what was compared, on which sets."""

    name: str
    basis: str
    marks: dict[str, Mark]

    @property
    def measured(self) -> bool:
        return any(mark.verdict is not Verdict.MISSING for mark in self.marks.values())

    def having(self, *verdicts: Verdict) -> list[str]:
        return [model for model, mark in self.marks.items() if mark.verdict in verdicts]

    @property
    def counts(self) -> list[tuple[Verdict, int]]:
        """Verdicts with how many variants have them, in the order of `Verdict`."""
        return [(verdict, n) for verdict in Verdict if (n := len(self.having(verdict)))]

    @property
    def worst(self) -> str:
        """The variant that is worst here, with its number; "" where none is worse."""
        worse = self.having(Verdict.WORSE, Verdict.MIXED)
        return max(worse, key=lambda model: self.marks[model].size, default="")


def axis(name: str, cohort: Cohort, questions: Sequence[Question], answers: Answers) -> Axis:
    """The verdicts of these questions as one line: of several sets the decided ones speak, and they may disagree."""
    asked = [question for question in questions if question in answers]
    basis = units.words(list(dict.fromkeys(question.name for question in asked)), "or")
    places = list(dict.fromkeys(question.place for question in asked))
    shown = f"{basis}, {_listed(places)}" if places else ""
    return Axis(name, shown, {model: mark([answers[q][model] for q in asked]) for model in cohort.variants})


def _listed(names: list[str], most: int = 3) -> str:
    return (
        units.words(names) if len(names) <= most else f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    )


def mark(found: Sequence[Comparison]) -> Mark:
    """Better or worse where an interval says so on any set, both where sets disagree, equal where all are."""
    known = [each for each in found if each.verdict is not Verdict.MISSING]
    if not known:
        return MISSING
    decided = {each.verdict for each in known} & {Verdict.BETTER, Verdict.WORSE}
    if len(decided) == 2:
        verdict = Verdict.MIXED
    elif decided:
        (verdict,) = decided
    else:
        verdict = Verdict.SAME if all(each.verdict is Verdict.SAME for each in known) else Verdict.OPEN
    speaking = [each for each in known if each.verdict in decided] or known
    if verdict is Verdict.MIXED:
        speaking = [each for each in speaking if each.verdict is Verdict.WORSE]
    largest = max(speaking, key=lambda each: abs(each.value or 0.0))
    where = f" on {largest.question.place}" if len(known) > 1 else ""
    unit = f" {largest.question.measure.unit}" if largest.question.measure.unit else ""
    return Mark(verdict, largest.difference + unit, largest.said + where, abs(largest.value or 0.0))


def sentences(index: Index, cohort: Cohort, lines: Sequence[Axis], answers: Answers) -> list[str]:
    """The verdict on all variants of one comparison: which may be taken, what is lost and won, what is not known."""
    variants, known = cohort.variants, [axis for axis in lines if axis.measured]
    if not known:
        return ["Nothing was measured on which a variant could be judged."]
    harmed = {model for axis in known for model in axis.having(Verdict.WORSE, Verdict.MIXED)}
    fine = [model for model in variants if model not in harmed]
    out = [_harmless(index, cohort, fine)]
    behind = {
        model: n
        for model in fine
        if (n := sum(by_model[model].verdict is Verdict.WORSE for by_model in answers.values()))
    }
    if behind:
        parts = _listed([f"{cohort.short(model)} ({n})" for model, n in behind.items()], NAMED)
        out.append(f"Worse all the same in measures that make no line, counted here and found below: {parts}.")
    for verdicts, lead in (((Verdict.WORSE, Verdict.MIXED), "Worse in"), ((Verdict.BETTER,), "Better in")):
        told = [(axis, axis.having(*verdicts)) for axis in known]
        parts = [_part(axis, models, cohort) for axis, models in told if models]
        if parts:
            out.append(f"{lead} {units.words(parts)}.")
    missing = [units.small(axis.name) for axis in lines if not axis.measured]
    if missing:
        out.append(f"Not measured: {units.words(missing)}.")
    return out


def _part(axis: Axis, models: list[str], cohort: Cohort) -> str:
    largest = max(models, key=lambda model: axis.marks[model].size)
    said = axis.marks[largest].said
    if len(cohort.variants) == 1:
        return f"{units.small(axis.name)} ({said})" if said else units.small(axis.name)
    most = f"most in {cohort.short(largest)}" if len(models) > 1 else cohort.short(largest)
    return f"{units.small(axis.name)} in {len(models)} of {len(cohort.variants)} ({most}{f', {said}' if said else ''})"


def _harmless(index: Index, cohort: Cohort, fine: list[str]) -> str:
    caution = "an interval that holds 0 shows no harm, and does not prove that there is none"
    if not fine:
        only = len(cohort.variants) == 1
        return (
            f"{cohort.short(cohort.variants[0])} is worse in something."
            if only
            else "Every variant is worse in something."
        )
    sizes = {model: size for model in fine if (size := index.value(model, "model_bytes")) is not None}
    base = index.value(cohort.reference, "model_bytes")
    smallest = min(sizes, key=lambda model: sizes[model], default="")
    named = _listed([cohort.short(model) for model in fine], NAMED)
    ratio = f", {sizes[smallest] / base:.2f}{units.TIMES} the size" if smallest and base else ""
    if len(cohort.variants) == 1:
        return f"{named} is not shown to be worse on any line below{ratio}; {caution}."
    least = f"; the smallest of them is {cohort.short(smallest)}{ratio}" if smallest and len(fine) > 1 else ratio
    verb = "is" if len(fine) == 1 else "are"
    return (
        f"{len(fine)} of {len(cohort.variants)} variants {verb} not shown to be worse on any line below: "
        f"{named}{least}; {caution}."
    )
