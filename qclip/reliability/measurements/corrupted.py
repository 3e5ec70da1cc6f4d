"""Accuracy and calibration under corruptions, on one sample of every ID set.

Means over a group of corruptions stand under the group's name where all of its corruptions were evaluated. There is no
mean corruption error (mCE): its denominators are AlexNet's errors on ImageNet-C, whose frost we do not have. What can
be said anywhere is `error_ratio`: a model's mean error over that of its reference.
"""

from __future__ import annotations

import numpy as np

from qclip.data.corruptions import GROUPS, PUBLISHED, SEVERITIES, members

from ..embedded import Embeddings
from ..request import Condition, EvalSet, Request
from ..writer import WHOLE, Page, Writer


class Corrupted:
    name, label = "corrupted", "Corruption robustness"

    def wants(self, request: Request) -> list[Condition]:
        if not request.corruptions:
            return []
        out = []
        for each in request.of("id"):
            sample = each.take(request.sample(each))
            out += [Condition(each), *(c for name in request.corruptions for c in _graded(request, sample, name))]
        return out

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """Metrics at each severity (0: the same images without corruption), their means over those above 0, and the
        means of those over groups. One resampling serves all: they are the same images."""
        for each in request.of("id"):
            rows = request.sample(each)
            sample, clean = each.take(rows), Condition(each)
            there = np.flatnonzero(np.isin(embedded.indices(clean), rows))
            if request.corruptions and len(rows) < len(each.data):
                out.note(
                    f"{each.name}: corruptions are on a fixed sample of {len(rows)} of {len(each.data)} images "
                    f"(seed {request.seed})"
                )
            if request.corruptions and request.severities != SEVERITIES:
                shown = ", ".join(map(str, request.severities))
                out.note(f"{each.name}: means over the severities of a corruption are over {shown} alone")
            means: dict[str, Means] = {}
            for name in request.corruptions:
                found = {0: {model: o.take(there) for model, o in embedded.outputs(clean).items()}}
                found |= {c.severity: embedded.outputs(c) for c in _graded(request, sample, name)}
                page = out.page(each.name, "corrupted", len(there), sample.data.digest, name)
                drawn = {severity: page.draw(outputs) for severity, outputs in found.items()}
                for severity, values in drawn.items():
                    page.labelled(values, severity=severity)
                means[name] = {
                    metric: {
                        model: np.mean([drawn[s][model][WHOLE, metric] for s in request.severities], axis=0)
                        for model in page.models
                    }
                    for metric in ("top1", "ece", "nll")
                    if (WHOLE, metric) in drawn[0][page.models[0]]  # of one class there is nothing to calibrate
                }
                _write(page, means[name])
            for many in (PUBLISHED, *GROUPS):
                within = members(many)
                if set(within) <= set(means):
                    page = out.page(each.name, "corrupted", len(there), sample.data.digest, many)
                    _write(page, _mean([means[name] for name in within]))


Means = dict[str, dict[str, np.ndarray]]  # metric -> model -> [1 + replicates + jackknife]


def _mean(of: list[Means]) -> Means:
    return {
        metric: {model: np.mean([each[metric][model] for each in of], axis=0) for model in of[0][metric]}
        for metric in of[0]
    }


def _write(page: Page, means: Means) -> None:
    for metric, drawn in means.items():
        page.estimates(f"mean_{metric}", drawn)
    reference, *others = page.models
    errors = {model: 1 - top1 for model, top1 in means["top1"].items()}
    for model in others:
        against = np.where(errors[reference] > 0, errors[reference], np.nan)
        page.estimate(model, "error_ratio", errors[model] / against, reference=reference)


def _graded(request: Request, sample: EvalSet, corruption: str) -> list[Condition]:
    return [Condition(sample, corruption, severity) for severity in request.severities]
