"""Retrieval among images and their captions: recall at 1, 5 and 10, both ways."""

from __future__ import annotations

import numpy as np

from qclip.errors import InputError
from qclip.metrics.arrays import ratio
from qclip.metrics.resampled import Statistic, Sums, evaluate_on
from qclip.metrics.retrieval import first_places

from ..embedded import Embeddings
from ..request import Condition, Request
from ..writer import Writer

AT = (1, 5, 10)


class Retrieval:
    name, label = "retrieval", "Retrieval"

    def wants(self, request: Request) -> list[Condition]:
        for each in request.of("captions"):
            if len(each.data) < max(AT):
                raise InputError(
                    f"{each.name} has {len(each.data)} images: recall at {max(AT)} needs {max(AT)} or more"
                )
        return [Condition(each, vectors=True) for each in request.of("captions")]

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """An image finds its captions where any of them is among the first k; a caption finds its one image. Intervals
        draw images together with their captions; the gallery stays as it is."""
        for condition in self.wants(request):
            of, kept = condition.set, embedded.indices(condition)
            listed = [(of.data.captions or [])[i] for i in kept]
            counts = np.array([len(captions) for captions in listed])
            if not counts.any():
                out.note(f"{of.name}: none of its {len(kept)} images that can be read has a caption: nothing is found")
                continue
            stop = np.cumsum(counts)
            owned, own_image = np.stack([stop - counts, stop], axis=1), np.repeat(np.arange(len(kept)), counts)
            asked = counts > 0
            out.note(
                f"{of.name}: retrieval among {len(kept)} images and {stop[-1]} captions "
                f"({counts.min()} to {counts.max()} per image)"
            )
            if not asked.all():
                out.note(f"{of.name}: {np.sum(~asked)} images have no caption: they are found, and find nothing")
            vectors, texts = embedded.vectors(condition), embedded.texts([c for captions in listed for c in captions])
            places = {}
            for model in request.models:
                images, captions = vectors[model], texts[model]
                found = np.full(len(kept), np.iinfo(np.int64).max)
                found[asked] = first_places(images[asked], captions, owned[asked])
                ranges = np.stack([own_image, own_image + 1], axis=1)
                places[model] = found, first_places(captions, images, ranges)
            page = out.page(of.name, of.role, len(kept), of.data.digest)
            drawn = out.resampling(of.data.digest, len(kept)).bootstrap()
            for k in AT:
                where = {"axis": "k", "at": k}
                if k > len(kept):  # fewer could be read than there are
                    for model in request.models:
                        page.add(model, "image_to_text_recall", value=None, **where)
                        page.add(model, "text_to_image_recall", value=None, **where)
                    continue
                wanted: list[Statistic] = []
                for model in request.models:
                    of_images, of_texts = places[model]
                    wanted.append(_share((of_images < k).astype(float), asked.astype(float)))
                    hits = np.bincount(own_image, of_texts < k, len(kept))
                    wanted.append(_share(hits, counts.astype(float)))
                values = evaluate_on(wanted, drawn)
                page.estimates("image_to_text_recall", dict(zip(request.models, values[::2], strict=True)), **where)
                page.estimates("text_to_image_recall", dict(zip(request.models, values[1::2], strict=True)), **where)


def _share(hits: np.ndarray, of: np.ndarray) -> Statistic:
    return Statistic([Sums(hits), Sums(of)], lambda a, b: ratio(a[0], b[0]))
