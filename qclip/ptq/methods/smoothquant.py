"""SmoothQuant (arXiv 2211.10438) with the strength searched per block: one fixed alpha is known to hurt CLIP.

`s_j = max|X_j|^a / max|W_j|^(1-a)`; the input is multiplied by 1/s when it is quantized, the weight by s before it is
rounded. Nothing is folded into neighbours, so a site stays one weight and one transform of its input. The groups of a
block are searched in the order in which they run - qkv, out, fc1, fc2 - each over {off, 0, 0.05 .. 1} by the squared
error of the *block's* output with the real quantizers in place: with a static scale where the recipe wants one. Every
fourth strength is tried, then what lies around the best one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qkernels import smooth_scale

from ... import calibration
from ...layers import Scale
from ...layers.transforms import Transform
from ...recipes import Treatment
from ..base import Context, Method, SiteState
from ..driver import BlockRun

STRIDE = 4  # strengths between two that are tried first


@dataclasses.dataclass(frozen=True)
class Options:
    """`alpha`: one strength for all sites, 0 to 1; None: searched. `tried`: how many there are besides "off", evenly
    from 0 to 1. `samples`: images, or captions, of the search."""

    alpha: float | None = None
    tried: int = 21
    samples: int = 32

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not at {self.alpha:g}")
        if self.tried < 2:
            raise ValueError(f"tried must be 2 or more, not {self.tried}")
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, not {self.samples}")


class SmoothQuant(Method):
    """Move the size of input channels into the weights; the strength is searched per block."""

    name = "smoothquant"
    stage = "SmoothQuant search"
    options = Options
    needs = frozenset({"inputs"})
    decides = frozenset({"input"})
    resumes = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.samples = options.samples

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        return 32 * k

    def prepare(self, context: Context) -> None:
        self.maxima = context.channel_maxima([s.site for s in context.states.values() if s.scalable])

    def block(self, context: Context, run: BlockRun) -> None:
        groups: dict[str, list[SiteState]] = {}
        for state in run.states.values():
            if state.scalable and state.site.shared in self.maxima:
                groups.setdefault(state.site.shared, []).append(state)
        seen: dict[str, list[Tensor]] = {key: [] for key, group in groups.items() if group[0].plan.static}
        if seen:
            run.observe({key: inputs.append for key, inputs in seen.items()})
        if self.chosen.alpha is None:  # what is not searched yet is quantized, too: float products take much longer
            for key, group in groups.items():
                _use(run, group, group[0].transforms, seen.get(key))
        strengths = context.notes.setdefault("smoothquant_alpha", {})
        for key, group in groups.items():
            strengths[key] = self._search(run, group, seen.get(key))
        for group in groups.values():
            for state in group:
                state.input_scale = state.input_zero = None  # of a few samples: those of all are found in the end

    def _search(self, run: BlockRun, group: list[SiteState], seen: list[Tensor] | None) -> float | None:
        """Sets the states of sites that share an input to the best strength, and leaves their layers in the block."""
        before, maxima = list(group[0].transforms), self.maxima[group[0].site.shared]
        largest = torch.stack([state.folded()[0].abs().amax(0) for state in group]).amax(0)

        def use(alpha: float | None) -> None:
            scale = [] if alpha is None else [Scale(1 / smooth_scale(maxima, largest, alpha))]
            _use(run, group, [*before, *scale], seen)

        def error(alpha: float | None) -> float:
            use(alpha)
            return run.error()

        best = self._best(error) if self.chosen.alpha is None else self.chosen.alpha
        use(best)
        return best

    def _best(self, error: Callable[[float | None], float]) -> float | None:
        """Of "off" (None) and strengths that lie evenly, in steps that get smaller, the one of least error."""
        last, step = self.chosen.tried - 1, STRIDE
        errors: dict[float | None, float] = {None: error(None)}
        looked = {*range(0, last + 1, step), last}
        while step:
            errors |= {at / last: error(at / last) for at in sorted(looked) if at / last not in errors}
            best = round(min((a for a in errors if a is not None), key=errors.__getitem__) * last)
            step //= 2
            looked = {best - step, best + step} & {*range(last + 1)}
        return min(errors, key=errors.__getitem__)


def _use(run: BlockRun, group: list[SiteState], transforms: list[Transform], seen: list[Tensor] | None) -> None:
    """Quantize sites that share an input, behind these transforms; `seen`: inputs that say its static scale."""
    for state in group:
        state.transforms = transforms
        if seen is not None:
            state.input_scale, state.input_zero = calibration.static_input(map(state.input, seen), state.plan)
    run.use([state.site for state in group])
