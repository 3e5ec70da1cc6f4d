"""Controls: what stands in a quantized weight's place, so that a finding about it can be a finding about anything else.

One file per control. Another package adds one by an entry point of the group `qclip.controls`, a script by
`CONTROLS.register`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from qclip.registry import Registry

from ..change import Change

Claim = Literal["level", "shape"]
MIN_SEEDS = 8


class Control:
    """Puts a residual of its own in the place of quantization's: the weight is then W + `residual`.

    random: draws differ, and several are taken. excludes: which claims about the quantized weight need it to lie
    beyond this control; none for a control that shows what a true effect looks like.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    random: ClassVar[bool] = True
    excludes: ClassVar[frozenset[Claim]] = frozenset({"shape"})

    def fits(self, change: Change) -> bool:
        """Whether it can be made for this weight."""
        return True

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        """What it adds to the float weight: float32 or float64 `[N, K]`."""
        raise NotImplementedError

    def gains(self, change: Change, draw: np.random.Generator) -> dict[str, float]:
        """Gain of each band under `residual(change, draw)`; a control that knows it without the matrix says so here."""
        return change.basis.gains_of(self.residual(change, draw))


def normal(shape: tuple[int, int], draw: np.random.Generator) -> Tensor:
    """Standard normal numbers float32 `[N, K]`; torch draws them twice as fast as numpy."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(draw.integers(2**62))))


def uniform(shape: tuple[int, int], draw: np.random.Generator) -> Tensor:
    """Numbers between 0 and 1, as `normal`."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(int(draw.integers(2**62))))


_HERE = "qclip.spectral.controls"
CONTROLS: Registry[Control] = Registry(
    "spectral control",
    "qclip.controls",
    {
        "white": f"{_HERE}.white:White",
        "white_layer": f"{_HERE}.white_layer:WhiteLayer",
        "uniform": f"{_HERE}.uniform:Uniform",
        "shuffled": f"{_HERE}.shuffled:Shuffled",
        "shrink": f"{_HERE}.shrink:Shrink",
        "truncated": f"{_HERE}.truncated:Truncated",
    },
    ("label", "random", "excludes", "fits", "residual", "gains"),
)
