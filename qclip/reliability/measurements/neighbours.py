"""May a float index be kept? What the new model's queries find in the reference's index, and the reverse."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from qclip.metrics.neighbours import neighbour_recall
from qclip.seeds import generator

from ..embedded import Embeddings
from ..request import Condition, EvalSet, Request
from ..resampled import array_digest
from ..writer import Page, Writer

QUERIES = 1000  # images and texts that are asked for; more would narrow the interval little


class Neighbours:
    name, label = "neighbours", "Nearest neighbours kept"

    def wants(self, request: Request) -> list[Condition]:
        return [Condition(s, vectors=True) for s in request.of("id", "images")] if len(request.models) > 1 else []

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """`index_recall` and its reverse by images, `text_recall` and its reverse by captions, the texts that were
        given, or class names. `at` is k; what the reference finds in its own index is right."""
        reference, *others = request.models
        for condition in self.wants(request):
            of, vectors = condition.set, embedded.vectors(condition)
            n = len(vectors[reference])
            page = out.page(of.name, of.role, n, of.data.digest)
            spoken = _spoken(of, embedded, condition, request)
            asked = np.arange(n)
            if n > QUERIES:
                asked = np.sort(generator(request.seed, f"queries {of.data.digest}").permutation(n)[:QUERIES])
            images = [k for k in request.neighbours if k < n]
            listed = [k for k in request.neighbours if k <= n] if spoken else []
            if len(images) < len(request.neighbours):
                left = [k for k in request.neighbours if k not in images]
                out.note(f"{of.name}: its {n} images are too few for {left[0]} neighbours of each")
            for model in others:
                old, new = vectors[reference], vectors[model]
                if old.shape != new.shape:
                    out.note(f"{of.name}: embeddings of {model} and {reference} differ in width: no common index")
                    continue
                both = array_digest({"old": old, "new": new, "asked": asked})
                for name, query, index in (("index_recall", new, old), ("index_recall_reverse", old, new)):
                    recall = functools.partial(neighbour_recall, query[asked], index, old[asked], old, images, asked)
                    _write(page, model, name, reference, _kept(page, name, len(asked), images, both, recall))
                if not listed:
                    continue
                said, own = spoken[reference], spoken[model]
                both += array_digest({"said": said, "own": own})
                for name, query, index in (("text_recall", own, old), ("text_recall_reverse", said, new)):
                    recall = functools.partial(neighbour_recall, query, index, said, old, listed)
                    _write(page, model, name, reference, _kept(page, name, len(said), listed, both, recall))


def _spoken(of: EvalSet, embedded: Embeddings, condition: Condition, request: Request) -> dict[str, np.ndarray]:
    """Unit embeddings of what a set is searched by: up to `QUERIES` different captions or given texts, or its classes;
    by model label, {} without any."""
    if of.data.captions is not None:
        found = [caption for i in embedded.indices(condition) for caption in of.data.captions[i]]
    elif request.texts:
        found = list(request.texts)
    else:
        return embedded.classifier(of) if of.classes else {}
    found = list(dict.fromkeys(found))
    if len(found) > QUERIES:
        chosen = np.sort(generator(request.seed, f"texts {of.data.digest}").permutation(len(found))[:QUERIES])
        found = [found[i] for i in chosen]
    return embedded.texts(found) if found else {}


def _kept(
    page: Page, name: str, queries: int, ks: list[int], embeddings: str, recall: Callable[[], dict[int, np.ndarray]]
) -> dict[int, np.ndarray]:
    """The shares of each query by k `[queries]`, or as they were kept for these embeddings."""
    found = page.writer.kept.fill(
        queries, [name], lambda: {str(k): shares for k, shares in recall().items()}, embeddings=embeddings, ks=ks
    )
    return {int(k): shares for k, shares in found.items()}


def _write(page: Page, model: str, name: str, reference: str, found: dict[int, np.ndarray]) -> None:
    for k, shares in found.items():
        (drawn,) = page.means({name: shares}, f"{name} {page.digest}").values()
        page.estimate(model, name, drawn, reference=reference, axis="neighbours", at=k, n=len(shares))
