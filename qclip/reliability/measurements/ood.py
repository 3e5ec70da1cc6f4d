"""OOD detection: how well each score tells sets of other classes from the first ID set."""

from __future__ import annotations

import numpy as np

from qclip.metrics import metric, roc_curve_points
from qclip.metrics.detection import Ranking

from ..embedded import Embeddings
from ..request import Condition, Request
from ..writer import Page, Writer

DETECTION = ("auroc", "fpr95", "fpr95_ood_positive")
ROC_GRID = np.unique(np.round(np.concatenate([np.arange(0, 0.1, 0.005), np.arange(0.1, 1.0001, 0.02), [1.0]]), 3))
Found = dict[tuple[str, str], dict[str, np.ndarray]]  # (model, score) -> metric -> [1 + replicates]


class Ood:
    name, label = "ood", "OOD detection"

    def wants(self, request: Request) -> list[Condition]:
        if not request.ood:
            return []
        return [Condition(each, scores=True) for each in (request.of("id")[0], *request.ood)]

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        if not request.ood:
            return
        inside, *outside = self.wants(request)
        out.note(f"OOD detection: ID is {inside.set.name}")
        ids = embedded.outputs(inside)
        id_counts = out.resampling(inside.set.data.digest, len(embedded.indices(inside))).bootstrap()
        definitions = {name: of for name in DETECTION if (of := metric(name).of) is not None}
        everything: list[Found] = []
        for condition in outside:
            of, outputs, n = condition.set, embedded.outputs(condition), len(embedded.indices(condition))
            # the word keeps an OOD set that equals the ID set from being resampled like it
            ood_counts = out.resampling(f"ood {of.data.digest}", n).bootstrap()
            page = out.page(of.name, of.role, n)
            found: Found = {}
            for model in page.models:
                for score, values in outputs[model].ood.items():
                    ranking = Ranking(ids[model].ood[score], values)
                    drawn = ranking.on(list(definitions.values()), id_counts, ood_counts)
                    found[model, score] = dict(zip(definitions, drawn, strict=True))
            _write(page, found)
            for model, score in found:
                fpr, tpr = roc_curve_points(ids[model].ood[score], outputs[model].ood[score], ROC_GRID)
                page.curve(model, "roc", {"fpr": fpr, "tpr": tpr}, score=score)
            everything.append(found)
        if len(everything) > 1:  # the mean over sets, not of pooled scores
            mean = {
                key: {name: np.mean([found[key][name] for found in everything], axis=0) for name in DETECTION}
                for key in everything[0]
            }
            _write(out.page(f"mean of {len(everything)} OOD sets", "ood-mean"), mean)


def _write(page: Page, found: Found) -> None:
    for score in dict.fromkeys(score for _, score in found):
        for name in DETECTION:
            page.estimates(name, {model: found[model, score][name] for model in page.models}, score=score)
