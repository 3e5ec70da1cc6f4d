"""GPTQ (arXiv 2210.17323): rounding errors of a column are made good by the columns behind it, as the inputs ask for.

Inputs are those behind blocks and sites that are quantized already: q, k, v, whose codes share one Hessian, then out,
fc1 and fc2, then the projection. They are taken behind transforms (SmoothQuant, a rotation) and behind their quantizer.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Literal

from ...errors import NonFiniteError, RecipeError
from ..base import Context, Method, SiteState, weight_scales
from ..compensation import Factor, round_columns
from ..driver import BlockRun
from ..moments import Moments


@dataclasses.dataclass(frozen=True)
class Options:
    """`damp`: of the Hessian's diagonal, as a share of its mean. `block`: columns whose errors are passed on at once.
    `act_order`: channels with large inputs first, in groups as they lie; False: as they come, groups fitted on the way.
    `observer`: of the scales, "mse" or "min-max"; None: the recipe's. `bias`: what is lost on average is added to the
    bias (the Hessian holds the mean already, and `photos` is nearer without). `samples`: images, or captions, of the
    Hessian."""

    damp: float = 0.01
    block: int = 128
    act_order: bool = True
    observer: Literal["min-max", "mse"] | None = "mse"
    bias: bool = False
    samples: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= 1:
            raise ValueError(f"damp must lie between 0 and 1, not at {self.damp:g}")
        for name in ("block", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


class GPTQ(Method):
    """Round columns in turn; each error is made good by the columns behind it."""

    name = "gptq"
    stage = "GPTQ"
    options = Options
    needs = frozenset({"inputs"})
    decides = frozenset({"weight"})
    inputs = "quantized"
    resumes = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.samples = options.samples

    def check(self, context: Context) -> None:
        wanted = self.chosen.observer
        for name, state in context.states.items():
            plan = context.recipe.plan(name, state.site.kind)
            if plan is not None and wanted is not None and plan.weight_observer not in ("min-max", wanted):
                raise RecipeError(
                    f"the scales of {name} are to be found by {plan.weight_observer!r} and gptq's by {wanted!r}; leave "
                    "out weight_observer, or set gptq's 'observer' to null"
                )

    def block(self, context: Context, run: BlockRun) -> None:
        groups: dict[str, list[SiteState]] = {}
        for state in run.states.values():
            groups.setdefault(state.site.shared, []).append(state)
        for group in groups.values():
            if (moments := run.moments(group[0].site)) is None:
                continue  # no sample comes here: rounded to nearest
            self._round(group, moments, context.notes.setdefault("gptq", {}))
            run.use([state.site for state in group])

    def _round(self, group: list[SiteState], moments: Moments, notes: dict) -> None:
        options, site = self.chosen, group[0].site
        try:
            factor = Factor.of(moments.hessian, options.damp, options.act_order)
            for state in group:
                state.plan = dataclasses.replace(
                    state.plan, weight_observer=options.observer or state.plan.weight_observer
                )
                weight, _ = state.folded()
                fit = functools.partial(weight_scales, plan=state.plan)
                state.weight = round_columns(weight, factor, state.plan.grid, fit, options.block).weight
                if options.bias and (own := state.float_bias()) is not None:
                    state.bias = own + weight @ moments.seen - state.weight.dequantize() @ moments.multiplied
        except ValueError as why:
            raise NonFiniteError(f"{site.name}: {why}") from why
        facts: dict[str, float] = {"inputs": moments.rows, "channels": len(moments.hessian)}
        if dead := int((moments.hessian.diagonal() == 0).sum()):
            facts["channels_never_seen"] = dead  # they are rounded to nearest
        if factor.damp != options.damp:
            facts["damp"] = factor.damp
        notes[site.shared] = facts

    def finish(self, context: Context) -> None:
        notes = context.notes.get("gptq", {})
        few = {at: f for at, f in notes.items() if f["inputs"] < f["channels"]}
        if few:
            worst = min(few, key=lambda at: few[at]["inputs"] / few[at]["channels"])
            warnings.warn(
                f"GPTQ saw fewer inputs than channels at {len(few)} of {len(notes)} places, the fewest at {worst} "
                f"({few[worst]['inputs']} for {few[worst]['channels']}); calibrate with more images or captions",
                stacklevel=2,
            )
        if damped := [at for at, f in notes.items() if "damp" in f]:
            most = max(damped, key=lambda at: notes[at]["damp"])
            warnings.warn(
                f"GPTQ needed more damping than {self.chosen.damp:g} at {len(damped)} of {len(notes)} places, "
                f"{notes[most]['damp']:g} at {most}: its inputs have too few directions",
                stacklevel=2,
            )
