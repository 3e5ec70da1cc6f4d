"""Which sites make a requirement fail: those that have to be float again for it to hold (Zeller & Hildebrandt 2002).

A *hybrid* is the float model with only some of the quantized model's layers in it. Halves of the suspects are made
float, and halves of those, block by block first, then site by site. Where it is known which sites do most damage alone
(`ranking.py`), only as many of the worst are suspects as it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from qclip import models, rewrite
from qclip.errors import InputError

Holds = Callable[[nn.Module], bool]


@torch.no_grad()
def hybrid(quantized: nn.Module, against: nn.Module, restored: Iterable[str]) -> nn.Module:
    """A copy of the float model `against` with the layers of `quantized`, except at the sites `restored`."""
    left = set(restored)
    mixed = copy.deepcopy(against)
    layers = {
        site.name: copy.deepcopy(site.module)
        for tower in models.towers(quantized).values()
        for site in tower
        if hasattr(site.module, "facts") and site.name not in left
    }
    rewrite.write(models.towers(mixed), layers)
    return mixed.eval()


def blame(
    quantized: nn.Module, against: nn.Module, holds: Holds, worst_first: Sequence[str] | None = None
) -> list[str]:
    """Names of the sites that have to be float for `holds(model)` to be true: no block, and in it no site, can be left
    out of them. [] where it holds as it is. worst_first: every site, those that do most damage alone first: then the
    first 1, 2, 4, ... of them are suspected until it holds.

    Raises InputError where it does not hold for the float model either, and where the models differ in more than
    their sites (a trained model): then no site is to blame.
    """
    done = rewrite.quantization(quantized)
    if done is None or rewrite.is_quantized(against):
        raise InputError("sites can be blamed for the difference of a quantized model to a float one only")
    whole, mixed = quantized.state_dict(), hybrid(quantized, against, ()).state_dict()
    if odd := [name for name in whole if name not in mixed or not torch.equal(whole[name], mixed[name])]:
        raise InputError(f"the models differ in more than their sites ({odd[0]!r}), so no site is to blame")
    del whole, mixed
    sites = list(done.plans)
    blocks: dict[str, list[str]] = {}
    for tower in models.towers(quantized).values():
        for site in tower:
            if site.name in done.plans:
                blocks.setdefault(_block(site.name), []).append(site.name)
    tried: dict[frozenset[str], bool] = {}

    def restoring(names: frozenset[str]) -> bool:
        if names not in tried:
            tried[names] = holds(hybrid(quantized, against, names))
        return tried[names]

    def of(units: Iterable[str]) -> frozenset[str]:
        return frozenset(name for unit in units for name in blocks[unit])

    if restoring(frozenset()):
        return []
    if not restoring(frozenset(sites)):
        raise InputError("the requirement does not hold with every site float either, so no site is to blame")
    if worst_first is None:
        guilty = _least(tuple(blocks), (), lambda units: restoring(of(units)))
        suspects = tuple(name for unit in guilty for name in blocks[unit])
    else:
        counts = [2**k for k in range(len(sites).bit_length()) if 2**k < len(sites)]
        found = next((n for n in counts if restoring(frozenset(worst_first[:n]))), len(sites))
        suspects = tuple(worst_first[:found])
    return list(_least(suspects, (), lambda names: restoring(frozenset(names))))


def _block(site: str) -> str:
    """`vision.blocks.3` of `vision.blocks.3.attn.q`; what is in no block stands alone."""
    parts = site.split(".")
    return ".".join(parts[:3]) if parts[1:2] == ["blocks"] else site


def _least(suspects: Sequence[str], held: tuple[str, ...], passes: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """The fewest of `suspects` found that, beside `held`, pass: delta debugging's dd, in their order."""
    if len(suspects) <= 1:
        return tuple(suspects)
    middle = len(suspects) // 2
    first, second = tuple(suspects[:middle]), tuple(suspects[middle:])
    if passes((*held, *first)):
        return _least(first, held, passes)
    if passes((*held, *second)):
        return _least(second, held, passes)
    of_first = _least(first, (*held, *second), passes)
    return (*of_first, *_least(second, (*held, *of_first), passes))
