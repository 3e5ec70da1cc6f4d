"""Accuracy and calibration on labelled sets as they are."""

from __future__ import annotations

import numpy as np

from qclip.metrics.bins import diagram

from ..embedded import Embeddings
from ..request import Condition, Request
from ..writer import Writer


class Clean:
    name, label = "clean", "Accuracy and calibration"

    def wants(self, request: Request) -> list[Condition]:
        return [Condition(each) for each in request.of("id", "shift")]

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        for condition in self.wants(request):
            outputs = embedded.outputs(condition)
            of = condition.set
            page = out.page(of.name, of.role, len(embedded.indices(condition)), of.data.digest)
            page.labelled(page.draw(outputs))
            if len(of.classes) < 5:
                out.note(f"{of.name}: top5 is undefined with {len(of.classes)} classes")
            for model, found in outputs.items():
                page.add(model, "temperature", value=embedded.temperatures[model])
                bins = diagram(found.confidence, found.right)
                filled = np.flatnonzero(bins.count)
                columns = {name: getattr(bins, name)[filled] for name in ("accuracy", "confidence", "count")}
                page.curve(model, "reliability", {"bin": filled} | columns)
