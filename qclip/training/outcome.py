"""What a run comes to: whether it does better than before, which weights are deployed, and with which logit scale."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from ..metrics.temperature import fit_logit_scale
from .objectives import Features
from .pairs import Pairs, Rows
from .step import Gradient
from .teacher import Teacher
from .trainer import Trainer, TrainingError

JUDGED = 64  # pairs that judge a run where none are held out: some of those that it learns from
LEAST_KEPT = 0.1  # a model of which less is `kept` is destroyed


class Judge:
    """Judges a prepared model by held-out pairs, or by some of those that it learns from where `held` is None. Made
    before training, whose start it compares with. `model`: the float one."""

    def __init__(self, gradient: Gradient, model: nn.Module, learned: Pairs, held: Pairs | None) -> None:
        self.gradient, self.held = gradient, held
        self.pairs = learned.select(np.arange(min(len(learned), JUDGED))) if held is None else held
        with models.evaluating(model):
            self.teacher = Teacher.of(model, self.pairs, gradient.objective.needs & {"consensus"})
        self.before = self._loss()[0]

    def _loss(self) -> tuple[float, Features]:
        return self.gradient.held_out(self.pairs, self.teacher)

    @torch.no_grad()
    def finish(self, run: Trainer) -> dict[str, Any]:
        """Decide which weights are deployed, and the logit scale. -> notes of what was found

        Warns where the loss is worse than before. Raises TrainingError where, besides, the embeddings hardly say
        which image, or which text, they are of.
        """
        loss, seen = self._loss()
        found: dict[str, Any] = {"pairs": len(self.pairs), "before": self.before, "loss": loss}
        notes: dict[str, Any] = {"learned_from" if self.held is None else "held_out": found}
        if self.held is not None and run.average:
            last = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
            _put(run, run.average)
            averaged, of_average = self._loss()
            found["loss_of_average"] = averaged
            notes["deployed"] = "average" if averaged <= loss else "last"
            if averaged <= loss:
                loss, seen = averaged, of_average
            else:
                _put(run, last)
        if not loss <= self.before:
            told = self._told(loss)
            if not kept(seen) >= LEAST_KEPT:
                raise TrainingError(
                    f"training destroyed the model: {told}, and its embeddings hardly tell one image or text from "
                    "another any more; lower the rate, and name another output"
                )
            notes["worse"] = f"training made the model worse: {told}; lower the rate, or give it more pairs"
            if run.processes.first:
                warnings.warn(notes["worse"], stacklevel=3)
        if self.held is not None and run.settings.logit_scale == "tuned":
            notes["logit_scale"] = tune(run.student.logit_scale, seen)  # type: ignore[arg-type]
        return notes

    def _told(self, loss: float) -> str:
        kind = "pairs that it learned from" if self.held is None else "held-out pairs"
        return f"its loss on {len(self.pairs)} {kind} is {loss:.4g}, and was {self.before:.4g} before"


def kept(seen: Features) -> float:
    """How much of the float model's power to tell inputs apart is left, of the tower that has less: 1 for float, 0
    where all embeddings are one. It is how much nearer an embedding is to float's of the same input than to float's of
    others (mean cosines), divided by the same of float itself."""
    first = _first_of_each_caption(seen)
    towers = [(seen.image, seen.teacher_image), (seen.text[first], seen.teacher_text[first])]
    return min((_nearer(x, t) / max(_nearer(t, t), 1e-12) for x, t in towers if len(x) > 1), default=1.0)


def _first_of_each_caption(seen: Features) -> Rows:
    """Rows, rising: a caption that comes twice is one text, and no pair of its own."""
    return np.sort(np.unique(seen.captions.cpu().numpy(), return_index=True)[1])


def _nearer(x: Tensor, towards: Tensor) -> float:
    cosines, n = x.double() @ towards.double().T, len(x)
    own = float(cosines.diagonal().mean())
    return own - (float(cosines.sum()) - n * own) / (n * (n - 1))


def _put(run: Trainer, values: dict[str, Tensor]) -> None:
    for name, parameter in run.parameters.items():
        parameter.copy_(values[name])


def tune(scale: Tensor, seen: Features) -> dict[str, Any]:
    """Fit the factor on cosines to held-out pairs (`metrics.temperature.fit_logit_scale`)."""
    first = _first_of_each_caption(seen)
    logits = seen.scale * seen.image[first] @ seen.text[first].T
    found = fit_logit_scale(logits.double().cpu().numpy())
    before = float(seen.scale)
    if not found.flag:
        scale.fill_(math.log(before / found.value))
    return {"before": before, "after": float(scale.float().exp()), **({"why": found.flag} if found.flag else {})}
