"""A plan: which models, recipes and sets a study is of, and what is measured. A TOML file (docs/studies.md).

Its smallest form names `models`, `recipes` and `data`; float is always a row. Everything that can be refused without a
model or an image is refused when its file is read (`plan_file.py`), with the line.
"""

from __future__ import annotations

import dataclasses
import fnmatch

from qclip import recipes as qrecipes
from qclip.data import corruptions as qcorruptions
from qclip.errors import InputError
from qclip.recipes import Recipe
from qclip.reliability.writer import REPLICATES

from .toml_lines import first_line, line_of

KINDS = ("near", "far", "")  # of OOD sets


def fits(patterns: tuple[str, ...], model: str) -> bool:
    return any(fnmatch.fnmatchcase(model, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class Sets:
    """One evaluation: a labelled set and what is measured beside it, as `qclip.evaluate` takes them."""

    data: str
    ood: tuple[tuple[str, tuple[str, ...]], ...] = ()  # kind -> sets
    shift: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    dev: str | None = None
    train: str | None = None
    proxy: str | None = None
    models: tuple[str, ...] = ("*",)  # patterns of the models that are evaluated on it

    def names(self) -> list[str]:
        """Every data name in it."""
        single = [name for name in (self.dev, self.train, self.proxy) if name is not None]
        return [
            self.data,
            *(n for _, each in self.ood for n in each),
            *self.shift,
            *self.captions,
            *self.images,
            *single,
        ]


@dataclasses.dataclass(frozen=True)
class Product:
    """Recipes by a product: methods x weight bits x activation bits x groups x static. models: patterns of those that
    they are for."""

    methods: tuple[str, ...] = (qrecipes.RTN,)
    weights: tuple[float, ...] = (8,)  # a fraction is an average over sites
    activations: tuple[int, ...] = (8,)  # 16: float
    groups: tuple[int, ...] = ()  # inputs that share a scale, 0 for a whole output channel; none: what wXaY means
    static: tuple[bool, ...] = (False,)
    models: tuple[str, ...] = ("*",)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured, and how: arguments of `qclip.evaluate`."""

    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = qcorruptions.SEVERITIES
    full: bool = False
    jpeg85: bool = False
    scores: tuple[str, ...] | None = None
    measurements: tuple[str, ...] | None = None
    templates: str | None = None
    negatives: str | None = None
    replicates: int = REPLICATES
    seed: int = 0
    batch: int = 64
    strict: bool = False
    spectra: bool = False  # of the weights, as well


@dataclasses.dataclass(frozen=True)
class Plan:
    """models: names that `load_model` takes. artifacts: by model, folders of quantized variants that exist already
    (`qclip train` and `qclip quantize` write them). calibration: by pattern of models, the sets that recipes which need
    data are calibrated on; such a recipe is a variant for each set and each of `seeds`, any other is one variant."""

    models: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    products: tuple[Product, ...]
    sets: tuple[Sets, ...]
    artifacts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    calibration: tuple[tuple[str, tuple[str, ...]], ...] = ()
    seeds: tuple[int, ...] = (0,)
    measured: Measured = Measured()
    text: str = ""  # the file
    path: str = ""

    def products_of(self, model: str) -> tuple[Product, ...]:
        return tuple(each for each in self.products if fits(each.models, model))

    def calibrated_on(self, model: str) -> tuple[str, ...]:
        """The calibration sets of a model: those of the first pattern that fits it."""
        return next((sets for pattern, sets in self.calibration if fits((pattern,), model)), ())

    def refusal(self, why: object, table: str, key: str, value: object = None, at: int = 0) -> InputError:
        """An InputError that begins with the file and the line."""
        line = line_of(self.text, table, key, value, at)
        return InputError(f"{self.path}, line {line}: {why}")

    def refusal_of(self, name: str, why: object) -> InputError:
        """An InputError that begins with the file and the first line that holds a name."""
        return InputError(f"{self.path}, line {first_line(self.text, name)}: {why}")
