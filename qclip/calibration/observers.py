"""What is kept of the inputs of a site while samples run: maxima of channels, or a histogram of the whole tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import qkernels
from qkernels.grids import Grid


class AbsMax:
    """Largest |x| of every input channel: float32 `[K]`."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if self.value is None:
            self.value = torch.zeros(x.shape[-1], device=x.device)
        qkernels.channel_absmax(x.detach(), running=self.value)


class Histogram:
    """|x| of a tensor in 2,048 bins; the range doubles by merging bins, so batches do not matter."""

    BINS = 2048

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)
        self.top = 0.0
        self.finite = True

    def update(self, x: Tensor) -> None:
        x = x.detach().float().abs().flatten().cpu()
        peak = float(x.max()) if x.numel() else 0.0
        if not np.isfinite(peak):
            self.finite = False
            return
        if peak == 0.0:
            self.counts[0] += x.numel()
            return
        if self.top == 0.0:  # a power of two, so that ranges found in any order are multiples of each other
            self.top = 2.0 ** np.ceil(np.log2(peak))
        while peak > self.top:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.top *= 2
        self.counts += torch.histc(x, self.BINS, 0.0, self.top).double()

    def static_scale(self, bits: int) -> Tensor:
        """`scale` as a layer holds it: float32 `[]`."""
        return torch.tensor(self.scale(bits), dtype=torch.float32)

    def scale(self, bits: int = 8, steps: int = 100) -> float:
        """The symmetric scale with the least squared error, searched over `steps` clipping points."""
        if self.top == 0.0:
            return 1.0
        qmax = Grid(bits, "sym").high
        width = self.top / self.BINS
        centres = (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * width
        used = int(self.counts.nonzero().max()) + 1
        best, best_error = self.top / qmax, float("inf")
        for i in range(steps):
            scale = used * width * (1 - i / (steps * 1.25)) / qmax
            error = centres - torch.round(centres / scale).clamp(max=qmax) * scale
            total = float((self.counts * error * error).sum())
            if total < best_error:
                best, best_error = scale, total
        return best
