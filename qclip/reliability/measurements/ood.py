"""OOD detection: how well each score tells sets of other classes from the first ID set."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from qclip.metrics import aupr, delong, metric, relative_drop, roc_curve_points, threshold_at
from qclip.metrics.detection import TPR, Block, Ranking
from qclip.metrics.precision import Positive

from ..embedded import Embeddings
from ..outputs import Outputs
from ..request import Condition, Request
from ..wins import write_wins
from ..writer import Page, Writer

DETECTION = ("auroc", "fpr95", "fpr95_ood_positive")
DETAILED = ("aupr_in", "aupr_out")  # of scores that learned from their own model, if they learned
TRAPEZOIDS: dict[str, Positive] = {"aupr_in_trapezoid": "id", "aupr_out_trapezoid": "ood"}
TRANSFERRED = {"tpr_transferred": Block.id_share_at, "fpr_transferred": Block.ood_share_at}
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
        """Metrics of each score on each set (AUPR by trapezoids without an interval), DeLong's test, relative drops,
        what the reference's thresholds give, and curves `roc`; means over sets where there are several; joint wins of
        the variants."""
        if not request.ood:
            return
        inside, *outside = self.wants(request)
        out.note(f"OOD detection: ID is {inside.set.name}")
        ids, n_id = embedded.outputs(inside), len(embedded.indices(inside))
        thresholds = _thresholds(request, embedded, out)
        everything: list[Found] = []
        for condition in outside:
            of, outputs, n = condition.set, embedded.outputs(condition), len(embedded.indices(condition))
            page = out.page(of.name, of.role, n)
            out.note(f"{of.name}: AUPR is of {n_id} ID and {n} OOD images, and depends on their ratio")
            if of.data.digest == inside.set.data.digest:
                out.note(f"{of.name}: its images are those of the ID set, so that no score can tell them apart")
            # the word keeps an OOD set that equals the ID set from being resampled like it
            drawn = _Drawn(out, (inside.set.data.digest, n_id), (f"ood {of.data.digest}", n), thresholds)
            found: Found = {}
            for model in page.models:
                inner, outer = _columns(ids[model], page.models[0]), _columns(outputs[model], page.models[0])
                _constant(page, model, inner, outer)
                for key, by_metric in drawn.of(inner, outer).items():
                    found.setdefault(key, {})[model] = by_metric
            _write(page, found)
            _compare(page, ids, outputs)
            for model in page.models:
                for score, values in outputs[model].ood.items():
                    fpr, tpr = roc_curve_points(ids[model].ood[score], values, ROC_GRID)
                    page.curve(model, "roc", {"fpr": fpr, "tpr": tpr}, score=score)
                    for name, positive in TRAPEZOIDS.items():  # to compare with other tools' tables; no more is said
                        area = aupr(ids[model].ood[score], values, positive, "trapezoid")
                        page.add(model, name, value=float(area), score=score)
            everything.append(found)
        if len(everything) > 1:  # the mean over sets, not of pooled scores
            page, found = out.page(f"mean of {len(everything)} OOD sets", "ood-mean"), _mean(everything)
            _write(page, found)
        if len(request.models) > 1 and len(inside.set.classes) >= metric("ece").classes:
            of = inside.set
            labelled = out.page(of.name, of.role, n_id, of.data.digest).draw(ids, names=("top1", "ece"))
            own = {score: by_model for (score, learned), by_model in found.items() if not learned}
            whole = {score: by_model for score, by_model in own.items() if by_model.keys() == set(request.models)}
            write_wins(
                page,
                labelled,
                {
                    score: {model: each["auroc"] for model, each in by_model.items()}
                    for score, by_model in whole.items()
                },
            )


class _Drawn:
    """Every detection metric of one pair of sets on every resample, or as it was kept."""

    def __init__(
        self, out: Writer, inside: tuple[str, int], outside: tuple[str, int], thresholds: Mapping[str, float]
    ) -> None:
        self.out, self.sets, self.thresholds = out, (inside, outside), thresholds

    def of(self, inner: Mapping[Key, np.ndarray], outer: Mapping[Key, np.ndarray]) -> dict[Key, dict[str, np.ndarray]]:
        keys = list(outer)

        def compute() -> dict[str, np.ndarray]:
            id_counts, ood_counts = (self.out.resampling(*each).bootstrap() for each in self.sets)
            out: dict[str, np.ndarray] = {}
            for i, key in enumerate(keys):
                metrics = self._metrics(key)
                values = Ranking(inner[key], outer[key]).on(list(metrics.values()), id_counts, ood_counts)
                out |= {f"{i} {name}": drawn for name, drawn in zip(metrics, values, strict=True)}
            return out

        digest = hashlib.sha256()
        for key in keys:
            digest.update(f"{key}".encode() + inner[key].tobytes() + outer[key].tobytes())
        kept = self.out.kept.fill(
            1 + self.out.replicates,
            (*DETECTION, *DETAILED, *TRANSFERRED),
            compute,
            scores=digest.hexdigest(),
            sets=self.sets,
            thresholds=dict(self.thresholds),
        )
        found: dict[Key, dict[str, np.ndarray]] = {key: {} for key in keys}
        for name, drawn in kept.items():
            at, which = name.split(" ", 1)
            found[keys[int(at)]][which] = drawn
        return found

    def _metrics(self, key: Key) -> dict[str, Callable[[Block], np.ndarray]]:
        score, borrowed = key
        names = DETECTION if borrowed else (*DETECTION, *DETAILED)
        out = {name: of for name in names if (of := metric(name).of) is not None}
        if not borrowed and score in self.thresholds:
            at = self.thresholds[score]
            out |= {name: functools.partial(of, threshold=at) for name, of in TRANSFERRED.items()}
        return out


def _thresholds(request: Request, embedded: Embeddings, out: Writer) -> dict[str, float]:
    """By score, what 95 % of the dev set's images reach with the reference."""
    if request.dev is None:
        return {}
    reference = request.models[0]
    where = f"the score that {TPR:.0%} of {request.dev.name} reach with {reference}"
    out.note(f"tpr_transferred and fpr_transferred are at {where}")
    return {score: threshold_at(each, TPR) for score, each in embedded.outputs(request.dev)[reference].ood.items()}


def _columns(outputs: Outputs, reference: str) -> dict[Key, np.ndarray]:
    own = {(score, ""): values for score, values in outputs.ood.items()}
    return own | {(score, reference): values for score, values in outputs.borrowed.items()}


def _constant(page: Page, model: str, inner: Mapping[Key, np.ndarray], outer: Mapping[Key, np.ndarray]) -> None:
    for key, values in outer.items():
        if len(values) and np.ptp(np.concatenate([inner[key], values])) == 0:
            page.writer.note(f"{page.set}: score {key[0]!r} of {model} is the same for all images and tells nothing")


def _compare(page: Page, ids: Mapping[str, Outputs], outputs: Mapping[str, Outputs]) -> None:
    """DeLong's test of each model against the reference, by each score of its own."""
    reference, *others = page.models
    for score in outputs[reference].ood if others else ():
        with_it = [model for model in page.models if score in outputs[model].ood]
        found = delong([ids[m].ood[score] for m in with_it], [outputs[m].ood[score] for m in with_it])
        for i, model in enumerate(with_it[1:], 1):
            page.add(model, "delong_p", value=found.p(i), score=score, reference=reference)


def _mean(everything: list[Found]) -> Found:
    return {
        key: {
            model: {name: np.mean([found[key][model][name] for found in everything], axis=0) for name in by_metric}
            for model, by_metric in by_model.items()
        }
        for key, by_model in everything[0].items()
    }


def _write(page: Page, found: Found) -> None:
    """`axis="fitted_on"`: a score that learned from the embeddings of the reference, `at`, and judges its own model's
    by them, as a deployed detector would that nobody fits again."""
    reference, *others = page.models
    for (score, learned), by_model in found.items():
        if by_model.keys() != set(page.models):
            continue
        where = {"axis": "fitted_on", "at": learned} if learned else {}
        for name in _shared(by_model.values()):
            page.estimates(name, {model: by_model[model][name] for model in page.models}, score=score, **where)
        for model in others if not learned else ():
            lost = relative_drop(by_model[reference]["auroc"], by_model[model]["auroc"])
            page.estimate(model, "relative_drop_auroc", lost, score=score, reference=reference)


def _shared(by_model: Iterable[dict[str, np.ndarray]]) -> list[str]:
    first, *rest = by_model
    return [name for name in first if all(name in each for each in rest)]
