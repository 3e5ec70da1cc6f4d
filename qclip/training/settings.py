"""How long and how a model learns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from .. import typed
from ..errors import InputError
from ..recipes import QUANTIZERS, Recipe

LogitScale = Literal["frozen", "learned", "tuned"]
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """`steps`: with 0 nothing is trained, only scales are found, and the logit scale where it is tuned. `batch` images
    with a caption each are one step, of all processes together, `micro` of them at a time (None: all
    of a process's part). Rates rise over the share `warmup` of the steps and fall to 0 by a cosine; AdamW with betas
    0.9 and 0.98. `scale_rate`: of quantizers' scales, a relative step where they are logarithms. `clip`: largest norm
    of the gradient, of weights and of scales each. `start`: share of the steps before weights and inputs are rounded.
    `logit_scale`: "tuned" fits it on the held-out pairs when training is over. `held_out`: share of the pairs that is
    not trained on. `ema`: decay of an average of the weights, which is deployed where it does better on the held-out
    pairs; 0: none. `beside`: for terms that ask for altered images, negatives or pairs apart, how many of each a step
    embeds, as a share of `batch`; `apart`: share of the pairs that such terms alone see. Raises InputError.
    """

    objective: str = "contrastive+100*mse"
    steps: int = 400
    batch: int = 64
    micro: int | None = None
    rate: float = 1e-4
    scale_rate: float = 1e-3
    decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    start: float = 0.0
    logit_scale: LogitScale = "frozen"
    precision: Precision = "float32"
    checkpointing: bool = False
    ema: float = 0.0
    held_out: float = 0.1
    beside: float = 0.25
    apart: float = 0.2
    pairs: int = 1000
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "pairs", "save_every"):
            if getattr(self, name) < (least := 0 if name == "steps" else 1):
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.micro is not None and self.micro < 1:
            raise InputError(f"micro must be at least 1, not {self.micro}")
        for name in ("rate", "scale_rate", "decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be a finite number of at least 0, not {value:g}")
        for name in ("warmup", "start", "held_out", "ema", "apart"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie from 0 to below 1, not at {getattr(self, name):g}")
        if not 0 < self.beside <= 1:
            raise InputError(f"beside must lie above 0 and not above 1, not at {self.beside:g}")
        if self.logit_scale == "tuned" and self.held_out == 0:
            raise InputError("logit_scale 'tuned' is fitted on held-out pairs; set held_out above 0")

    @classmethod
    def of(cls, recipe: Recipe, **given: Any) -> Settings:
        """The defaults of the recipe's quantizer, and what is `given`. Raises InputError for what does not exist."""
        assert recipe.trained is not None
        kind = QUANTIZERS.get(recipe.trained[0])
        return typed.from_dict(cls, {"objective": kind.objective, **kind.settings, **given}, "settings", InputError)

    @property
    def first_rounded(self) -> int:
        """The first step, counted from 0, in which weights and inputs are rounded."""
        return round(self.start * self.steps)

    def share(self, step: int) -> float:
        """Of the rates, in the step of this number, counted from 0."""
        rise = max(1, round(self.warmup * self.steps))
        return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
