"""Accuracy and calibration under corruptions, on one sample of every ID set."""

from __future__ import annotations

import numpy as np

from qclip.data.corruptions import SEVERITIES

from ..embedded import Embeddings
from ..request import Condition, EvalSet, Request
from ..writer import WHOLE, Writer


class Corrupted:
    name, label = "corrupted", "Corruption robustness"

    def wants(self, request: Request) -> list[Condition]:
        if not request.corruptions:
            return []
        out = []
        for each in request.of("id"):
            sample = each.take(request.sample(each))
            out += [Condition(each), *(c for name in request.corruptions for c in _severities(sample, name))]
        return out

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """Metrics at each severity (0: the same images without corruption), and their means over those above 0. One
        resampling serves all: they are the same images."""
        for each in request.of("id"):
            rows = request.sample(each)
            sample, clean = each.take(rows), Condition(each)
            there = np.flatnonzero(np.isin(embedded.indices(clean), rows))
            for name in request.corruptions:
                found = {0: {model: o.take(there) for model, o in embedded.outputs(clean).items()}}
                found |= {c.severity: embedded.outputs(c) for c in _severities(sample, name)}
                if len(rows) < len(each.data):
                    out.note(
                        f"{each.name}: {name} is on a fixed sample of {len(rows)} of {len(each.data)} images "
                        f"(seed {request.seed})"
                    )
                page = out.page(each.name, "corrupted", len(there), sample.data.digest, name)
                drawn = {severity: page.draw(outputs) for severity, outputs in found.items()}
                for severity, values in drawn.items():
                    page.labelled(values, severity=severity)
                for metric in ("top1", "ece", "nll"):
                    means = {
                        model: np.mean([drawn[s][model][WHOLE, metric] for s in SEVERITIES], axis=0)
                        for model in page.models
                    }
                    page.estimates(f"mean_{metric}", means)


def _severities(sample: EvalSet, corruption: str) -> list[Condition]:
    return [Condition(sample, corruption, severity) for severity in SEVERITIES]
