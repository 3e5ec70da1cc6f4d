"""SVDQuant (Li et al., arXiv 2411.05007): a low-rank branch in 16 bits takes what is hard to round.

The input is smoothed, `x / s` with `s_j = max|X_j|^a / max|W_j|^b`; of the smoothed weight the leading singular vectors
become the site's branch, the rest is rounded. Sites that share an input share s and the right singular vectors. The
pair (a, b) is searched over (0, 0), (i/n, 0) and (i/n, 1 - i/n), then branch and codes are found in turn, L from
`W s - Q(R)`, R from `W s - L`, while the error falls: that of the sites' outputs, with the real quantizers.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ...layers import Branch, Scale
from ...layers.activations import quantize_dequantize
from ...recipes import FLOAT, Treatment
from ..base import Context, Method, SiteState, quantize_weight
from ..driver import BlockRun


@dataclasses.dataclass(frozen=True)
class Options:
    """`rank` of the branches; None: as much as costs `bits` a weight. `tried`: the n of the pairs. `rounds`: how often
    branch and codes are found again, at most. `samples`: images, or captions; `rows`: tokens of them that errors are
    measured on."""

    rank: int | None = None
    bits: float = 0.5
    tried: int = 10
    rounds: int = 10
    samples: int = 32
    rows: int = 2048

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be 1 or more, not {self.rank}")
        if not 0 < self.bits <= 16:
            raise ValueError(f"bits of a branch lie between 0 and 16, not at {self.bits:g}")
        for name in ("tried", "samples", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.rounds < 0:
            raise ValueError(f"rounds must be 0 or more, not {self.rounds}")

    def rank_of(self, n: int, k: int) -> int:
        """Of the branch of a weight `[n, k]`, or more than such a one can have."""
        return max(1, int(self.bits * n * k / (16 * (n + k)))) if self.rank is None else self.rank

    @property
    def pairs(self) -> list[tuple[float, float]]:
        steps = [i / self.tried for i in range(1, self.tried + 1)]
        return [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps if a < 1)]


class SVDQuant(Method):
    """A low-rank float branch takes what is hard to round; inputs are smoothed before."""

    name = "svdquant"
    stage = "SVDQuant"
    options = Options
    needs = frozenset({"inputs"})
    decides = frozenset({"input", "weight"})

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.samples = options.samples
        self.found: dict[str, dict] = {}

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        return 32 * k + 16 * min(self.chosen.rank_of(n, k), k) * (n + k)

    def block(self, context: Context, run: BlockRun) -> None:
        groups: dict[str, list[SiteState]] = {}
        for state in run.states.values():
            groups.setdefault(state.site.shared, []).append(state)
        seen: dict[str, list[Tensor]] = {key: [] for key in groups}
        run.observe({key: seen[key].append for key in groups})
        for key, group in groups.items():
            inputs = seen.pop(key)
            try:
                self._decide(key, group, torch.cat([x.flatten(0, -2) for x in inputs]) if inputs else None)
            except ValueError as why:
                raise NonFiniteError(f"{group[0].site.name}: {why}") from why

    def finish(self, context: Context) -> None:
        context.notes["svdquant"] = self.found
        if few := {key: found for key, found in self.found.items() if found["inputs"] < found["channels"]}:
            worst = min(few, key=lambda key: few[key]["inputs"] / few[key]["channels"])
            warnings.warn(
                f"SVDQuant saw fewer inputs than channels at {len(few)} of {len(self.found)} places, the fewest at "
                f"{worst} ({few[worst]['inputs']} for {few[worst]['channels']}), and smooths nothing there; calibrate "
                "with more images or captions, or raise its 'samples'",
                stacklevel=2,
            )

    def _decide(self, key: str, group: list[SiteState], x: Tensor | None) -> None:
        weight = torch.cat([state.folded()[0] for state in group])
        count, channels = 0 if x is None else len(x), weight.shape[1]
        if x is None:  # no sample reached it: every channel alike
            x = torch.eye(channels, device=weight.device)
        else:
            x = group[0].input(x[:: max(1, len(x) // self.chosen.rows)]).float()
            if not x.square().isfinite().all():
                raise ValueError("its inputs are NaN or infinite, or too large for their squares")
        # Of a few inputs the largest say little: what smooths these best may be the worst for others.
        pairs = [(0.0, 0.0)] if count < channels else self.chosen.pairs
        rank = min(self.chosen.rank_of(*state.folded()[0].shape) for state in group)
        trial = _Trial(group, weight, x, min(rank, *weight.shape))
        pair = pairs[0] if len(pairs) == 1 else min(pairs, key=lambda p: trial.attempt(*p).error)
        best = now = trial.attempt(pair[0], pair[1], exact=True)
        for _ in range(self.chosen.rounds):
            now = trial.again(now)
            if not now.error < best.error:
                break
            best = now
        for state, codes, branch in zip(group, best.codes, best.branches, strict=True):
            if pair != (0.0, 0.0):
                state.transforms = [*state.transforms, best.smooth]
            state.branch, state.weight = branch, codes
        self.found[key] = {"smoothing": list(pair), "rank": trial.rank, "inputs": count, "channels": channels}


@dataclasses.dataclass
class _Attempt:
    smooth: Scale
    branches: list[Branch]
    codes: list
    error: float


class _Trial:
    """Sites that share an input, and what their outputs are to be."""

    def __init__(self, group: list[SiteState], weight: Tensor, x: Tensor, rank: int) -> None:
        self.group, self.weight, self.x, self.rank = group, weight, x, rank
        self.wanted = x @ weight.T
        self.largest_x, self.largest_w = x.abs().amax(0), weight.abs().amax(0)

    def attempt(self, a: float, b: float, exact: bool = False) -> _Attempt:
        """With the branch of the smoothed weight's leading singular vectors: `exact`, or by random projection."""
        alive = (self.largest_x > 0) & (self.largest_w > 0)
        s = torch.where(alive, self.largest_x.pow(a) / self.largest_w.pow(b), 1.0)
        return self._rounded(Scale(1 / s), self.weight * s, exact)

    def again(self, last: _Attempt) -> _Attempt:
        """With the branch of what the last codes leave."""
        rounded = torch.cat([codes.dequantize() for codes in last.codes])
        return self._rounded(last.smooth, last.smooth.weight(self.weight) - rounded, exact=False)

    def _rounded(self, smooth: Scale, left: Tensor, exact: bool) -> _Attempt:
        """The branch is that of `left`, the codes those of what it leaves of the whole weight."""
        if not left.square().isfinite().all():
            raise ValueError("its weights are too large for their squares")
        if exact:
            u, sizes, vt = torch.linalg.svd(left, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                u, sizes, v = torch.svd_lowrank(left, min(self.rank + 8, *left.shape), niter=4)
            vt = v.T
        down, up = vt[: self.rank], u[:, : self.rank] * sizes[: self.rank]
        x, whole = smooth.input(self.x), smooth.weight(self.weight)
        codes, branches, sums, at = [], [], [], 0
        plan = self.group[0].plan
        seen = (
            x
            if plan.activation_bits == FLOAT
            else quantize_dequantize(x, plan.activation_bits, grid=plan.activation_grid)
        )
        for state in self.group:
            rows = slice(at, at + len(state.source.weight))  # type: ignore[arg-type]
            branch = Branch(down, up[rows])
            rounded = quantize_weight(whole[rows] - branch.weight(), state.plan)
            sums.append(seen @ rounded.dequantize().T + branch(x))
            codes.append(rounded)
            branches.append(branch)
            at = rows.stop
        error = float((torch.cat(sums, 1) - self.wanted).square().sum())
        return _Attempt(smooth, branches, codes, error)
