"""A float model becomes one that learns with rounded weights and inputs."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import calibration as calibrating
from .. import models, ptq, recipes
from ..calibration import stream
from ..errors import ModelError, RecipeError, option
from ..layers import QuantizedPatch
from ..models.tower import Site
from ..progress import Progress
from ..ptq.base import SiteState, build
from ..recipes import FLOAT, QUANTIZERS, Recipe
from .quantizer import InputRounding, Quantizer
from .site import TrainedSite

PREPARED = "qclip_training"  # on a prepared model: the recipe and what it is made of


def prepare(
    model: nn.Module,
    recipe: str | Path | dict | Recipe,
    calibration: object = None,
    seed: int = 0,
    *,
    strict: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of a float model that rounds weights and inputs as `recipe` says and lets gradients through: train it in a
    loop of your own, then `convert` it. Its parameters are float32 (autocast for less); scales are parameters, too.
    What was frozen in `model` stays frozen, and the logit scale is.

    `recipe`: one whose name ends in a quantizer of training ("w4a8-lsq"), or its JSON. `calibration`: as for
    `quantize`; the static scales of inputs start where it puts them. Lookups of tokens are rounded once and stay.
    Raises as `qclip.quantize_`, and RecipeError for a recipe that is not trained.
    """
    recipe = recipes.get(recipe)
    if recipe.trained is None:
        raise RecipeError(
            f"recipe {recipe.name!r} is computed, not trained: use qclip.quantize (`qclip quantize`), or name a "
            f"quantizer of training, as in {recipe.default.name + '-lsq'!r}"
        )
    if recipe.needs_data and calibration is None:
        raise RecipeError(f"recipe {recipe.name!r} needs data to calibrate with; name a set ({option('calibration')})")
    student = copy.deepcopy(model).float()
    context = ptq.begin(student, recipe, calibration, seed, strict, progress)
    name, options = recipe.trained
    quantizer: Quantizer = QUANTIZERS.get(name)(options)
    with models.evaluating(student):
        ptq.decide(context)
        shared: dict[str, InputRounding] = {}
        states = {name: each for name, each in context.states.items() if _learns(each, quantizer)}
        built = {name: _module(each, quantizer, shared) for name, each in states.items()}
    for tower in context.towers.values():
        for site in tower:
            if site.name in built:
                tower.write(site, built[site.name].train(site.module.training))
    _show_inputs(student, context.samples, progress)
    scale = getattr(student, "logit_scale", None)
    if isinstance(scale, nn.Parameter):
        scale.requires_grad_(False)  # of few pairs it learns to be too sure
    plans = {name: each.plan for name, each in states.items()} if quantizer.rounds else {}
    facts = {"recipe": recipe, "plans": plans, "provenance": {**context.provenance, **context.notes}}
    student.__dict__[PREPARED] = facts
    return student


def _learns(state: SiteState, quantizer: Quantizer) -> bool:
    """Whether the site gets a module of ours. Lookups of tokens are rounded and stay; where nothing is rounded they
    stay as they are."""
    if state.site.kind == "embedding" and not quantizer.rounds:
        state.source.requires_grad_(False)
        return False
    return True


def _module(state: SiteState, quantizer: Quantizer, shared: dict[str, InputRounding]) -> nn.Module:
    """What stands for the site while the model learns. `shared`: input roundings by `site.shared`."""
    if state.site.kind == "embedding":
        return build(state)
    if state.branch is not None or state.negative_step is not None:
        raise RecipeError(f"{state.site.name} has a branch or twin steps from a step of the recipe, which do not learn")
    plan, (weight, _) = state.plan, state.folded()
    rounding = quantizer.weight(weight, plan)
    if state.weight is None:
        rounding.start(weight)
    else:
        weight = rounding.start_at(weight, state.weight)
    input_rounding = None
    if plan.activation_bits != FLOAT:
        key = state.site.shared
        if key not in shared or shared[key].plan != plan:
            shared[key] = quantizer.input(plan, state.site.rows * weight.shape[1])
            if state.input_scale is not None:
                shared[key].start(state.input_scale, state.input_zero)
        input_rounding = shared[key]
    module = TrainedSite(state, weight, rounding, input_rounding)
    if isinstance(state.source, nn.Conv2d):
        return QuantizedPatch(module, tuple(state.source.kernel_size))  # type: ignore[arg-type]
    return module


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What `prepare` left on a model. Raises ModelError for any other."""
    found = model.__dict__.get(PREPARED)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} is not prepared for training; call qclip.prepare(model, recipe) first"
        )
    return found  # type: ignore[no-any-return]


def trained_sites(model: nn.Module) -> Iterator[tuple[Site, TrainedSite]]:
    """The sites of a prepared model that learn."""
    for tower in models.towers(model).values():
        for site in tower:
            inner = getattr(site.module, "site", site.module)  # of patches: the linear one within
            if isinstance(inner, TrainedSite):
                yield site, inner


def restart(model: nn.Module, samples: calibrating.Samples, progress: Progress | None = None) -> None:
    """Find every scale anew, of the float weights and inputs as they are now: where rounding begins late."""
    encoders = models.encoders(model)
    found = dict(trained_sites(model))
    for module in found.values():
        module.rounding.start(module.weight.detach())
    static = [site for site, module in found.items() if module.input_rounding is not None and module.plan.static]
    if not static:
        return
    with _unrounded(model), models.evaluating(model):
        scales = calibrating.static_quantizers(
            encoders,
            models.towers(model),
            samples,
            static,
            {site.name: found[site].plan for site in static},
            {site.shared: found[site].input for site in static},
            progress,
        )
    for site in static:
        rounding = found[site].input_rounding
        assert rounding is not None
        rounding.start(*scales[site.name])
    _show_inputs(model, samples, progress)


@contextlib.contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """While the block runs, a prepared model rounds nothing: it is the float model that it has become."""
    before = {module: module.rounds for _, module in trained_sites(model)}
    for module in before:
        module.rounds = False
    try:
        yield
    finally:
        for module, rounds in before.items():
            module.rounds = rounds


def _show_inputs(model: nn.Module, samples: calibrating.Samples | None, progress: Progress | None) -> None:
    """A pass over the samples for roundings that want to see what they will round, which nothing has rounded yet."""
    wanted = {id(m.input_rounding): m for _, m in trained_sites(model) if m.input_rounding and m.input_rounding.watches}
    if not wanted or samples is None:
        return
    with stream.Hooks() as hooks, _unrounded(model), models.evaluating(model):
        for module in wanted.values():
            hooks.add(module, functools.partial(_show, module))
        stream.run(models.encoders(model), samples, models.towers(model), hooks, progress)


def _show(module: TrainedSite, x: Tensor) -> None:
    assert module.input_rounding is not None
    module.input_rounding.watch(module.input(x).float())
