"""A recipe whose widths spend a size best, from sensitivities: most bits where fewer hurt most."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from .. import models
from ..errors import InputError, RecipeError
from ..layers import grid_bits
from ..models.tower import Tower
from ..ptq.allocation import Choice, InfeasibleError, allocate
from ..recipes import Recipe, Treatment
from ..results import Results
from .groups import Group, groups

LOW = 2  # bits at which damages do not add up: choices that go so low are measured again as a whole
SWAPS = 24  # pairs of choices that are tried then
INPUT = ("activation_bits", "static", "activation_grid", "activation_observer", "activation_percentile")

Whole = Callable[[dict[str, int]], float]  # widths by group -> what they do together


@dataclasses.dataclass(frozen=True)
class Budget:
    """`bits` a quantized weight, its scales, zeros and side terms included, or `bytes` of all the model's tensors."""

    text: str
    bits: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """ "4.5bit" or "60MB" (10^6 bytes; "MiB" is 2^20, kB and GB likewise). Raises RecipeError."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(bits?|[kMG]i?B)", text.strip())
        if match is None or float(match[1]) <= 0:
            raise RecipeError(f"a budget is a number of bits a weight or a size, such as 4.5bit or 60MB, not {text!r}")
        number, unit = float(match[1]), match[2]
        if unit.startswith("bit"):
            return cls(text.strip(), bits=number)
        base = 1024 if "i" in unit else 1000
        return cls(text.strip(), bytes=int(number * base ** (" kMG".index(unit[0]))))

    def allows(self, weights: int, rest: int) -> int:
        """Bits for `weights` weights beside `rest` bytes of everything else."""
        if self.bits is None:
            return 8 * ((self.bytes or 0) - rest)
        return math.floor(round(self.bits * weights, 3))  # 2.3 x 10 is 23 and not a little less

    def said(self, bits: int, weights: int, rest: int) -> str:
        """So many bits of weights, in the budget's own unit, rounded up: what is said can be met."""
        if self.bits is not None:
            return f"{math.ceil(1000 * bits / weights) / 1000:.3f}bit"
        return f"{math.ceil((bits / 8 + rest) / 1e3) / 1e3:.3f}MB"


def budgeted(
    model: nn.Module,
    budget: str | Budget,
    sensitivities: Results,
    base: Recipe | None = None,
    whole: Whole | None = None,
) -> Recipe:
    """`base` (default: `w4a8`) with the widths of its sites chosen so that the summed sensitivity is least within the
    budget. Only widths that were measured are used, on the grids and in the groups of `wXaY`; the rest is that of
    `base`, whose activation bits must be those that were measured. Sizes are those on disk, with what the steps of
    `base` hold beside the codes.

    whole: measures widths by group together; where a site gets 2 bits or fewer, pairs of groups are tried one step up
    and down by it. Raises RecipeError naming the nearest budget that can be met, or what of `base` contradicts one;
    InputError for sensitivities of other sites.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    base = base or Recipe("w4a8", Treatment.named("w4a8"))
    _check(base)
    with models.explicit_form(model) as towers, torch.no_grad():
        found = groups(towers, base)
        _check_inputs(base, found)
        fixed = _fixed_bytes(model, towers, base, found)
        tables = [_choices(group, base, sensitivities) for group in found]
        weights = sum(group.weights for group in found)
        room = budget.allows(weights, fixed)
        try:
            chosen = allocate([[choice for _, choice in table] for table in tables], room)
        except InfeasibleError as why:
            raise RecipeError(
                f"a budget of {budget.text} cannot be met; the nearest that can is "
                f"{budget.said(why.least, weights, fixed)} ({_extremes(tables)})"
            ) from None
        if whole is not None and min(tables[i][c][0].weight_bits for i, c in enumerate(chosen)) <= LOW:
            chosen = _refined(found, tables, chosen, room, whole)
        widths = {site.name: tables[i][c][0] for i, c in enumerate(chosen) for site in found[i].sites}
    most = Counter(widths.values()).most_common(1)[0][0]
    methods = "" if base.method == "rtn" else f"-{base.method}"
    name = f"{budget.text}-a{base.default.activation_bits}{methods}"
    kept = tuple((pattern, each) for pattern, each in base.exceptions if pattern not in widths)
    plain = dataclasses.replace(base, name=name, default=most, exceptions=kept)
    kinds = {site.name: site.kind for group in found for site in group.sites}
    others = tuple((site, each) for site, each in widths.items() if plain.plan(site, kinds[site]) != each)
    return dataclasses.replace(plain, exceptions=(*kept, *others))


def _check(base: Recipe) -> None:
    """Raises RecipeError where a recipe says what a budget decides."""
    if own := [method for method, options in base.steps if hasattr(options, "average")]:
        raise RecipeError(
            f"a budget gives sites their widths, and so does {own[0]!r} of recipe {base.name!r}; use one of both"
        )
    plan, usual = base.default, _treated(base, base.default.weight_bits)
    for name in ("group", "weight_grid", "weight_scale"):
        if getattr(plan, name) != getattr(usual, name):
            raise RecipeError(f"a budget treats weights as wXaY does; leave {name!r} out of recipe {base.name!r}")


def _check_inputs(base: Recipe, found: list[Group]) -> None:
    """Raises RecipeError for a site whose input an exception treats otherwise than those that were measured."""
    for site in (site for group in found for site in group.sites):
        plan = base.plan(site.name, site.kind)
        if any(getattr(plan, name) != getattr(base.default, name) for name in INPUT):
            raise RecipeError(
                f"a budget treats all inputs as {base.default.name}, and recipe {base.name!r} has an exception for "
                f"that of {site.name}; make it 'float', or drop it"
            )


def _treated(base: Recipe, bits: int) -> Treatment:
    """What `base` means of a site at that width."""
    plan = Treatment.named(f"w{bits}a{base.default.activation_bits}")
    return dataclasses.replace(
        base.default, weight_bits=bits, group=plan.group, weight_grid=None, weight_scale="channel"
    )


def _choices(group: Group, base: Recipe, sensitivities: Results) -> list[tuple[Treatment, Choice]]:
    """Every measured width of a group, smallest first, with its size and damage."""
    name = group.sites[0].name
    rows = [r for r in sensitivities.where(metric="sensitivity", role="site", set=name).rows if r["value"] is not None]
    activation = base.default.activation_bits
    out = []
    for row in sorted(rows, key=lambda row: row["at"]):
        treatment = _treated(base, row["at"])
        if row["recipe"] == treatment.name:
            out.append((treatment, Choice(group.bits(treatment, base.steps), max(float(row["value"]), 0.0))))
    if not out:
        raise InputError(
            f"the sensitivities tell nothing of {name} at {activation} activation bits; measure this model's "
            "(qclip sensitivity)"
        )
    return out


def _fixed_bytes(model: nn.Module, towers: dict[str, Tower], base: Recipe, found: list[Group]) -> int:
    """Of everything that is not chosen: float tensors, and sites of fixed width."""
    chosen = {site.name for group in found for site in group.sites}
    total = sum({t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}.values())
    for tower in towers.values():
        for site in tower:
            plan = base.plan(site.name, site.kind)
            weight = site.module.weight  # type: ignore[union-attr]
            if site.name in chosen:
                total -= weight.numel() * weight.element_size()  # type: ignore[operator, union-attr]
            elif plan is not None:
                n, k = weight.flatten(1).shape  # type: ignore[operator, union-attr]
                total += grid_bits(plan.grid, n, k) // 8 - weight.numel() * weight.element_size()  # type: ignore[operator, union-attr]
    return int(total)


def _refined(
    found: list[Group],
    tables: list[list[tuple[Treatment, Choice]]],
    chosen: list[int],
    room: int,
    whole: Whole,
) -> list[int]:
    """`chosen`, or what is better of it by `whole` when one group gets a step more and another one a step less, the
    most promising pairs first."""

    def measured(choice: list[int]) -> float:
        picked = zip(found, tables, choice, strict=True)
        return whole({group.name: table[c][0].weight_bits for group, table, c in picked})

    def size(choice: list[int]) -> int:
        return sum(table[c][1].size for table, c in zip(tables, choice, strict=True))

    best, least = list(chosen), measured(chosen)
    for _ in range(SWAPS):
        pairs = []
        for up in range(len(best)):
            for down in range(len(best)):
                if up != down and best[up] + 1 < len(tables[up]) and best[down] > 0:
                    tried = list(best)
                    tried[up] += 1
                    tried[down] -= 1
                    if size(tried) <= room:
                        gain = tables[up][best[up]][1].damage - tables[up][tried[up]][1].damage
                        loss = tables[down][tried[down]][1].damage - tables[down][best[down]][1].damage
                        pairs.append((loss - gain, tried))
        for _, tried in sorted(pairs, key=lambda pair: pair[0])[:3]:
            if (found_error := measured(tried)) < least:
                best, least = tried, found_error
                break
        else:
            return best
    return best


def _extremes(tables: list[list[tuple[Treatment, Choice]]]) -> str:
    least = min(table[0][0].weight_bits for table in tables)
    return f"every site at its smallest measured width; the smallest is {least} bits"
