"""OOD detection: how well each score tells sets of other classes from the first ID set."""

from __future__ import annotations

import numpy as np

from qclip.metrics import metric, roc_curve_points
from qclip.metrics.detection import Ranking

from ..embedded import Embeddings
from ..outputs import Outputs
from ..request import Condition, Request
from ..writer import Page, Writer

DETECTION = ("auroc", "fpr95", "fpr95_ood_positive")
ROC_GRID = np.unique(np.round(np.concatenate([np.arange(0, 0.1, 0.005), np.arange(0.1, 1.0001, 0.02), [1.0]]), 3))
Key = tuple[str, str]  # score, and the model that it learned from where that is not its own
Found = dict[Key, dict[str, dict[str, np.ndarray]]]  # -> model -> metric -> [1 + replicates]


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
            if of.data.digest == inside.set.data.digest:
                out.note(f"{of.name}: its images are those of the ID set, so that no score can tell them apart")
            found: Found = {}
            for model in page.models:
                inner, outer = _columns(ids[model], page.models[0]), _columns(outputs[model], page.models[0])
                for key, values in outer.items():
                    drawn = Ranking(inner[key], values).on(list(definitions.values()), id_counts, ood_counts)
                    found.setdefault(key, {})[model] = dict(zip(definitions, drawn, strict=True))
            _write(page, found)
            for model in page.models:
                for score, values in outputs[model].ood.items():
                    fpr, tpr = roc_curve_points(ids[model].ood[score], values, ROC_GRID)
                    page.curve(model, "roc", {"fpr": fpr, "tpr": tpr}, score=score)
            everything.append(found)
        if len(everything) > 1:  # the mean over sets, not of pooled scores
            mean: Found = {
                key: {
                    model: {
                        name: np.mean([found[key][model][name] for found in everything], axis=0) for name in DETECTION
                    }
                    for model in by_model
                }
                for key, by_model in everything[0].items()
            }
            _write(out.page(f"mean of {len(everything)} OOD sets", "ood-mean"), mean)


def _columns(outputs: Outputs, reference: str) -> dict[Key, np.ndarray]:
    own = {(score, ""): values for score, values in outputs.ood.items()}
    return own | {(score, reference): values for score, values in outputs.borrowed.items()}


def _write(page: Page, found: Found) -> None:
    """`axis="fitted_on"`: a score that learned from the embeddings of the reference, `at`, and judges its own model's
    by them, as a deployed detector would that nobody fits again."""
    for (score, learned), by_model in found.items():
        if by_model.keys() == set(page.models):
            where = {"axis": "fitted_on", "at": learned} if learned else {}
            for name in DETECTION:
                page.estimates(name, {model: by_model[model][name] for model in page.models}, score=score, **where)
