"""The arms of a comparison: a recipe of training and its controls. They see the same pairs in the same order, for as
many steps, by the same objective and rates; each differs from the recipe in one thing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from .. import recipes
from ..errors import InputError, RecipeError, nearest
from ..recipes import CONTINUED, QUANTIZERS, Recipe, trained_by
from ..training import Settings

#: Controls by name, and what each is.
CONTROLS = {
    "untrained": "the recipe without a step: what calibration alone gives",
    "float-tuned": "the float model with its logit scale fitted on the held-out pairs",
    CONTINUED: "the float model trained by the same steps, nothing rounded",
    "noise": "noise as wide as a step of the grids where the recipe rounds, none when deployed",
    "noise-measured": "noise of the mean square of the rounding errors, none when deployed",
    "lsq-authors": "LSQ as the paper's authors published it, by their objective and rates",
}
USUAL = tuple(name for name in CONTROLS if name != "noise-measured")
#: Settings that every arm shares, of another quantizer, too.
SHARED = ("steps", "batch", "micro", "precision", "checkpointing", "held_out", "pairs", "save_every", "warmup", "seed")


@dataclasses.dataclass(frozen=True)
class Arm:
    """`settings`: all of `training.Settings` but the seed. `folder`: what its runs are called on disk, where recipes of
    several widths may stand side by side."""

    name: str
    about: str
    recipe: Recipe
    settings: dict[str, Any]
    folder: str


def arms(recipe: Recipe, controls: Sequence[str] | None = None, **settings: Any) -> list[Arm]:
    """The recipe first, then its controls (`CONTROLS`; None: the usual ones). Raises RecipeError for a recipe that is
    not trained or is a control itself, InputError for an unknown control and for settings that are none."""
    if recipe.trained is None or not QUANTIZERS.get(recipe.trained[0]).rounds:
        what = "computed, not trained" if recipe.trained is None else "a control itself"
        raise RecipeError(f"recipe {recipe.name!r} is {what}; name one that is trained and rounds, as in w4a8-lsq")
    if recipe.name in CONTROLS:
        raise RecipeError(f"recipe {recipe.name!r} has the name of a control; rename it in its JSON file")
    authors = recipe.trained[0] == "lsq-authors"
    names = [n for n in USUAL if not (authors and n == "lsq-authors")] if controls is None else list(controls)
    for name in names:
        if name not in CONTROLS:
            raise InputError(f"unknown control {name!r}; {nearest(name, CONTROLS)}")
        if names.count(name) > 1:
            raise InputError(f"the control {name!r} was named twice; once is enough")
    own = dataclasses.asdict(Settings.of(recipe, **settings))
    own.pop("seed")
    found = [Arm(recipe.name, "the recipe", recipe, own, recipe.name), *(_control(n, recipe, own) for n in names)]
    return [dataclasses.replace(arm, folder=re.sub(r"[^\w.+-]", "-", arm.folder)) for arm in found]


def _control(name: str, recipe: Recipe, own: dict[str, Any]) -> Arm:
    folder = name
    if name == "untrained":
        own, folder = own | {"steps": 0}, f"{recipe.name}-untrained"
    elif name == "lsq-authors":
        recipe = recipes.get(folder := f"{recipe.default.name}-lsq-authors")
        shared = {key: own[key] for key in SHARED if key in own}
        own = dataclasses.asdict(Settings.of(recipe, **shared))
        own.pop("seed")
    elif name in ("noise", "noise-measured"):
        folder = f"{recipe.default.name}-{name}"
        recipe = dataclasses.replace(recipe, name=folder, steps=_of_inputs(recipe), trained=trained_by(name))
    else:
        recipe = _unrounded(recipe)
        own = own | ({"steps": 0, "logit_scale": "tuned"} if name == "float-tuned" else {})
    return Arm(name, CONTROLS[name], recipe, own, folder)


def _unrounded(recipe: Recipe) -> Recipe:
    """Float continuation of the same sites behind the same steps, whatever the widths are: recipes of several widths
    share it."""
    continued = recipes.get(CONTINUED)
    exceptions = tuple((pattern, plan and continued.default) for pattern, plan in recipe.exceptions)
    return dataclasses.replace(continued, steps=_of_inputs(recipe), towers=recipe.towers, exceptions=exceptions)


def _of_inputs(recipe: Recipe) -> tuple[tuple[str, Any], ...]:
    """The steps without those that find codes: where nothing is rounded there are none to begin with."""
    return tuple(step for step in recipe.steps if "weight" not in recipe.decides(step[0]))
