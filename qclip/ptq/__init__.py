"""Post-training quantization: a recipe's methods, run in order on a float model, then every site is rounded."""

from __future__ import annotations

import copy
import fnmatch
import os
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from .. import models, recipes, rewrite
from ..calibration import Progress, samples
from ..errors import ModelError, NonFiniteError, RecipeError, option
from ..store import Store
from .base import Context, Method, SiteState, build
from .driver import BlockRun, check, decide, states
from .resume import Resumption

__all__ = [
    "BlockRun",
    "Context",
    "Method",
    "SiteState",
    "begin",
    "build",
    "decide",
    "quantize",
    "quantize_",
    "refusals",
]


def quantize(
    model: nn.Module,
    recipe: str | Path | dict | recipes.Recipe,
    calibration: object = None,
    seed: int = 0,
    *,
    strict: bool = False,
    progress: Progress | None = None,
    resume: bool | str | os.PathLike[str] = False,
) -> nn.Module:
    """`quantize_` on a copy; the float model stays as it is."""
    return quantize_(copy.deepcopy(model), recipe, calibration, seed, strict=strict, progress=progress, resume=resume)


@torch.no_grad()
def quantize_(
    model: nn.Module,
    recipe: str | Path | dict | recipes.Recipe,
    calibration: object = None,
    seed: int = 0,
    *,
    strict: bool = False,
    progress: Progress | None = None,
    resume: bool | str | os.PathLike[str] = False,
) -> nn.Module:
    """Quantize a CLIP-like model in place and return it: the same object, with other modules inside.

    `recipe`: a name (`qclip.recipes.presets()`), a Recipe, a dict or a JSON path. `calibration`: a data name, an
    ImageSet, a loader, or a tensor of preprocessed images `[n, 3, H, W]`; only some recipes need one. `strict`: an
    unreadable calibration image stops the run; else it is left out with a warning. `progress`: called as (what, done,
    in all) while samples run, strengths are searched and sites are rounded. `resume`: what methods find is kept after
    each block, in the user's cache folder (True) or in that folder, until the run is over; the same call, with the same
    weights, recipe, samples and seed, goes on where a killed one was.
    Raises ModelError (no adapter, or quantized already), RecipeError (unknown, or calibration missing), DataError,
    NonFiniteError (names the layer). When it raises, or is interrupted, the model is as before.
    """
    recipe = recipes.get(recipe)
    refuse_trained(recipe)
    before = models.Structure(model)
    with before.kept_on_error():
        context = begin(model, recipe, calibration, seed, strict, progress, Store.of(resume, "quantize"))
        return _quantize(context)


def refusals(model: nn.Module, named: Iterable[recipes.Recipe]) -> dict[str, str]:
    """Why `quantize` would refuse some of these recipes for this float model, whatever it is calibrated with, by
    `Recipe.hash`. Nothing is quantized, and the model stays as it is. Raises ModelError for a model without an adapter.
    """
    found = {}
    with models.explicit_form(model) as towers:
        try:
            _check_finite(model, towers)
        except NonFiniteError as why:
            return {recipe.hash: str(why) for recipe in named}
        encoders = models.encoders(model)
        for recipe in named:
            try:
                refuse_trained(recipe)
                _refuse_towers(recipe, towers)
                check(Context(model, recipe, towers, encoders, None, states(recipe, towers), {}))
            except RecipeError as why:
                found[recipe.hash] = str(why)
    return found


def _refuse_towers(recipe: recipes.Recipe, towers: dict[str, models.Tower]) -> None:
    if not set(recipe.towers) & set(towers):  # a recipe for both is one for a tower alone, too
        raise RecipeError(
            f"recipe {recipe.name!r} wants the {recipe.towers[0]} tower, but this model has only: {', '.join(towers)}"
        )


def refuse_trained(recipe: recipes.Recipe) -> None:
    """Raises RecipeError for a recipe that only training fulfils."""
    if recipe.trained is not None:
        raise RecipeError(
            f"recipe {recipe.name!r} is trained, not computed: use `qclip train MODEL --recipe {recipe.name} --pairs "
            "DATA` (in Python: qclip.train)"
        )


def _tell_unmatched(recipe: recipes.Recipe, towers: dict[str, models.Tower]) -> None:
    """An exception for no site is a slip of the pen, but in a preset, which is for all kinds of models."""
    if recipes.NAMED.get(recipe.name) == recipe:
        return
    names = [site.name for tower in towers.values() for site in tower]
    names += [f"{block.name}.attn.scores" for tower in towers.values() for block in tower.blocks]
    for pattern, _ in recipe.exceptions:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            warnings.warn(
                f"recipe {recipe.name!r}: the exception {pattern!r} fits no site of this model; `qclip quantize MODEL "
                "--sites` shows their names",
                stacklevel=4,
            )


def begin(
    model: nn.Module,
    recipe: recipes.Recipe,
    calibration: object,
    seed: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Context:
    """What the methods of a recipe work on: the model, brought into explicit form in place, checked, with the state of
    every site and the samples that the recipe needs. Raises as `quantize_`."""
    if (done := rewrite.quantization(model)) is not None and done.plans:
        why = "quantize" if recipe.trained is None else "no gradient passes its layers: train"
        raise ModelError(f"the model is quantized already (recipe {done.recipe.name!r}); {why} the float model instead")
    if recipe.needs_data and calibration is None:
        raise RecipeError(f"recipe {recipe.name!r} needs data to calibrate with; name a set ({option('calibration')})")
    names = {module: name for name, module in model.named_modules()}
    towers = models.towers(model)
    with models.evaluating(model):
        _refuse_towers(recipe, towers)
        _tell_unmatched(recipe, towers)
        _check_finite(model, towers)
        encoders = models.encoders(model)
        data = samples(calibration, encoders, seed=seed, strict=strict) if recipe.needs_data else None
        source_hash = rewrite.weight_hash(model)  # of the explicit form: the same for every recipe
        made_of = {
            "qclip": _version(),
            "torch": torch.__version__,
            "weights": source_hash,
            "recipe": recipe.hash,
            "samples": None if data is None else data.description["sha256"],
            "seed": seed,
        }
        kept = Resumption(Store(None) if store is None else store, made_of)
        context = Context(model, recipe, towers, encoders, data, states(recipe, towers), {}, progress, seed, kept)
        rewrite.refuse_hooks([state.site for state in context.states.values()], names)
    context.provenance = {
        "qclip": _version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "calibration": None if data is None else data.description,
        "seed": seed,
        "source_sha256": source_hash,
    }
    return context


def _quantize(context: Context) -> nn.Module:
    model = context.model
    with models.evaluating(model):
        decide(context)
        operands = context.attention_operands()
        built, total = {}, len(context.states)
        for done, (name, state) in enumerate(context.states.items()):
            context.report("rounding", done, total)
            built[name] = build(state)
        context.report("rounding", total, total)
    rewrite.write(context.towers, built, operands)
    if context.kept is not None:
        context.kept.forget()
    source = str(getattr(model, "qclip_source", type(model).__name__))
    plans = {name: state.plan for name, state in context.states.items()}
    return rewrite.mark(model, context.recipe, plans, {**context.provenance, **context.notes}, source)


def _check_finite(model: nn.Module, towers: dict[str, models.Tower]) -> None:
    """Raises NonFiniteError naming the first site, or else the first parameter, that holds NaN or Inf."""
    names = {id(p): site.name for t in towers.values() for site in t for p in site.module.parameters()}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: id(item[1]) not in names):
        if not parameter.isfinite().all():
            raise NonFiniteError(
                f"{names.get(id(parameter), name)} holds NaN or Inf in {name!r}; the checkpoint is damaged"
            )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qclip")
    except PackageNotFoundError:
        return "unknown"
