"""Predictions beside those of many people, where a set says how many chose each class."""

from __future__ import annotations

import numpy as np

from qclip.metrics.human import correlation, cross_entropy, entropy
from qclip.metrics.resampled import evaluate_on, mean_of

from ..embedded import Embeddings
from ..request import Condition, Request
from ..scores.entropy import negative_entropy
from ..writer import Writer


class Human:
    name, label = "human", "Human labels"

    def wants(self, request: Request) -> list[Condition]:
        return [Condition(each, vectors=True) for each in request.of("id", "shift") if each.counts is not None]

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """NLL of what people chose, and how the model's entropy goes with theirs, on images that somebody judged."""
        for condition in self.wants(request):
            of, kept = condition.set, embedded.indices(condition)
            assert of.counts is not None
            counts = of.counts[kept]
            people = counts.sum(1)
            there = people > 0
            if not there.any():
                out.note(f"{of.name}: nobody judged any of its images, so that nothing is said of human labels")
                continue
            shares = counts[there] / people[there, None]
            theirs = entropy(shares)
            fewest, most = people[there].min(), people[there].max()
            out.note(
                f"{of.name}: {there.sum()} images were judged by {fewest} to {most} people; "
                f"no NLL of human labels is below their mean entropy, {theirs.mean():.4f}"
            )
            wanted = []
            for model in request.models:
                logits, own = [], []
                for sample in embedded.samples(condition, model):
                    logits.append(sample.logits)
                    own.append(-negative_entropy(sample))
                of_model = np.concatenate(own)[there]
                wanted += [mean_of(cross_entropy(np.concatenate(logits)[there], shares)), correlation(of_model, theirs)]
            page = out.page(of.name, of.role, int(there.sum()), of.data.digest)
            drawn = out.resampling(of.data.digest, len(kept)).bootstrap()[there]
            values = evaluate_on(wanted, drawn)
            page.estimates("human_nll", dict(zip(request.models, values[::2], strict=True)))
            page.estimates("entropy_correlation", dict(zip(request.models, values[1::2], strict=True)))
            if np.isnan(values[1][0]):
                out.note(f"{of.name}: the correlation of entropies is undefined where all of them are equal")
