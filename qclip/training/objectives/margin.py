"""A margin between images of the pairs and images that show nothing, in the score by which the unknown is told: the
largest probability (MCM, Ming et al. 2022, arXiv 2211.13445), here over the batch's captions.

The form is that of energy margins (Liu et al. 2020, arXiv 2010.03759), whose two bounds are units of a model's logits;
here they are quantiles of the float model's scores. It rewards one score, so that others must be looked at, too; what
resembles the negatives (textures, digits) gains more than near classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Features

INSIDE, OUTSIDE = 0.5, 0.1  # quantiles of the float model's scores, of pairs and of negatives


class Margin:
    """Squared shortfall of log MCM: of pairs below the float model's median, of negatives above its lowest tenth"""

    name = "margin"
    needs = frozenset({"pairs", "negatives"})

    def __call__(self, features: Features) -> Tensor:
        assert features.negatives is not None
        with torch.no_grad():
            teacher = features.teacher_scale * features.teacher_text.T
            least = self.score(features.teacher_image @ teacher).quantile(INSIDE)
            most = self.score(features.negatives.teacher @ teacher).quantile(OUTSIDE)
        own = features.scale * features.text.T
        inside, outside = self.score(features.image @ own), self.score(features.negatives.image @ own)
        return (least - inside).relu().square().mean() + (outside - most).relu().square().mean()

    def score(self, logits: Tensor) -> Tensor:
        """`[n, K]` -> `[n]`; the larger, the better known is the image."""
        return logits.log_softmax(-1).amax(-1)
