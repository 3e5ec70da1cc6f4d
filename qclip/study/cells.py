"""A plan's cells: one variant of a model under one condition each, under a hash of all that their values depend on.

A condition is the sets of one evaluation as they are (`CLEAN`), or its labelled set under one corruption at the plan's
severities; where every corruption of a group is there, the group's mean is a condition of its own. A cell's hash holds
no runtime (threads, instruction tier): the store keeps what was measured under each apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping

from qclip.data import read_lines
from qclip.data.corruptions import CORRUPTIONS, GROUPS, PUBLISHED, members
from qclip.errors import InputError
from qclip.metrics import METRICS
from qclip.reliability.measurements import MEASUREMENTS
from qclip.reliability.scores import SCORES
from qclip.store import key_of

from .facts import STAGES, Facts
from .plan import Measured, Plan, Sets, fits
from .variants import Impossible, Variant, expanded, variants

CLEAN = ""
CELL = 32  # hex digits of a cell's hash


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """The cells of one variant on one evaluation: condition -> hash."""

    variant: Variant
    sets: Sets
    cells: Mapping[str, str]

    def under(self, conditions: Collection[str]) -> Block:
        """With the cells of these conditions alone."""
        left = {condition: cell for condition, cell in self.cells.items() if condition in conditions}
        return Block(self.variant, self.sets, left)


@dataclasses.dataclass(frozen=True)
class Grid:
    """All that a plan asks for: its blocks, float first, model by model and evaluation by evaluation."""

    plan: Plan
    facts: Facts
    blocks: list[Block]
    impossible: list[Impossible]

    def __iter__(self) -> Iterator[tuple[Block, str, str]]:
        """Every cell: its block, condition and hash."""
        for block in self.blocks:
            for condition, cell in block.cells.items():
                yield block, condition, cell

    def __len__(self) -> int:
        return sum(len(block.cells) for block in self.blocks)

    def evaluations(self) -> dict[tuple[str, str], list[Block]]:
        """The blocks of each model on each labelled set, float first."""
        found: dict[tuple[str, str], list[Block]] = {}
        for block in self.blocks:
            found.setdefault((block.variant.model, block.sets.data), []).append(block)
        return found

    def cells(self) -> set[str]:
        return {cell for _, _, cell in self}


def conditions(measured: Measured) -> list[str]:
    """`CLEAN`, every corruption, and every group of which each corruption is there."""
    there = set(measured.corruptions)
    groups = [name for name in (PUBLISHED, *GROUPS) if members(name) and set(members(name)) <= there]
    return [CLEAN, *measured.corruptions, *groups]


def corruptions_of(condition: str) -> tuple[str, ...]:
    """The corruptions that a condition is measured from."""
    return () if condition == CLEAN else members(condition) if condition in (PUBLISHED, *GROUPS) else (condition,)


def expand(plan: Plan, facts: Facts) -> Grid:
    """Raises InputError where nothing is left."""
    impossible: dict[Impossible, None] = {}
    blocks: list[Block] = []
    _told_apart(plan, facts)
    keys = {sets: _conditions(plan.measured, sets, facts) for sets in plan.sets}
    for model in plan.models:
        on = [sets for sets in plan.sets if fits(sets.models, model)]
        if not on:
            raise plan.refusal(f"no set is evaluated with model {model!r}", "", "models", model)
        recipes, unmade = expanded(plan, model)
        wanted, unfit = variants(plan, recipes, model, facts.refused.get(model, {}))
        impossible |= dict.fromkeys([*unmade, *unfit])
        if model in facts.quantized and len(wanted) > 1:
            why = f"{model} is quantized already; name the float model, and this one in [artifacts]"
            impossible |= {Impossible(each.label, why): None for each in wanted[1:]}
            wanted = wanted[:1]
        known = []
        by_key: dict[str, Variant] = {}
        for each in wanted:
            key = _variant(each, facts, plan.measured)
            if (same := by_key.setdefault(key, each)) is each:
                known.append((each, hashlib.sha256(key.encode())))
            else:
                impossible[Impossible(each.label, f"it is {same.label} of {model} under another name")] = None
        for sets in on:
            ends = [(condition, key.encode()) for condition, key in keys[sets].items()]
            for variant, begun in known:
                blocks.append(Block(variant, sets, {condition: _cell(begun, end) for condition, end in ends}))
    return Grid(plan, facts, blocks, list(impossible))


def _told_apart(plan: Plan, facts: Facts) -> None:
    """A cell has one name in a plan: no two models or evaluations of a model are the same. Raises InputError."""
    models: dict[str, str] = {}
    for model in plan.models:
        if (same := models.setdefault(facts.models[model], model)) != model:
            raise plan.refusal(f"{model!r} is {same!r} under another name; name it once", "", "models", model)
        on: set[str] = set()
        for sets in (each for each in plan.sets if fits(each.models, model)):
            if (key := facts.sets[sets.data]) in on:
                why = f"{model!r} is evaluated twice on {sets.data!r}; put what is measured beside it into one [[data]]"
                raise plan.refusal_of(sets.data, why)
            on.add(key)


def _cell(begun: hashlib._Hash, end: bytes) -> str:
    whole = begun.copy()
    whole.update(end)
    return whole.hexdigest()[:CELL]


def _variant(variant: Variant, facts: Facts, measured: Measured) -> str:
    return key_of(
        "variant",
        STAGES["variant"],
        model=facts.models[variant.model],
        quantized=quantize_key(variant, facts, measured.strict),
    )


def quantize_key(variant: Variant, facts: Facts, strict: bool) -> str:
    """Of all that decides what a variant's weights are but the runtime; "" of a float model."""
    if variant.artifact is not None:
        return facts.artifacts[variant.artifact]
    if variant.recipe is None:
        return ""
    recipe = {key: value for key, value in variant.recipe.to_dict().items() if key != "name"}
    return key_of(
        "quantize",
        STAGES["quantize"],
        model=facts.models[variant.model],
        recipe=recipe,
        calibration=None if variant.calibration is None else facts.sets[variant.calibration],
        seed=variant.seed if variant.calibration is not None else 0,
        strict=strict,
    )


def _conditions(measured: Measured, sets: Sets, facts: Facts) -> dict[str, str]:
    """The key of each condition of an evaluation. What is measured under a corruption is of the labelled set alone, and
    of what temperatures were fitted on."""
    named = {name: each and facts.sets[each] for name, each in (("dev", sets.dev), ("proxy", sets.proxy))}
    both = {
        "data": facts.sets[sets.data],
        **named,
        "templates": measured.templates,
        "seed": measured.seed,
        "replicates": measured.replicates,
        "metrics": {name: METRICS.get(name).version for name in METRICS},
        "strict": measured.strict,
    }
    clean = {
        "ood": [[kind, [facts.sets[each] for each in listed]] for kind, listed in sets.ood],
        "shift": [facts.sets[each] for each in sets.shift],
        "captions": [facts.sets[each] for each in sets.captions],
        "images": [facts.sets[each] for each in sets.images],
        "train": sets.train and facts.sets[sets.train],
        "scores": list(SCORES.names() if measured.scores is None else measured.scores),
        "measurements": measurements(measured),
        "negatives": None if measured.negatives is None else read_lines(measured.negatives, "negatives"),
        "spectra": measured.spectra,
    }
    noise = {name: getattr(measured, name) for name in ("severities", "full", "jpeg85")}
    out = {}
    for condition in conditions(measured):
        versions = {name: CORRUPTIONS.get(name).version for name in corruptions_of(condition)}
        parts = both | (clean if condition == CLEAN else {"corruptions": versions, **noise})
        out[condition] = key_of("condition", STAGES["condition"], condition=condition, **parts)
    return out


def measurements(measured: Measured) -> list[str]:
    """Names of what is measured on sets as they are. Raises InputError where nothing is."""
    found = [n for n in (measured.measurements or MEASUREMENTS.names()) if n != "corrupted"]
    if not found:
        raise InputError("a plan measures sets as they are, too; name more than 'corrupted' in `measurements`")
    return found
