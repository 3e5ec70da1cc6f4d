"""A recipe says, for every site, how many bits and how they are found. It is data: frozen, and JSON both ways.

Names compose: `wXaY[-static][-METHOD[+METHOD]]`, X weight bits, Y activation bits (16 = float). `wXaY` alone is
round to nearest with min-max weights: per output channel, or groups of 128 at 4 bits. `NAMED` are recipes that no
such name says in full.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from .errors import RecipeError, nearest
from .untrusted import is_file, parse_json, read_json

FLOAT = 16  # the number of activation bits that means "not quantized"
OBSERVERS = ("min-max", "mse")  # of weight scales
METHODS = ("rtn", "smoothquant")
State = Literal["real", "simulated", "float"]


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """What a recipe wants of one site."""

    state: State  # kernels run it / float arithmetic on the quantization grid / untouched
    weight_bits: int = 8
    activation_bits: int = 8  # FLOAT: the input stays float
    group: int | None = None  # consecutive inputs that share a weight scale; None = a whole output channel
    static: bool = False  # activation scale found by calibration, per tensor; else per token at run time
    weight_observer: str = "min-max"  # one of OBSERVERS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    `exceptions` are (pattern, treatment) pairs, patterns as in `fnmatch` over site names, treatment `"float"` or
    `"wXaY"`, which means what it means as a recipe's name; the last match wins. `group` holds for 4-bit weights only.
    `weight_observer`: weight scales cover all values (`"min-max"`), or are those of least squared error (`"mse"`).
    Grids: `sym` at 5 bits and above, `symfull` below (methods 2.0); activations `sym`.
    """

    name: str
    weight_bits: int = 8
    activation_bits: int = 8
    group: int | None = None
    static: bool = False
    method: str = "rtn"  # methods joined by "+"
    towers: tuple[str, ...] = ("vision", "text")
    exceptions: tuple[tuple[str, str], ...] = ()
    weight_observer: str = "min-max"

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise RecipeError(f"recipe {self.name!r}: weights of {self.weight_bits} bits are not supported; use 2 to 8")
        if self.activation_bits != FLOAT and not 2 <= self.activation_bits <= 8:
            raise RecipeError(
                f"recipe {self.name!r}: activations of {self.activation_bits} bits are not supported; "
                "use 2 to 8, or 16 for float"
            )
        if self.static and self.activation_bits == FLOAT:
            raise RecipeError(f"recipe {self.name!r}: float activations (a16) have no static scale; drop '-static'")
        if self.group not in (None, 32, 64, 128):
            raise RecipeError(f"recipe {self.name!r}: groups of {self.group} are not supported; use 32, 64 or 128")
        if self.group is not None and self.weight_bits != 4:
            raise RecipeError(f"recipe {self.name!r}: groups are for 4-bit weights only; drop 'group'")
        if self.weight_observer not in OBSERVERS:
            raise RecipeError(
                f"recipe {self.name!r}: unknown weight_observer {self.weight_observer!r}; "
                f"{nearest(self.weight_observer, OBSERVERS)}"
            )
        for method in self.methods:
            if method not in METHODS:
                raise RecipeError(f"recipe {self.name!r}: unknown method {method!r}; {nearest(method, METHODS)}")
        if not self.towers or set(self.towers) - {"vision", "text"}:
            raise RecipeError(f"recipe {self.name!r}: towers are 'vision' and 'text', not {self.towers!r}")
        for pattern, treatment in self.exceptions:
            if treatment != "float" and not re.fullmatch(r"w[2-8]a(16|[2-8])", treatment):
                raise RecipeError(
                    f"recipe {self.name!r}: exception {pattern!r} must be 'float' or 'wXaY', not {treatment!r}"
                )

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.method.split("+"))

    @property
    def bits(self) -> str:
        """For tables: "8/8", "4/float"."""
        activation = "float" if self.activation_bits == FLOAT else str(self.activation_bits)
        return f"{self.weight_bits}/{activation}"

    @property
    def needs_data(self) -> bool:
        return self.static or "smoothquant" in self.methods

    @property
    def hash(self) -> str:
        """12 hex digits over everything but the name: equal hash = the same treatment."""
        content = {k: v for k, v in self.to_dict().items() if k != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def plan(self, name: str, kind: str) -> SitePlan:
        """What this recipe wants of the site `name` of `kind` (`models.tower.KINDS`)."""
        weight_bits, activation_bits, group = self.weight_bits, self.activation_bits, self.group
        observer = self.weight_observer
        treatment = None
        for pattern, wanted in self.exceptions:
            if fnmatch.fnmatchcase(name, pattern):
                treatment = wanted
        if name.split(".", 1)[0] not in self.towers or treatment == "float":
            return SitePlan("float")
        if kind == "embedding":  # a lookup: one scale a row, dequantized after it
            return SitePlan("real", 8, FLOAT)
        if treatment is not None:
            weight_bits, activation_bits = parse_bits(treatment)
            group, observer = 128 if weight_bits == 4 else None, "min-max"
        elif kind == "patch":  # pixels: 8 bits cost nothing and lose nothing, whatever the blocks use
            return SitePlan("real", 8, 8)
        static = self.static and activation_bits != FLOAT
        real = (weight_bits, activation_bits) in {(8, 8), (4, 8), (4, FLOAT)}
        return SitePlan("real" if real else "simulated", weight_bits, activation_bits, group, static, observer)

    def to_dict(self) -> dict:
        out = dataclasses.asdict(self)
        out["towers"] = list(self.towers)
        out["exceptions"] = dict(self.exceptions)
        return out

    def to_json(self, path: str | Path | None = None) -> str:
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_dict(cls, content: dict) -> Recipe:
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(content, dict) or "name" not in content:
            raise RecipeError("a recipe is a JSON object with at least 'name', 'weight_bits' and 'activation_bits'")
        if unknown := sorted(set(content) - known):
            raise RecipeError(f"recipe {content['name']!r}: unknown field {unknown[0]!r}; {nearest(unknown[0], known)}")
        for field, (kinds, wanted) in _FIELDS.items():
            value = content.get(field)
            if field in content and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                raise RecipeError(
                    f"recipe {content['name']!r}: {field!r} has the wrong type; it takes {wanted}, not {value!r}"
                )
        content = dict(content)
        content["towers"] = tuple(content.get("towers", ("vision", "text")))
        content["exceptions"] = tuple((str(k), str(v)) for k, v in dict(content.get("exceptions", {})).items())
        return cls(**content)

    @classmethod
    def from_json(cls, source: str | Path) -> Recipe:
        """`source`: a path, or the JSON text itself."""
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return cls.from_dict(parse_json(source, source.strip()[:60], RecipeError))
        return cls.from_dict(read_json(Path(source), RecipeError))


_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "name": ((str,), "a text"),
    "weight_bits": ((int,), "a whole number"),
    "activation_bits": ((int,), "a whole number"),
    "group": ((int, type(None)), "a whole number or null"),
    "static": ((bool,), "true or false"),
    "method": ((str,), "names joined by '+'"),
    "towers": ((list, tuple), "a list of 'vision' and 'text'"),
    "exceptions": ((dict,), "an object {pattern: treatment}"),
    "weight_observer": ((str,), "'min-max' or 'mse'"),
}


NAMED = {
    # What a 4-bit tower loses most by, for its size, is first the projection, then values and the attention's output.
    "w4a8-mixed": Recipe(
        "w4a8-mixed",
        4,
        8,
        group=128,
        weight_observer="mse",
        exceptions=(("*.v", "w8a8"), ("*.out", "w8a8"), ("*.projection", "w8a8")),
    ),
}


def parse_bits(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"w(\d+)a(\d+)", text)
    if match is None:
        raise RecipeError(f"{text!r} is not of the form wXaY")
    return int(match[1]), int(match[2])


def parse(name: str) -> Recipe:
    """`"w8a8"`, `"w4a8-smoothquant"`, `"w8a8-static-smoothquant"` ... -> Recipe. Raises RecipeError."""
    if name in NAMED:
        return NAMED[name]
    parts = name.split("-")
    if re.fullmatch(r"w\d+a\d+", parts[0]) is None or "" in parts:
        raise RecipeError(
            f"unknown recipe {name!r}; {nearest(name, presets())} (or wXaY[-static][-METHOD], or a JSON file)"
        )
    weight_bits, activation_bits = parse_bits(parts[0])
    static = len(parts) > 1 and parts[1] == "static"
    method = "-".join(parts[2 if static else 1 :]) or "rtn"
    return Recipe(
        name=name,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        static=static,
        method=method,
        group=128 if weight_bits == 4 else None,
    )


def get(recipe: str | Path | dict | Recipe) -> Recipe:
    """A recipe from what a user may give: a Recipe, its name, a dict, or a path to its JSON."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, Path) or str(recipe).endswith(".json"):
        if not is_file(Path(recipe), RecipeError):
            raise RecipeError(f"recipe file {str(recipe)!r} does not exist")
        return Recipe.from_json(Path(recipe))
    return parse(recipe)


def presets() -> dict[str, str]:
    """The names that are tested and documented, with what they mean."""
    return {
        "w8a8": "INT8 weights per channel, INT8 activations dynamic per token",
        "w8a8-static": "INT8, activation scales per tensor from calibration (needs data)",
        "w8a8-smoothquant": "INT8 with SmoothQuant, strength searched per block (needs data)",
        "w4a8": "INT4 weights in groups of 128, INT8 activations dynamic per token",
        "w4a8-mixed": "w4a8 with scales of least squared error, v, out and projections INT8: 4.8 bits, nearer to float",
        "w4a16": "INT4 weights in groups of 128, float activations",
        "w6a8": "6-bit weights, INT8 activations; simulated",
        "w4a4": "INT4 weights in groups of 128, 4-bit activations; simulated",
    }
