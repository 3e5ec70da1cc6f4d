"""A linear probe: what a logistic regression makes of the image embeddings, whatever the text tower does."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from qclip.metrics.arrays import Array
from qclip.metrics.resampled import evaluate_on, mean_of
from qclip.seeds import generator

from ..embedded import Embeddings
from ..request import Condition, EvalSet, Request
from ..writer import Writer

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

MOST = 10_000  # training images, unless all are asked for
COARSE = tuple(10.0**e for e in range(-6, 7, 2))
HELD_OUT = 0.2
ITERATIONS = 1000


class Probe:
    name, label = "probe", "Linear probe"

    def wants(self, request: Request) -> list[Condition]:
        train = [each for each in request.of("train") if each.labels is not None]
        return [Condition(each, vectors=True) for each in (*train, *request.of("id", "shift"))] if train else []

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """Top-1 of an L2-regularized logistic regression (scikit-learn, LBFGS) on unit embeddings as they are: each
        model's own on both sides. Its C is the best on a fifth of the training images that is held out, then it is
        fitted to all of them."""
        if not (wanted := self.wants(request)):
            return
        train, *conditions = wanted
        kept = embedded.indices(train)
        assert train.set.labels is not None
        labels = train.set.labels[kept]
        rows = _chosen(request, train.set, len(kept), out)
        labels = labels[rows]
        order = generator(request.seed, f"probe {train.set.data.digest}").permutation(len(rows))
        if len(np.unique(labels[_parts(order)[0]])) < 2:
            out.note(f"{train.set.name}: the linear probe is left out, it needs more training images of more classes")
            return
        vectors = embedded.vectors(train)
        right: dict[str, dict[str, np.ndarray]] = {}
        for model in request.models:
            fitted = fit(vectors[model][rows], labels, order)
            out.page(train.set.name, "train", len(rows)).add(model, "probe_c", value=fitted.C)
            if max(fitted.n_iter_) >= ITERATIONS:
                out.note(f"{model}: the linear probe (C = {fitted.C:g}) was stopped after {ITERATIONS} iterations")
            for condition in conditions:
                assert condition.set.labels is not None
                truth = condition.set.labels[embedded.indices(condition)]
                right.setdefault(condition.set.name, {})[model] = (
                    fitted.predict(embedded.vectors(condition)[model]) == truth
                )
        for condition in conditions:
            of, n = condition.set, len(embedded.indices(condition))
            page = out.page(of.name, of.role, n, of.data.digest)
            drawn = out.resampling(of.data.digest, n).bootstrap()
            values = evaluate_on([mean_of(right[of.name][model]) for model in request.models], drawn)
            page.estimates("probe_top1", dict(zip(request.models, values, strict=True)))


def _chosen(request: Request, of: EvalSet, n: int, out: Writer) -> np.ndarray:
    """Positions of the training images that are used: all, or a fixed seeded choice."""
    if request.full or n <= MOST:
        return np.arange(n)
    out.note(f"{of.name}: the linear probe learns from a fixed sample of {MOST} of {n} images (seed {request.seed})")
    return np.sort(generator(request.seed, f"probe sample {of.data.digest}").permutation(n)[:MOST])


def _parts(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    held = max(1, round(HELD_OUT * len(order)))
    return order[:-held], order[-held:]


def fit(features: Array, labels: np.ndarray, order: np.ndarray) -> LogisticRegression:
    """The last fifth of `order` is held out for the choice of C: seven values from 1e-6 to 1e6, then steps of 10 and of
    sqrt(10) around the best; of equal ones the smallest."""
    part, rest = _parts(order)
    scored: dict[float, float] = {}

    def score(c: float) -> float:
        if c not in scored:
            scored[c] = float(
                np.mean(_regression(features[part], labels[part], c).predict(features[rest]) == labels[rest])
            )
        return scored[c]

    best = max(COARSE, key=lambda c: (score(c), -c))
    for step in (10.0, 10.0**0.5):
        best = max((best / step, best, best * step), key=lambda c: (score(c), -c))
    return _regression(features, labels, best)


def _regression(features: Array, labels: np.ndarray, c: float) -> LogisticRegression:
    from sklearn.exceptions import ConvergenceWarning  # a second to import, for this alone
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the one that is chosen it is said
        return LogisticRegression(C=c, solver="lbfgs", max_iter=ITERATIONS).fit(features, labels)
