"""A plan, read from its file. What can be refused without a model or an image is refused here, with the line."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Iterable, Mapping
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

from .cells import measurements
from .plan import KINDS, Measured, Plan, Product, Sets
from .plan_fields import Fields

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
    except RecursionError:
        raise InputError(f"plan {str(path)!r} nests its values too deeply; write them flat") from None
    return _Reader(content, Plan((), (), (), (), text=text, path=str(path))).plan()


class _Reader(Fields):
    """Takes a file's tables one by one."""

    def __init__(self, content: dict[str, Any], blank: Plan) -> None:
        super().__init__(blank)
        self.content = content

    def plan(self) -> Plan:
        top = self.content
        self.known(top, TOP, "")
        for key in ("models", "data"):
            if not top.get(key):
                raise InputError(f"{self.blank.path}: a plan needs `{key}`, and at least one of them")
        models = self.texts(top, "", "models")
        recipes = self.recipes(top)
        products = tuple(self.product(each, models, at) for at, each in enumerate(self.listed(top, "", "methods")))
        artifacts = self.artifacts(top, models)
        if not (recipes or products or artifacts):
            raise InputError(f"{self.blank.path}: the product of recipes is empty; give `recipes`, `[methods]` or both")
        self.filled(top, "", "seeds")
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

    def product(self, table: Any, models: tuple[str, ...], at: int) -> Product:
        self.known(self.table(table, "methods"), [f.name for f in dataclasses.fields(Product)], "methods", at)
        for name in self.listed(table, "methods", "methods"):
            for part in str(name).split("+"):
                if part != qrecipes.RTN:
                    self.taken(functools.partial(METHODS.get, part), "methods", "methods", name, at)
        static = self.listed(table, "methods", "static")
        if any(type(each) is not bool for each in static):
            raise self.blank.refusal("`static` takes true, false or both", "methods", "static", at=at)
        weights = self.listed(table, "methods", "weights")
        for bits in weights:
            if type(bits) not in (int, float) or not 1 <= bits <= 8:
                raise self.blank.refusal(f"weights of {bits!r} bits; use 1 to 8", "methods", "weights", bits, at)
        given = {
            "methods": self.texts(table, "methods", "methods", at),
            "weights": tuple(weights),
            "activations": self.numbers(table, "methods", "activations", 2, 16, at),
            "groups": self.numbers(table, "methods", "groups", 0, 128, at),
            "static": tuple(static),
            "models": self.texts(table, "methods", "models", at),
        }
        for name in given:
            self.filled(table, "methods", name, at)
        found = Product(**{name: values for name, values in given.items() if values})
        self.patterns(found.models, models, "methods", at)
        return found

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
            self.patterns(patterns, models, "data", at)
            (data,) = self.data(table, "data", "data", at)
            out.append(Sets(data, models=patterns, **chosen))
        if len(set(out)) < len(out):
            twice = next(each for each in out if out.count(each) > 1)
            raise self.blank.refusal_of(twice.data, f"{twice.data!r} is evaluated twice; once is enough")
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
        for name in self.texts(noise, "corruptions", "names"):
            self.taken(functools.partial(qcorruptions.expand, [name]), "corruptions", "names", name)
        for key, registry in (("scores", SCORES), ("measurements", MEASUREMENTS)):
            self.filled(said, "statistics", key)
            for name in self.texts(said, "statistics", key):
                self.taken(functools.partial(registry.get, name), "statistics", key, name)
        self.filled(noise, "corruptions", "severities")
        whole = {
            key: self.number(said, "statistics", key, low, high)
            for key, low, high in (("seed", 0, 2**32 - 1), ("batch", 1, 4096), ("replicates", 1, 10**6))
        }
        flags = {key: self.flag(table, name, key) for table, name, key in self._flags(noise, said)}
        more: dict[str, Any] = {key: value for key, value in (whole | flags).items() if value is not None}
        found = Measured(
            corruptions=qcorruptions.expand(self.texts(noise, "corruptions", "names")),
            severities=tuple(sorted(self.numbers(noise, "corruptions", "severities", 1, 5))) or qcorruptions.SEVERITIES,
            scores=self.texts(said, "statistics", "scores") or None,
            measurements=self.texts(said, "statistics", "measurements") or None,
            templates=self.one(said, "statistics", "templates", named=False),
            negatives=self.one(said, "statistics", "negatives", named=False),
            **more,
        )
        self.taken(functools.partial(measurements, found), "statistics", "measurements")
        return found

    @staticmethod
    def _flags(noise: Mapping[str, Any], said: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str, str]]:
        both = [(noise, "corruptions", key) for key in ("full", "jpeg85")]
        return [*both, *((said, "statistics", key) for key in ("strict", "spectra"))]
