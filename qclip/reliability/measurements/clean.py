"""Accuracy, calibration and selective prediction on labelled sets as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qclip.metrics import metric, relative_drop, risk_coverage, threshold_at
from qclip.metrics.bins import diagram
from qclip.metrics.classwise import DEFINITIONS, KEPT
from qclip.metrics.predictions import DETAILED, LABELLED
from qclip.metrics.resampled import Resampled
from qclip.metrics.selective import accepted, accepted_risk

from ..embedded import Embeddings
from ..outputs import Outputs
from ..request import Condition, EvalSet, Request
from ..writer import WHOLE, Drawn, Page, Writer

COVERAGE = 0.8  # of the dev set, at the threshold that is then kept
POINTS = 100  # of a risk-coverage curve
TUNED = ("ece_proxy", "nll_proxy")
TRANSFERRED: Mapping[str, Callable[[Outputs, float], Resampled]] = {
    "coverage_transferred": lambda o, at: accepted(o.confidence, at),
    "risk_transferred": lambda o, at: accepted_risk(o.confidence, o.right, at),
}


class Clean:
    name, label = "clean", "Accuracy and calibration"

    def wants(self, request: Request) -> list[Condition]:
        return [Condition(each) for each in request.of("id", "shift")]

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """`LABELLED` and `DETAILED`, relative drops, and what the reference's threshold of 80 % coverage on the dev set
        gives; `chance_top1`, which no model has to learn anything for; curves `reliability` and `risk_coverage`."""
        names = [name for name in (*LABELLED, *DETAILED) if embedded.proxies or name not in TUNED]
        reference, *others = request.models
        at = None
        if request.dev is not None:
            at = threshold_at(embedded.outputs(request.dev)[reference].confidence, COVERAGE)
        for condition in self.wants(request):
            outputs = embedded.outputs(condition)
            of = condition.set
            page = out.page(of.name, of.role, len(embedded.indices(condition)), of.data.digest)
            more = {} if at is None else {name: _at(of_it, at) for name, of_it in TRANSFERRED.items()}
            page.add("", "chance_top1", value=1 / len(of.classes))
            drawn = page.draw(outputs, None, names, more, threshold=at)
            page.labelled(drawn, WHOLE, [*names, *more])
            _drops(page, drawn, reference, others)
            _remarks(of, outputs[reference], names, out)
            for model, found in outputs.items():
                page.add(model, "temperature", value=embedded.temperatures[model])
                if model in embedded.proxies:
                    page.add(model, "temperature_proxy", value=embedded.proxies[model])
                _curves(page, model, found)
        if at is not None and request.dev is not None:
            out.note(
                f"coverage_transferred and risk_transferred are at the confidence that {COVERAGE:.0%} of "
                f"{request.dev.name} reach with {reference}"
            )


def _at(of: Callable[[Outputs, float], Resampled], threshold: float) -> Callable[[Outputs], Resampled]:
    return lambda outputs: of(outputs, threshold)


def _drops(page: Page, drawn: Drawn, reference: str, others: list[str]) -> None:
    for model in others:
        lost = relative_drop(drawn[reference][WHOLE, "top1"], drawn[model][WHOLE, "top1"])
        page.estimate(model, "relative_drop", lost, reference=reference)


def _remarks(of: EvalSet, outputs: Outputs, names: list[str], out: Writer) -> None:
    """What the number of classes and of their images leaves undefined."""
    classes = len(of.classes)
    few = [name for name in names if metric(name).classes > classes]
    if few:
        kind = "class" if classes == 1 else "classes"
        out.note(f"{of.name}: {', '.join(few)} {'is' if len(few) == 1 else 'are'} undefined with {classes} {kind}")
    empty = np.flatnonzero(np.bincount(outputs.labels, minlength=classes) == 0)
    if len(empty):
        shown = ", ".join(of.classes[k] for k in empty[:5]) + (" ..." if len(empty) > 5 else "")
        out.note(
            f"{of.name}: {len(empty)} of {classes} classes have no image ({shown}): balanced accuracy is of the rest"
        )
    if classes > KEPT:
        out.note(f"{of.name}: {' and '.join(DEFINITIONS)} have no intervals with more than {KEPT} classes")


def _curves(page: Page, model: str, found: Outputs) -> None:
    bins = diagram(found.confidence, found.right)
    filled = np.flatnonzero(bins.count)
    columns = {name: getattr(bins, name)[filled] for name in ("accuracy", "confidence", "count")}
    page.curve(model, "reliability", {"bin": filled} | columns)
    coverage, risk, threshold = risk_coverage(found.confidence, found.right)
    shown = np.unique(np.searchsorted(coverage, np.linspace(coverage[0], 1, POINTS)).clip(0, len(coverage) - 1))
    page.curve(
        model, "risk_coverage", {"coverage": coverage[shown], "risk": risk[shown], "threshold": threshold[shown]}
    )
