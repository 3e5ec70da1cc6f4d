"""What the products inside attention multiply, watched while samples run, and the quantizers that follow from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError
from ..layers.operands import AttentionOperands, probabilities, quantize_softmax
from ..models import Encoders
from ..models.tower import Tower
from ..progress import Progress
from ..recipes import AttentionTreatment, Treatment
from .gather import Samples
from .observers import OBSERVERS, Observer
from .stream import Hooks, reaching, run

PERCENTILES = (99.9, 99.99, 99.999)  # of which "log-sqrt2" takes the best


class SoftmaxHistogram:
    """Probabilities in 512 bins per octave down to 2^-32, below which they count as 0: small ones matter, and batches
    do not."""

    OCTAVES, PER_OCTAVE = 32, 512

    def __init__(self) -> None:
        self.counts = torch.zeros(self.OCTAVES * self.PER_OCTAVE, dtype=torch.float64)
        self.zeros, self.finite = 0, True

    def update(self, p: Tensor) -> None:
        p = p.detach().float().flatten().cpu()
        if not p.isfinite().all():
            self.finite = False
            return
        for part in p.split(1 << 22):  # histc counts in float32
            found = torch.histc(part.log2().clamp_(max=0), len(self.counts), -self.OCTAVES, 0).double()
            self.counts += found
            self.zeros += len(part) - int(found.sum())

    @property
    def centres(self) -> Tensor:
        return torch.exp2((torch.arange(len(self.counts), dtype=torch.float64) + 0.5) / self.PER_OCTAVE - self.OCTAVES)

    def percentile(self, percentile: float) -> float:
        """Within a bin, 0.14 % of the value."""
        reached = self.counts.cumsum(0) + self.zeros
        at = int(torch.searchsorted(reached, percentile / 100 * float(reached[-1])))
        return float(self.centres[min(at, len(self.counts) - 1)])

    def candidates(self, kind: str, bits: int) -> list[float]:
        """Scales that are tried."""
        if kind == "uniform":
            top = self.percentile(100)
            return [top * (1 - i / 125) / (2**bits - 1) for i in range(100)]
        if kind == "log-sqrt2":
            return [self.percentile(each) for each in PERCENTILES]
        return [2.0**-m for m in range(20)]

    def scale(self, kind: str, bits: int) -> Tensor:
        """That of the candidates with the least squared error: float32 `[]`."""
        centres = self.centres

        def error(scale: float) -> float:
            off = quantize_softmax(centres, kind, bits, scale) - centres
            return float((self.counts * off * off).sum())

        return torch.tensor(min(self.candidates(kind, bits), key=error), dtype=torch.float32)


class AttentionWatch(nn.Module):
    """Stands in an attention core as its `operands`, sees q, k, v and the probabilities, and changes nothing. Of a text
    tower it sees the positions that reach an embedding, as `hooks` has them."""

    def __init__(self, treatment: AttentionTreatment, heads: int, hooks: Hooks) -> None:
        super().__init__()
        self.treatment, self.hooks = treatment, hooks
        kind = OBSERVERS[treatment.observer]
        parts = heads if treatment.scale == "head" else 1
        self.observers: dict[str, list[Observer]] = {name: [kind() for _ in range(parts)] for name in "qkv"}
        self.softmax = SoftmaxHistogram()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        positions = self.hooks.reaching
        for name, x in zip("qkv", (q, k, v), strict=True):
            seen = reaching(x, positions)  # [..., H, d]
            parts = seen.unbind(-2) if self.treatment.scale == "head" else (seen,)
            for observer, part in zip(self.observers[name], parts, strict=True):
                observer.update(part)
        p = probabilities(q, k, mask, causal, scale)
        self.softmax.update(reaching(p.transpose(1, 2), positions))
        return torch.einsum("bhqk,bkhd->bqhd", p, v.float()).to(v.dtype)

    def operands(self, name: str) -> AttentionOperands:
        """Raises NonFiniteError and DataError, which name the attention."""
        flat = [observer for each in self.observers.values() for observer in each]
        if not all(observer.finite for observer in flat) or not self.softmax.finite:
            raise NonFiniteError(f"{name} is NaN or Inf during calibration; check the weights before it and the images")
        if not all(observer.seen for observer in flat):
            raise DataError(f"{name} saw nothing during calibration, so it has no scales; leave it float")
        plan = Treatment(
            8,
            self.treatment.bits,
            static=True,
            activation_grid=self.treatment.grid,
            activation_observer=self.treatment.observer,
        )
        found: dict[str, list[Any]] = {"q": [], "k": [], "v": []}
        for each, observers in self.observers.items():
            found[each] = [observer.quantizer(plan) for observer in observers]
        scales = tuple(torch.stack([scale for scale, _ in found[each]]) for each in "qkv")
        zeros = None
        if self.treatment.grid == "asym":
            zeros = tuple(torch.stack([zero for _, zero in found[each]]) for each in "qkv")
        bits, kind = self.treatment.bits, self.treatment.softmax
        return AttentionOperands(bits, kind, scales, zeros, self.softmax.scale(kind, bits))  # type: ignore[arg-type]


@torch.no_grad()
def attention_operands(
    encoders: Encoders,
    towers: dict[str, Tower],
    data: Samples,
    treatments: dict[str, AttentionTreatment],
    progress: Progress | None = None,
) -> dict[str, AttentionOperands]:
    """The quantizers of attention's operands by the block's name, `treatments` by that, too; a pass over all samples of
    float towers."""
    watches: dict[str, AttentionWatch] = {}
    cores = {
        block.name: getattr(*block.attention)
        for tower in towers.values()
        for block in tower.blocks
        if block.attention is not None and block.name in treatments
    }
    with Hooks() as hooks:
        try:
            for name, core in cores.items():
                core.operands = watches[name] = AttentionWatch(treatments[name], core.heads, hooks)
            run(encoders, data, {name.split(".", 1)[0] for name in cores}, hooks, progress)
        finally:
            for core in cores.values():
                core.operands = None
    return {name: watch.operands(f"{name}.attn") for name, watch in watches.items()}
