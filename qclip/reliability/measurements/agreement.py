"""How near each model's outputs are to its reference's, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np

from qclip.metrics import divergence, mcnemar

from ..embedded import Embeddings
from ..request import Condition, Request
from ..writer import Writer


class Agreement:
    name, label = "agreement", "Agreement with the reference"

    def wants(self, request: Request) -> list[Condition]:
        roles = "id", "shift", "images"
        return [Condition(s, vectors=True) for s in request.of(*roles)] if len(request.models) > 1 else []

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """Cosine between a model's image embeddings and the reference's, what its probabilities lose of the reference's
        (KL), equal predictions, and McNemar's flips."""
        reference, *others = request.models
        for condition in self.wants(request):
            of, outputs, vectors = condition.set, embedded.outputs(condition), embedded.vectors(condition)
            n = len(embedded.indices(condition))
            page = out.page(of.name, of.role, n, of.data.digest)
            wanted: dict[str, np.ndarray] = {}
            nearest: dict[str, float] = {}
            for model in others:
                if outputs:  # else nobody named classes
                    same = outputs[model].predicted == outputs[reference].predicted
                    wanted[f"agreement {model}"] = same.astype(np.float64)
                    wanted[f"kl {model}"] = _divergences(embedded, condition, reference, model)
                if vectors[model].shape == vectors[reference].shape:  # else their embeddings live in different spaces
                    cosines = np.einsum("ne,ne->n", vectors[model], vectors[reference])
                    wanted[f"cosine_mean {model}"], nearest[model] = cosines, float(cosines.min())
            common: dict[str, Any] = {"reference": reference}
            for key, drawn in page.means(wanted).items():
                name, model = key.split(" ", 1)
                page.estimate(model, name, drawn, **common)
            for model in others:
                if model in nearest:
                    page.add(model, "cosine_min", value=nearest[model], **common)
                if not outputs:
                    continue
                flips = mcnemar(outputs[reference].right, outputs[model].right)
                page.add(model, "flips_lost", value=flips.lost, **common)
                page.add(model, "flips_won", value=flips.won, **common)
                changed = int((outputs[model].predicted != outputs[reference].predicted).sum())
                page.add(model, "flips_all", value=changed, **common)
                page.add(model, "mcnemar_p", value=flips.p, **common)
                page.add(model, "mcnemar_exact_p", value=flips.exact_p, **common)


def _divergences(embedded: Embeddings, condition: Condition, reference: str, model: str) -> np.ndarray:
    pairs = zip(embedded.samples(condition, reference), embedded.samples(condition, model), strict=True)
    return np.concatenate([divergence(of_reference.logits, of_model.logits) for of_reference, of_model in pairs])
