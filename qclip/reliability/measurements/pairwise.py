"""SigLIP's own probabilities: the sigmoid of each pair of an image and a class, beside the softmax over classes."""

from __future__ import annotations

import numpy as np

from qclip.metrics.pairwise import pair_bins, pair_ece, pair_losses
from qclip.metrics.resampled import evaluate_on, mean_of

from ..embedded import Embeddings
from ..request import Condition, Request
from ..writer import Writer


class Pairwise:
    name, label = "pairwise", "Sigmoid of pairs"

    def wants(self, request: Request) -> list[Condition]:
        return [Condition(each, vectors=True) for each in request.of("id", "shift")] if request.biased else []

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """ECE and NLL of match or no match, of the models that have a logit bias. Nothing is ranked by the sigmoid: it
        saturates, and before that ranks as the cosines do."""
        for condition in self.wants(request):
            of, n = condition.set, len(embedded.indices(condition))
            biased = {model: request.biased[model] for model in request.models if model in request.biased}
            wanted = []
            for model, bias in biased.items():
                bins, losses = [], []
                for sample in embedded.samples(condition, model):
                    assert sample.labels is not None
                    logits = sample.logits + bias
                    bins.append(pair_bins(logits, sample.labels))
                    losses.append(pair_losses(logits, sample.labels))
                wanted += [pair_ece(np.concatenate(bins)), mean_of(np.concatenate(losses))]
            page = out.page(of.name, of.role, n, of.data.digest)
            values = evaluate_on(wanted, page.counts())
            reference = page.models[0]
            found = {
                name: dict(zip(biased, values[at::2], strict=True)) for at, name in enumerate(("pair_ece", "pair_nll"))
            }
            for name, drawn in found.items():
                for model in drawn:
                    page.estimate(model, name, drawn[model])
                    if model != reference and reference in drawn:
                        page.estimate(model, name, drawn[model] - drawn[reference], reference=reference)
