"""The OOD scores of a request, fitted to every model."""

from __future__ import annotations

import numpy as np

from qclip.errors import InputError, option
from qclip.models import value_path
from qclip.results import Results

from .embed import Embedder
from .local import Local
from .request import Request
from .sample import Known, Sample
from .scores import Score, UnfitError


class FittedScores:
    """`own` and `borrowed` scores of each model, and what is `local`: read of patches, batch by batch."""

    def __init__(self, embedder: Embedder, request: Request, results: Results) -> None:
        self._embedder, self._request, self._results = embedder, request, results
        self._fitted: dict[str, dict[str, Score]] = {label: {} for label in embedder.views}
        self._widths: dict[str, int] = {}
        self._unfit: set[str] = set()
        self.local: dict[str, Local] = {}

    def learn(self, label: str, classes: np.ndarray, train: Sample | None = None) -> None:
        """Fit to one model the scores that learn from images, where there are some, else those that do not. classes:
        unit class embeddings `[K, E]`."""
        view, self._widths[label] = self._embedder.views[label], classes.shape[1]
        known = Known(classes, view.encoders.logit_scale, train, self._negatives(label) if train is None else None)
        for name, score in self._request.scores.items():
            if ("train" in score.needs) != (train is not None) or name in self._unfit:
                continue
            try:
                self._fitted[label][name] = fitted = score.fit(known)
            except UnfitError as why:
                if self._request.scores_named:
                    given = option("negatives" if "negatives" in score.needs else "train")
                    raise InputError(f"score {name!r} {why}; give more ({given}), or leave it out") from None
                self._unfit.add(name)
                self.local = {each: local.without(name) for each, local in self.local.items()}
                self._results.note(f"score {name!r} {why}; it is left out")
                continue
            if remark := getattr(fitted, "remark", ""):
                self._results.note(f"{label}: score {name!r}: {remark}")
        of_patches = {n: s for n, s in self._fitted[label].items() if "patches" in s.needs and n not in self._unfit}
        if of_patches and train is None:
            self.local[label] = Local(label, value_path(view.model), classes, view.encoders.logit_scale, of_patches)

    def _negatives(self, label: str) -> np.ndarray | None:
        """Unit embeddings `[M, E]` of the words that are no class, where a score compares with them."""
        if not any("negatives" in score.needs for score in self._request.scores.values()):
            return None
        templates = self._request.of("id")[0].templates
        return self._embedder.classifier(self._embedder.views[label], self._request.negatives, templates)

    def own(self, label: str) -> dict[str, Score]:
        """What was fitted to a model, without scores that could not be fitted to all, and without those of patches."""
        found = self._fitted[label]
        names = [name for name in self._request.scores if name in found and name not in self._unfit]
        return {name: found[name] for name in names if "patches" not in found[name].needs}

    def borrowed(self, label: str) -> dict[str, Score]:
        """Scores that learn from images, as fitted to the reference: what a deployed detector would go on using."""
        reference = next(iter(self._fitted))
        if len(self._fitted) == 1 or self._widths[reference] != self._widths[label]:
            return {}  # nobody to borrow from, or embeddings of another space
        return {name: score for name, score in self.own(reference).items() if "train" in score.needs}
