"""The variants of each model that a plan asks for, and those that cannot be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from qclip import recipes as qrecipes
from qclip.errors import InputError, RecipeError
from qclip.recipes import RTN, Recipe

from .plan import Plan, Product

FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model as it is (neither recipe nor artifact), quantized by a recipe, or an artifact of it that exists."""

    model: str
    label: str
    recipe: Recipe | None = None
    calibration: str | None = None  # a data name; None where the recipe needs none
    seed: int = 0
    artifact: str | None = None

    @property
    def is_float(self) -> bool:
        return self.recipe is None and self.artifact is None


@dataclasses.dataclass(frozen=True)
class Impossible:
    name: str
    why: str


def named(product: Product) -> Iterator[Recipe | Impossible]:
    """The recipes of a product, each under the name that says it; `-gN` or `-channel` where groups were given."""
    methods, groups = product.methods, product.groups or (None,)
    for method, static, w, a, group in itertools.product(
        methods, product.static, product.weights, product.activations, groups
    ):
        name = f"w{w:g}a{a}" + ("-static" if static else "") + ("" if method == RTN else f"-{method}")
        full = name if group is None else f"{name}-g{group}" if group else f"{name}-channel"
        try:
            found = qrecipes.parse(name)
            if group is not None:
                treatment = dataclasses.replace(found.default, group=group or None)
                found = dataclasses.replace(found, name=full, default=treatment)
        except RecipeError as why:
            yield Impossible(full, str(why))
        else:
            yield found


def expanded(plan: Plan, model: str) -> tuple[list[Recipe], list[Impossible]]:
    """Every recipe of a model once, and what cannot be made into a variant. Raises InputError where two recipes that
    differ have one name."""
    recipes: dict[str, Recipe] = {}
    impossible: list[Impossible] = []
    for each in (*plan.recipes, *(each for product in plan.products_of(model) for each in named(product))):
        if isinstance(each, Impossible):
            impossible.append(each)
        elif each.trained is not None:
            why = "it is trained, not computed: run `qclip train` and name what it writes in [artifacts]"
            impossible.append(Impossible(each.name, why))
        elif recipes.setdefault(each.name, each).hash != each.hash or each.name == FLOAT:
            raise InputError(f"{plan.path}: two recipes are named {each.name!r}; rename one of them")
    return list(recipes.values()), impossible


def variants(
    plan: Plan, recipes: list[Recipe], model: str, refused: Mapping[str, str] = {}
) -> tuple[list[Variant], list[Impossible]]:
    """Float first; a recipe that needs data once for each calibration set and seed, any other once. And what cannot be
    made of this model. refused: hash of a recipe -> why its methods cannot do it to this model."""
    out, impossible = [Variant(model, FLOAT)], []
    sets = plan.calibrated_on(model)
    for recipe in recipes:
        if recipe.hash in refused:
            impossible.append(Impossible(f"{recipe.name} of {model}", refused[recipe.hash]))
            continue
        if not recipe.needs_data:
            out.append(Variant(model, recipe.name, recipe))
            continue
        if not sets:
            why = f"it needs data to calibrate {model} with; name some in `calibration`"
            impossible.append(Impossible(recipe.name, why))
        for data, seed in itertools.product(sets, plan.seeds):
            label = recipe.name + (f" on {data}" if len(sets) > 1 else "")
            label += f" seed {seed}" if len(plan.seeds) > 1 else ""
            out.append(Variant(model, label, recipe, data, seed))
    taken = {each.label for each in out}
    for folder in dict(plan.artifacts).get(model, ()):
        label = folder.rstrip("/").rpartition("/")[2] or folder
        if label in taken:
            raise InputError(
                f"{plan.path}: two variants of {model!r} are named {label!r}; rename the folder {folder!r}"
            )
        taken.add(label)
        out.append(Variant(model, label, artifact=folder))
    return out, impossible
