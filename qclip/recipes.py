"""A recipe says, for every site, how many bits and how they are found. It is data: frozen, and JSON both ways.

Names compose: `wXaY[-static][-METHOD[+METHOD]]`, X weight bits (a fraction is an average over sites, where a method
gives them widths), Y activation bits (16 = float). `wXaY` alone is round to nearest with min-max weights: per output
channel, or groups of 128 at 4 bits. A name that ends in a quantizer of training (`w4a8-lsq`, `w4a4-rotation+lsq`) is a
recipe that `qclip train` fulfils and nothing else; `float-continued` is the one that rounds nothing. `NAMED` are
recipes that no such name says in full.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qkernels.grids import KINDS, OBSERVERS, Grid

from . import typed
from .errors import RecipeError, nearest
from .files import write_atomic
from .registry import Registry
from .untrusted import is_file, parse_json, read_json
from .untrusted.schema import shown

FLOAT = 16  # the number of activation bits that means "not quantized"
TOWERS = ("vision", "text")
ACTIVATION_GRIDS = ("sym", "asym")
SOFTMAX = ("uniform", "log-sqrt2", "twin")
ACTIVATION_OBSERVERS = ("min-max", "ema", "percentile", "mse")
NEEDS = ("inputs", "gradients")  # what a method may need calibration data for
DECIDES = ("input", "weight")  # what a method may decide: transforms and scales of inputs, codes of weights
CONTINUED = "float-continued"  # the control of every trained recipe: the same steps, and nothing is rounded
RTN = "rtn"  # round to nearest: what is done where no method says otherwise, so it is no step

#: Post-training methods, classes like `ptq.Method`: ours, those of entry points "qclip.methods", and registered ones.
METHODS: Registry[Any] = Registry(
    "method",
    "qclip.methods",
    {
        "smoothquant": "qclip.ptq.methods.smoothquant:SmoothQuant",
        "repq-vit": "qclip.ptq.methods.repq_vit:RepQViT",
        "ptq4vit": "qclip.ptq.methods.ptq4vit:PTQ4ViT",
        "hqq": "qclip.ptq.methods.hqq:HQQ",
        "raana": "qclip.ptq.methods.raana:RaanA",
        "rotation": "qclip.ptq.methods.rotation:Rotation",
        "svdquant": "qclip.ptq.methods.svdquant:SVDQuant",
        "gptq": "qclip.ptq.methods.gptq:GPTQ",
        "awq": "qclip.ptq.methods.awq:AWQ",
    },
    attributes=("options", "needs", "inputs", "decides", "leaves"),
    error=RecipeError,
)

#: Quantizers of training, classes like `training.quantizer.Quantizer`: ours, those of entry points "qclip.quantizers",
#: and registered ones.
QUANTIZERS: Registry[Any] = Registry(
    "quantizer",
    "qclip.quantizers",
    {
        "ste": "qclip.training.quantizers.ste:STE",
        "lsq": "qclip.training.quantizers.lsq:LSQ",
        "lsq-authors": "qclip.training.quantizers.lsq_authors:LSQAuthors",
        "lsq-token": "qclip.training.quantizers.lsq_token:LSQToken",
        "lsq-plus": "qclip.training.quantizers.lsq_plus:LSQPlus",
        "pact": "qclip.training.quantizers.pact:PACT",
        "dorefa": "qclip.training.quantizers.dorefa:DoReFa",
        "ewgs": "qclip.training.quantizers.ewgs:EWGS",
        "ofq": "qclip.training.quantizers.ofq:OFQ",
        "variation": "qclip.training.quantizers.variation:Variation",
        "reliable": "qclip.training.quantizers.reliable:Reliable",
        "continued": "qclip.training.quantizers.continued:Continued",
        "noise": "qclip.training.quantizers.noise:Noise",
        "noise-measured": "qclip.training.quantizers.noise:MeasuredNoise",
    },
    attributes=("options", "treatment", "methods", "weight", "input", "rounds"),
    error=RecipeError,
)


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How one site is quantized. The defaults are those of a recipe's JSON.

    `weight_observer`: weight scales cover all values (`"min-max"`), or are those of least squared error (`"mse"`), or
    the best of three percentiles by squared error (`"percentile"`).
    `weight_grid`: a kind of `qkernels.Grid`; None: `sym` at 5 bits and above, `symfull`, the better one there, below,
    and `midrise`, plus and minus, at 1 bit.
    `activation_observer`: how `static` ranges are found (docs/methods.md, Activation ranges). Raises RecipeError.
    """

    weight_bits: int = 8
    activation_bits: int = 8  # FLOAT: the input stays float
    group: int | None = None  # consecutive inputs that share a weight scale; None = a whole output channel
    static: bool = False  # activation scale found by calibration, per tensor; else per token at run time
    weight_observer: str = "min-max"  # one of OBSERVERS
    weight_grid: str | None = None  # one of KINDS
    # What follows is written into JSON only where it differs, so that recipes of before keep their hashes.
    weight_scale: str = "channel"  # or "tensor": one for the whole weight
    activation_grid: str = "sym"  # or "asym": with a zero point, static per tensor, else per token (simulated)
    activation_observer: str = "mse"  # one of ACTIVATION_OBSERVERS
    activation_percentile: float = 99.99  # that the observer "percentile" takes; of asym, at both ends

    def __post_init__(self) -> None:
        if not 1 <= self.weight_bits <= 8:
            raise RecipeError(f"weights of {shown(self.weight_bits)} bits are not supported; use 1 to 8")
        if self.activation_bits != FLOAT and not 2 <= self.activation_bits <= 8:
            raise RecipeError(
                f"activations of {shown(self.activation_bits)} bits are not supported; use 2 to 8, or 16 for float"
            )
        if self.static and self.activation_bits == FLOAT:
            raise RecipeError("float activations (a16) have no static scale; drop 'static'")
        if self.group not in (None, 32, 64, 128):
            raise RecipeError(f"groups of {shown(self.group)} are not supported; use 32, 64 or 128")
        if self.weight_grid is not None and self.weight_grid not in KINDS:
            raise RecipeError(f"unknown weight_grid {shown(self.weight_grid)}; {nearest(self.weight_grid, KINDS)}")
        try:
            self.grid.container  # noqa: B018 - raises where no weight has such a grid
        except ValueError as why:
            raise RecipeError(str(why)) from None
        for name, known in (
            ("weight_observer", OBSERVERS),
            ("weight_scale", ("channel", "tensor")),
            ("activation_grid", ACTIVATION_GRIDS),
            ("activation_observer", ACTIVATION_OBSERVERS),
        ):
            if (value := getattr(self, name)) not in known:
                raise RecipeError(f"unknown {name} {shown(value)}; {nearest(value, known)}")
        if self.weight_scale == "tensor" and self.group is not None:
            raise RecipeError("one scale for the whole weight (weight_scale 'tensor') leaves no groups; drop 'group'")
        self._check_activations()

    def _check_activations(self) -> None:
        if self.activation_grid != "sym" and self.activation_bits == FLOAT:
            raise RecipeError(f"float activations (a16) have no grid; drop activation_grid {self.activation_grid!r}")
        if self.activation_observer != "mse" and not self.static:
            raise RecipeError(
                f"activation_observer {self.activation_observer!r} finds static ranges; set 'static', or drop it: "
                "dynamic ranges are those of each token"
            )
        if self.activation_percentile != 99.99 and self.activation_observer != "percentile":
            raise RecipeError("activation_percentile is for activation_observer 'percentile'; set that, or drop it")
        if not 50 < self.activation_percentile <= 100:
            raise RecipeError(
                f"activation_percentile must lie above 50 and not above 100, not at {self.activation_percentile:g}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the fields that every recipe has, and of the others those that differ from the default."""
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _LATER or value != plain[name]
        }

    @staticmethod
    def named(text: str, static: bool = False) -> Treatment:
        """What `wXaY` means, `static` where its activations can be. Raises RecipeError."""
        match = re.fullmatch(r"w(\d{1,3})a(\d{1,3})", text)
        if match is None:
            raise RecipeError(f"{shown(text)} is not of the form wXaY")
        weight_bits, activation_bits = int(match[1]), int(match[2])
        return Treatment(
            weight_bits, activation_bits, 128 if weight_bits == 4 else None, static and activation_bits != FLOAT
        )

    @property
    def grid(self) -> Grid:
        """Of the weights."""
        usual = "midrise" if self.weight_bits == 1 else "sym" if self.weight_bits >= 5 else "symfull"
        kind = self.weight_grid or usual
        return Grid(self.weight_bits, kind, self.group)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"


_LATER = ("weight_scale", "activation_grid", "activation_observer", "activation_percentile")


@dataclasses.dataclass(frozen=True)
class AttentionTreatment:
    """How the operands of the products inside attention, QK^T and PV, are quantized: q, k, v by static scales, the
    softmax's output on codes of its own. No kernel multiplies them, so attention is simulated then. Raises RecipeError.

    `softmax`: "uniform" steps, "log-sqrt2" (powers of sqrt(1/2), RepQ-ViT) or "twin" (two ranges, PTQ4ViT); each with
    the scale of least squared error.
    """

    bits: int = 8
    softmax: str = "uniform"  # one of SOFTMAX
    scale: str = "tensor"  # of q, k and v; or "head"
    grid: str = "sym"  # of q, k and v; or "asym"
    observer: str = "mse"  # of q, k and v: one of ACTIVATION_OBSERVERS

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(
                f"attention of {shown(self.bits)} bits is not supported; use 2 to 8, or leave it out: float"
            )
        for name, known in (
            ("softmax", SOFTMAX),
            ("scale", ("tensor", "head")),
            ("grid", ACTIVATION_GRIDS),
            ("observer", ACTIVATION_OBSERVERS),
        ):
            if (value := getattr(self, name)) not in known:
                raise RecipeError(f"attention: unknown {name} {shown(value)}; {nearest(value, known)}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is quantized: every site by `default`, then by `steps`, one after the other.

    `exceptions` are (pattern, treatment) pairs, patterns as in `fnmatch` over site names; the last match wins. A
    treatment may be given as `"float"` (held as None) or as `"wXaY"`, which means what it means as a recipe's name
    and is static where `default` is. `steps` are (method, its options); `step` makes one. `attention`: None leaves the
    products inside attention float. `trained`: (quantizer, its options) with which training finds weights and scales,
    behind `steps`; None: nothing is trained. Raises RecipeError.
    """

    name: str
    default: Treatment = Treatment()
    exceptions: tuple[tuple[str, Treatment | None], ...] = ()
    steps: tuple[tuple[str, Any], ...] = ()
    towers: tuple[str, ...] = TOWERS
    attention: AttentionTreatment | None = None
    trained: tuple[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable():
            raise RecipeError(f"a recipe's name is one line of text, not {shown(self.name)}")
        with _of(self.name):
            if not self.towers or set(self.towers) - set(TOWERS):
                raise RecipeError(f"towers are 'vision' and 'text', not {shown(self.towers)}")
            given: dict[str, Treatment | None] = {}
            for pattern, treatment in self.exceptions:
                if not isinstance(pattern, str):
                    raise RecipeError(f"an exception's pattern is a text, not {shown(pattern)}")
                if pattern in given:
                    raise RecipeError(f"two exceptions are for {shown(pattern)}; keep one")
                given[pattern] = self._treatment(pattern, treatment)
            object.__setattr__(self, "exceptions", tuple(given.items()))
            for at, (method, options) in enumerate(self.steps):
                kind = METHODS.get(method)
                if not isinstance(options, kind.options):
                    raise RecipeError(f"the options of {method!r} are {kind.options.__name__}; make them with `step`")
                if odd := sorted(set(kind.needs) - set(NEEDS)):
                    raise RecipeError(f"method {method!r} needs {odd[0]!r}; {nearest(odd[0], NEEDS)}")
                if method in [name for name, _ in self.steps[:at]]:
                    raise RecipeError(f"method {method!r} is there twice; keep one")
            self._check_order()
            if self.trained is not None:
                self._check_trained(*self.trained)

    def _check_trained(self, quantizer: str, options: Any) -> None:
        kind = QUANTIZERS.get(quantizer)
        if not isinstance(options, kind.options):
            raise RecipeError(f"the options of {quantizer!r} are {kind.options.__name__}; make them with `trained_by`")
        if self.attention is not None:
            raise RecipeError("operands of attention are not trained; drop 'attention'")
        for method, _ in self.steps:
            if "weight" in self.decides(method) and not getattr(kind, "from_codes", False):
                raise RecipeError(
                    f"method {method!r} finds codes, and training with {quantizer!r} cannot begin with them: its "
                    f"scales follow from the weights; drop {method!r}, or train with 'lsq'"
                )

    def _check_order(self) -> None:
        """Codes are for inputs as they are when they are found: whoever changes inputs comes first."""
        found = ""  # the method that has found the codes
        for method, options in self.steps:
            decides = METHODS.get(method)(options).decides
            if odd := sorted(set(decides) - set(DECIDES)):
                raise RecipeError(f"method {method!r} decides {odd[0]!r}; {nearest(odd[0], DECIDES)}")
            decides = self.decides(method)
            if found and "weight" in decides:
                raise RecipeError(f"methods {found!r} and {method!r} both decide the weights' codes; keep one")
            if found and "input" in decides:
                raise RecipeError(
                    f"method {method!r} changes inputs for which {found!r} has found codes before; "
                    f"put {method!r} before {found!r}"
                )
            found = method if "weight" in decides else found

    def decides(self, method: str) -> frozenset[str]:
        """What a step decides here, of `DECIDES`: all but what it leaves to a later one that decides it."""
        at = [name for name, _ in self.steps].index(method)
        own, *later = [frozenset(METHODS.get(name)(options).decides) for name, options in self.steps[at:]]
        return own - (METHODS.get(method).leaves & frozenset().union(*later))

    def _treatment(self, pattern: str, wanted: object) -> Treatment | None:
        if wanted is None or wanted == "float":
            return None
        if isinstance(wanted, Treatment):
            return wanted
        with _at(f"exception {shown(pattern)}"):
            if not isinstance(wanted, str) or re.fullmatch(r"w\d+a\d+", wanted) is None:
                raise RecipeError(f"a treatment is 'float', 'wXaY' or an object of fields, not {shown(wanted)}")
            return Treatment.named(wanted, self.default.static)

    @property
    def method(self) -> str:
        """For tables: names of the methods, and of the quantizer of training, joined by "+"; "rtn" where there are
        none."""
        return "+".join(name for name, _ in (*self.steps, *((self.trained,) if self.trained else ()))) or RTN

    @property
    def bits(self) -> str:
        """For tables: "8/8", "4/float", "3.3/8"; "float" where training rounds nothing in the end."""
        if self.trained is not None and not QUANTIZERS.get(self.trained[0]).rounds:
            return "float"
        activation = "float" if self.default.activation_bits == FLOAT else str(self.default.activation_bits)
        averages = [average for _, o in self.steps if (average := getattr(o, "average", None)) is not None]
        return f"{(averages or [self.default.weight_bits])[0]:g}/{activation}"

    @property
    def needs_data(self) -> bool:
        treatments = [self.default, *(treatment for _, treatment in self.exceptions)]
        return (
            self.attention is not None
            or any(t is not None and t.static for t in treatments)
            or any(METHODS.get(m).needs for m, _ in self.steps)
        )

    @property
    def hash(self) -> str:
        """12 hex digits over everything but the name: equal hash = the same treatment."""
        content = {k: v for k, v in self.to_dict().items() if k != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def plan(self, name: str, kind: str) -> Treatment | None:
        """What this recipe wants of the site `name` of `kind` (`models.tower.KINDS`); None: it stays float."""
        treatment, excepted = self.default, False
        for pattern, wanted in self.exceptions:
            if fnmatch.fnmatchcase(name, pattern):
                treatment, excepted = wanted, True  # type: ignore[assignment]
        if name.split(".", 1)[0] not in self.towers or treatment is None:
            return None
        if kind == "embedding":  # a lookup: one scale per row, dequantized after it
            return Treatment(8, FLOAT)
        if kind == "patch" and not excepted:  # pixels: 8 bits cost nothing and lose nothing, whatever the blocks use
            return Treatment(8, 8)
        return treatment

    def attention_plan(self, name: str) -> AttentionTreatment | None:
        """What this recipe wants of the products inside attention, `name` ("vision.blocks.3.attn.scores"); None: float,
        as where the last exception that matches says "float"."""
        excepted = False
        for pattern, wanted in self.exceptions:
            if fnmatch.fnmatchcase(name, pattern):
                excepted = wanted is None
        return None if excepted or name.split(".", 1)[0] not in self.towers else self.attention

    def to_dict(self) -> dict:
        """As JSON has it: the default's fields beside the others, exceptions by pattern, steps with their options."""
        rest: dict[str, Any] = {} if self.attention is None else {"attention": dataclasses.asdict(self.attention)}
        if self.trained is not None:
            quantizer, options = self.trained
            rest["trained"] = {"quantizer": quantizer, **dataclasses.asdict(options)}
        return {
            "name": self.name,
            **self.default.to_dict(),
            "steps": [{"method": method, **dataclasses.asdict(options)} for method, options in self.steps],
            "towers": list(self.towers),
            "exceptions": {pattern: self._written(treatment) for pattern, treatment in self.exceptions},
            **rest,
        }

    def _written(self, treatment: Treatment | None) -> str | dict:
        if treatment is None:
            return "float"
        short = Treatment.named(treatment.name, self.default.static) == treatment
        return treatment.name if short else treatment.to_dict()

    def to_json(self, path: str | Path | None = None) -> str:
        """The recipe as JSON, which also becomes the file at `path`, whole. Raises OutputError."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            write_atomic(path, f"{text}\n".encode())
        return text

    @classmethod
    def from_dict(cls, content: dict) -> Recipe:
        """From what JSON gives; every field but the name may be missing. Instead of `steps`, `method` may name
        methods joined by "+". Raises RecipeError."""
        if not isinstance(content, dict) or "name" not in content:
            raise RecipeError("a recipe is a JSON object with at least 'name', 'weight_bits' and 'activation_bits'")
        name = content["name"]
        with _of(name):
            whole = typed.from_dict(_Written, {"name": name, **_known(content)}, "", RecipeError)
            default = typed.from_dict(Treatment, _treated(content), "", RecipeError)
            if "steps" in content and "method" in content:
                raise RecipeError("'method' and 'steps' say the same; drop 'method'")
            exceptions = []
            for pattern, wanted in content.get("exceptions", {}).items():
                what = f"exception {shown(pattern)}"
                if isinstance(wanted, dict):
                    wanted = typed.from_dict(Treatment, wanted, what, RecipeError)
                elif not isinstance(wanted, str):
                    raise RecipeError(f"{what} is 'float', 'wXaY' or an object of fields, not {shown(wanted)}")
                exceptions.append((pattern, wanted))
            steps = _steps(whole.method) if "method" in content else tuple(map(_step, content.get("steps", [])))
            attention = whole.attention
            if attention is not None:
                attention = typed.from_dict(AttentionTreatment, attention, "attention", RecipeError)
            trained = None if whole.trained is None else _trained(whole.trained)
        return cls(name, default, tuple(exceptions), steps, whole.towers, attention, trained)  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, source: str | Path) -> Recipe:
        """`source`: a path, or the JSON text itself."""
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return cls.from_dict(parse_json(source, source.strip()[:60], RecipeError))
        return cls.from_dict(read_json(Path(source), RecipeError))


@dataclasses.dataclass(frozen=True)
class _Written:
    """The fields of a recipe's JSON besides those of its default treatment."""

    name: str
    exceptions: dict = dataclasses.field(default_factory=dict)
    steps: list = dataclasses.field(default_factory=list)
    method: str = RTN
    towers: tuple[str, ...] = TOWERS
    attention: dict | None = None
    trained: dict | None = None


def _treated(content: dict) -> dict:
    return {key: value for key, value in content.items() if key in typed.fields(Treatment)}


def _known(content: dict) -> dict:
    """The fields of a recipe that are not its default treatment's. Raises RecipeError for an unknown field."""
    known = [*typed.fields(_Written), *typed.fields(Treatment)]
    for key in content:
        if key not in known:
            raise RecipeError(f"unknown field {shown(key)}; {nearest(str(key), known)}")
    return {key: value for key, value in content.items() if key not in typed.fields(Treatment)}


@contextlib.contextmanager
def _at(what: str) -> Iterator[None]:
    """A RecipeError raised inside begins with `what`."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{what}: {error}") from None


def _of(name: object) -> contextlib.AbstractContextManager[None]:
    return _at(f"recipe {shown(name)}")


def step(method: str, **options: Any) -> tuple[str, Any]:
    """A step of a recipe: `step("smoothquant", alpha=0.5)`. Raises RecipeError: unknown method, unfit options."""
    kind = METHODS.get(method)
    return method, typed.from_dict(kind.options, options, f"method {method!r}", RecipeError)


def trained_by(quantizer: str, **options: Any) -> tuple[str, Any]:
    """What `Recipe.trained` holds: `trained_by("lsq")`. Raises RecipeError: unknown quantizer, unfit options."""
    kind = QUANTIZERS.get(quantizer)
    return quantizer, typed.from_dict(kind.options, options, f"quantizer {quantizer!r}", RecipeError)


def _trained(content: dict) -> tuple[str, Any]:
    if not isinstance(content.get("quantizer"), str):
        raise RecipeError(f"'trained' is an object with 'quantizer' and its options, not {shown(content)}")
    return trained_by(**content)


def _step(content: object) -> tuple[str, Any]:
    if isinstance(content, str):
        return step(content)
    if not isinstance(content, dict) or not isinstance(content.get("method"), str):
        raise RecipeError(f"a step is a method's name or an object with 'method' and its options, not {shown(content)}")
    return step(**content)


def _steps(names: str) -> tuple[tuple[str, Any], ...]:
    return tuple(step(name) for name in names.split("+") if name != RTN)


NAMED = {
    # What a 4-bit tower loses most by, for its size, is first the projection, then values and the attention's output.
    "w4a8-mixed": Recipe(
        "w4a8-mixed",
        Treatment(4, 8, group=128, weight_observer="mse"),
        exceptions=tuple((pattern, Treatment(8, 8)) for pattern in ("*.v", "*.out", "*.projection")),
    ),
}


def parse(name: str) -> Recipe:
    """`"w8a8"`, `"w4a8-smoothquant"`, `"w8a8-static-smoothquant"` ... -> Recipe. Raises RecipeError."""
    if name in NAMED:
        return NAMED[name]
    if name == CONTINUED:
        return Recipe(name, Treatment(8, FLOAT), trained=trained_by("continued"))
    bits, *parts = name.split("-")
    match = re.fullmatch(r"w(\d{1,3})(\.\d{1,6})?(a\d+)", bits)
    if match is None or "" in parts:
        raise RecipeError(
            f"unknown recipe {shown(name)}; {nearest(name, presets())} (or wXaY[-static][-METHOD], or a JSON file)"
        )
    static = parts[:1] == ["static"]
    whole, fraction, activation = match.groups()
    with _of(name):
        treatment = dataclasses.replace(Treatment.named(f"w{whole}{activation}"), static=static)
        *methods, last = ("-".join(parts[static:]) or RTN).split("+")
        trained = trained_by(last) if last in QUANTIZERS else None
        if trained is None and last not in METHODS and last != RTN:
            raise RecipeError(f"unknown method {shown(last)}; {nearest(last, [*METHODS, *QUANTIZERS])}")
        names = [*methods] if trained else [*methods, last]
        if trained is not None:
            treatment = QUANTIZERS.get(last).treatment(treatment)
            names = names or [*QUANTIZERS.get(last).methods(treatment)]
        steps = _steps("+".join(names)) if names else ()
        if fraction is not None:
            steps = _averaging(steps, float(whole + fraction))
    return Recipe(name, treatment, steps=steps, trained=trained)


def _averaging(steps: tuple[tuple[str, Any], ...], average: float) -> tuple[tuple[str, Any], ...]:
    """The steps with that average of weight bits as the option of the method that has one."""
    found = [method for method, options in steps if hasattr(options, "average")]
    if not found:
        has = [name for name, method in METHODS.items() if hasattr(method.options, "average")]
        raise RecipeError(
            f"{average:g} weight bits are an average over sites, which takes a method that gives them widths of their "
            f"own: {', '.join(has)}"
        )
    return tuple(step(m, average=average) if m == found[0] else (m, options) for m, options in steps)


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
        "w6a8": "6-bit weights per channel on the INT8 kernels, INT8 activations; smaller on disk than w8a8",
        "w4a8": "INT4 weights in groups of 128, INT8 activations dynamic per token",
        "w4a8-mixed": "w4a8 with scales of least squared error, v, out and projections INT8: 4.8 bits, nearer to float",
        "w4a8-gptq": "w4a8 with GPTQ: later columns make rounding errors good, 5 times nearer to float (needs data)",
        "w4a16": "INT4 weights in groups of 128, float activations",
        "w3.3a8-raana": "RaBitQ codes of 3.3 bits on average, allocated to the sites, INT8 activations (needs data)",
        "w4a4": "INT4 weights in groups of 128, 4-bit activations; simulated",
    }
