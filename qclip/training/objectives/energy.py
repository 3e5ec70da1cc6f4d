"""Energy margins (Liu et al. 2020, arXiv 2010.03759), with quantiles of the float model for the bounds."""

from __future__ import annotations

from torch import Tensor

from .margin import Margin


class Energy(Margin):
    """As `margin`, of log-sum-exp of the logits, minus the energy"""

    name = "energy"

    def score(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(-1)
