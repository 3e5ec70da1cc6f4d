"""A plan: which models, recipes and sets a study is of, and what is measured. A TOML file (docs/study.md).

Its smallest form names `models`, `recipes` and `data`; float is always a row. Everything that can be refused without a
model or an image is refused here, with the line of the file.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qclip import files
from qclip import recipes as qrecipes
from qclip.data import corruptions as qcorruptions
from qclip.data import sources
from qclip.errors import InputError, nearest
from qclip.recipes import METHODS, Recipe
from qclip.reliability.measurements import MEASUREMENTS
from qclip.reliability.scores import SCORES
from qclip.reliability.writer import REPLICATES

from .toml_lines import line_of

KINDS = ("near", "far", "")  # of OOD sets


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
    """Recipes by a product: methods x weight bits x activation bits x groups x static."""

    methods: tuple[str, ...] = (qrecipes.RTN,)
    weights: tuple[float, ...] = (8,)  # a fraction is an average over sites
    activations: tuple[int, ...] = (8,)  # 16: float
    groups: tuple[int, ...] = ()  # inputs that share a scale, 0 for a whole output channel; none: what wXaY means
    static: tuple[bool, ...] = (False,)


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

    def calibrated_on(self, model: str) -> tuple[str, ...]:
        """The calibration sets of a model: those of the first pattern that fits it."""
        return next((sets for pattern, sets in self.calibration if fnmatch.fnmatchcase(model, pattern)), ())

    def refusal(self, why: object, table: str, key: str, value: object = None, at: int = 0) -> InputError:
        """An InputError that begins with the file and the line."""
        line = line_of(self.text, table, key, value, at)
        return InputError(f"{self.path}, line {line}: {why}")


TOP = ("models", "recipes", "data", "artifacts", "calibration", "seeds", "shift", "captions", "images", "dev", "train")
TOP += ("proxy", "methods", "corruptions", "ood", "statistics")
SETS = ("data", "models", "near", "far", "ood", "shift", "captions", "images", "dev", "train", "proxy")
CORRUPTIONS = ("names", "severities", "full", "jpeg85")
OOD = ("near", "far", "sets")
STATISTICS = ("scores", "measurements", "templates", "negatives", "replicates", "seed", "batch", "strict", "spectra")


def read(path: str | Path) -> Plan:
    """The plan in a file. Raises InputError with the line of what cannot be used."""
    text = files.read_text(path, "plan")
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as why:
        raise InputError(f"plan {str(path)!r} is no TOML: {why}") from None
    return _Reader(content, text, str(path)).plan()


class _Reader:
    """Takes the fields of one plan, each with its type, and says where what does not fit stands."""

    def __init__(self, content: dict[str, Any], text: str, path: str) -> None:
        self.content = content
        self.blank = Plan((), (), (), (), text=text, path=path)

    def plan(self) -> Plan:
        top = self.content
        self.known(top, TOP, "")
        for key in ("models", "data"):
            if not top.get(key):
                raise InputError(f"{self.blank.path}: a plan needs `{key}`, and at least one of them")
        models = self.texts(top, "", "models")
        recipes = self.recipes(top)
        products = (self.product(top["methods"]),) if "methods" in top else ()
        artifacts = self.artifacts(top, models)
        if not (recipes or products or artifacts):
            raise InputError(f"{self.blank.path}: the product of recipes is empty; give `recipes`, `[methods]` or both")
        return dataclasses.replace(
            self.blank,
            models=models,
            recipes=recipes,
            products=products,
            sets=self.sets(top, models),
            artifacts=artifacts,
            calibration=self.calibration(top),
            seeds=self.numbers(top, "", "seeds", 0, 2**32 - 1) or (0,),
            measured=self.measured(top),
        )

    # what a table holds

    def recipes(self, top: Mapping[str, Any]) -> tuple[Recipe, ...]:
        found = []
        given = self.listed(top, "", "recipes")
        for each in given:
            if not isinstance(each, (str, dict)):
                raise self.blank.refusal(f"a recipe is a name, a file or a table, not {each!r}", "", "recipes", each)
            if each == "float":
                continue  # always a row
            with_line = each if isinstance(each, str) else None
            found.append(self.taken(functools.partial(qrecipes.get, each), "", "recipes", with_line))
        return tuple(found)

    def product(self, table: Any) -> Product:
        self.known(self.table(table, "methods"), [f.name for f in dataclasses.fields(Product)], "methods")
        for name in self.listed(table, "methods", "methods"):
            for part in str(name).split("+"):
                if part != qrecipes.RTN:
                    self.taken(functools.partial(METHODS.get, part), "methods", "methods", name)
        static = self.listed(table, "methods", "static")
        if any(type(each) is not bool for each in static):
            raise self.blank.refusal("`static` takes true, false or both", "methods", "static")
        weights = self.listed(table, "methods", "weights")
        for bits in weights:
            if type(bits) not in (int, float) or not 1 <= bits <= 8:
                raise self.blank.refusal(f"weights of {bits!r} bits; use 1 to 8", "methods", "weights", bits)
        given = {
            "methods": self.texts(table, "methods", "methods"),
            "weights": tuple(weights),
            "activations": self.numbers(table, "methods", "activations", 2, 16),
            "groups": self.numbers(table, "methods", "groups", 0, 128),
            "static": tuple(static),
        }
        for name, values in given.items():
            if name in table and not values:
                raise self.blank.refusal(f"`{name}` is empty, and so is the product", "methods", name)
        return Product(**{name: values for name, values in given.items() if values})

    def artifacts(self, top: Mapping[str, Any], models: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        table = self.table(top.get("artifacts", {}), "artifacts")
        for model in table:
            if model not in models:
                raise self.blank.refusal(
                    f"artifacts of {model!r}, which is none of `models`; {nearest(model, models)}", "artifacts", model
                )
        return tuple((model, self.texts(table, "artifacts", model)) for model in table)

    def calibration(self, top: Mapping[str, Any]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        given = top.get("calibration", [])
        if isinstance(given, dict):
            return tuple((pattern, self.data(given, "calibration", pattern)) for pattern in given)
        found = self.data(top, "", "calibration")
        return (("*", found),) if found else ()

    def sets(self, top: Mapping[str, Any], models: tuple[str, ...]) -> tuple[Sets, ...]:
        given = self.listed(top, "", "data")
        common: dict[str, Any] = {
            "shift": self.data(top, "", "shift"),
            "captions": self.data(top, "", "captions"),
            "images": self.data(top, "", "images"),
            "dev": self.one(top, "", "dev"),
            "train": self.one(top, "", "train"),
            "proxy": self.one(top, "", "proxy"),
            "ood": self.ood(self.table(top.get("ood", {}), "ood"), "ood", OOD, "sets"),
        }
        out = []
        for at, each in enumerate(given):
            if isinstance(each, str):
                self.taken(functools.partial(sources.parse, each), "", "data", each)
                out.append(Sets(each, **common))
                continue
            table = self.table(each, "data")
            self.known(table, SETS, "data", at)
            if not isinstance(table.get("data"), str):
                raise self.blank.refusal("a table [[data]] names its set in `data`", "data", "data", at=at)
            own: dict[str, Any] = {key: self.data(table, "data", key, at) for key in ("shift", "captions", "images")}
            own |= {key: self.one(table, "data", key, at) for key in ("dev", "train", "proxy")}
            own["ood"] = self.ood(table, "data", (), "ood", at)
            chosen: dict[str, Any] = {key: value or common[key] for key, value in own.items()}
            patterns = self.texts(table, "data", "models", at) or ("*",)
            (data,) = self.data(table, "data", "data", at)
            out.append(Sets(data, models=patterns, **chosen))
        if len(set(out)) < len(out):
            twice = next(each for each in out if out.count(each) > 1)
            raise self.blank.refusal(f"{twice.data!r} is evaluated twice; once is enough", "", "data", twice.data)
        return tuple(out)

    def ood(
        self, table: Mapping[str, Any], name: str, known: Iterable[str], other: str, at: int = 0
    ) -> tuple[tuple[str, tuple[str, ...]], ...]:
        if known:
            self.known(table, known, name, at)
        found = {kind: self.data(table, name, kind or other, at) for kind in KINDS}
        return tuple((kind, listed) for kind, listed in found.items() if listed)

    def measured(self, top: Mapping[str, Any]) -> Measured:
        noise = self.table(top.get("corruptions", {}), "corruptions")
        said = self.table(top.get("statistics", {}), "statistics")
        self.known(noise, CORRUPTIONS, "corruptions")
        self.known(said, STATISTICS, "statistics")
        for name in self.listed(noise, "corruptions", "names"):
            self.taken(functools.partial(qcorruptions.expand, [name]), "corruptions", "names", name)
        for key, registry in (("scores", SCORES), ("measurements", MEASUREMENTS)):
            for name in self.listed(said, "statistics", key):
                self.taken(functools.partial(registry.get, name), "statistics", key, name)
        whole = {
            key: self.numbers(said, "statistics", key, low, high)
            for key, low, high in (("seed", 0, 2**32 - 1), ("batch", 1, 4096), ("replicates", 1, 10**6))
        }
        flags = {key: self.flag(table, name, key) for table, name, key in self._flags(noise, said)}
        more: dict[str, Any] = {key: values[0] for key, values in whole.items() if values}
        more |= {key: value for key, value in flags.items() if value is not None}
        return Measured(
            corruptions=qcorruptions.expand(self.texts(noise, "corruptions", "names")),
            severities=tuple(sorted(self.numbers(noise, "corruptions", "severities", 1, 5))) or qcorruptions.SEVERITIES,
            scores=self.texts(said, "statistics", "scores") or None,
            measurements=self.texts(said, "statistics", "measurements") or None,
            templates=self.one(said, "statistics", "templates", named=False),
            negatives=self.one(said, "statistics", "negatives", named=False),
            **more,
        )

    @staticmethod
    def _flags(noise: Mapping[str, Any], said: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str, str]]:
        both = [(noise, "corruptions", key) for key in ("full", "jpeg85")]
        return [*both, *((said, "statistics", key) for key in ("strict", "spectra"))]

    # fields, with their types

    def known(self, table: Mapping[str, Any], known: Iterable[str], name: str, at: int = 0) -> None:
        for key in table:
            if key not in known:
                where = f" in [{name}]" if name else ""
                raise self.blank.refusal(f"unknown field {key!r}{where}; {nearest(key, known)}", name, key, at=at)

    def table(self, value: Any, name: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.blank.refusal(f"{name!r} is a table of fields, not {value!r}", "", name)
        return value

    def listed(self, table: Mapping[str, Any], name: str, key: str) -> list[Any]:
        """What a field holds; one value is a list of one."""
        value = table.get(key, [])
        return value if isinstance(value, list) else [value]

    def texts(self, table: Mapping[str, Any], name: str, key: str, at: int = 0) -> tuple[str, ...]:
        found = self.listed(table, name, key)
        for value in found:
            if not isinstance(value, str) or not value:
                raise self.blank.refusal(f"`{key}` takes texts, not {value!r}", name, key, value, at)
            if found.count(value) > 1:
                raise self.blank.refusal(f"{value!r} is there twice; once is enough", name, key, value, at)
        return tuple(found)

    def data(self, table: Mapping[str, Any], name: str, key: str, at: int = 0) -> tuple[str, ...]:
        """Data names."""
        found = self.texts(table, name, key, at)
        for value in found:
            self.taken(functools.partial(sources.parse, value), name, key, value, at)
        return found

    def one(self, table: Mapping[str, Any], name: str, key: str, at: int = 0, named: bool = True) -> str | None:
        found = self.data(table, name, key, at) if named else self.texts(table, name, key, at)
        if len(found) > 1:
            raise self.blank.refusal(f"`{key}` takes one, not {len(found)}", name, key, at=at)
        return found[0] if found else None

    def numbers(self, table: Mapping[str, Any], name: str, key: str, low: int, high: int) -> tuple[int, ...]:
        found = self.listed(table, name, key)
        for value in found:
            if type(value) is not int or not low <= value <= high:
                raise self.blank.refusal(
                    f"`{key}` takes whole numbers from {low} to {high}, not {value!r}", name, key, value
                )
            if found.count(value) > 1:
                raise self.blank.refusal(f"`{key}` holds {value} twice; once is enough", name, key, value)
        return tuple(found)

    def flag(self, table: Mapping[str, Any], name: str, key: str) -> bool | None:
        value = table.get(key)
        if value is not None and type(value) is not bool:
            raise self.blank.refusal(f"`{key}` takes true or false, not {value!r}", name, key)
        return value

    def taken(self, make: Callable[[], Any], table: str, key: str, value: object = None, at: int = 0) -> Any:
        """What `make` gives; what it refuses is refused with the line."""
        try:
            return make()
        except InputError as why:
            raise self.blank.refusal(why, table, key, value, at) from None
