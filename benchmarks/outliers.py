"""Outlying channels as large CLIPs have them, put into a small one without changing what it computes in float.

    from benchmarks.outliers import inject
    hard = inject(qclip.load_model("photos"), "S")      # a copy; nothing of it is ever stored

Kinds, of which any number may be given ("SVOH"):

- `S` scale: a few channels behind every norm `factor` times as large, the columns of all readers by as much smaller.
- `V` values: one channel of every second head, in v, and back in the columns of `out`.
- `O` offset: `offset` standard deviations are added to a few channels behind the norms of blocks, and taken off by the
  biases of their readers. The weights stay as they are, which is nearer to what large models have.
- `H` hidden units: 16 copies of units of every MLP, `factor` times as large, which nobody reads.

    python -m benchmarks.outliers photos --data SET --calibration SET      # what each recipe recovers: results/outliers

S and V are exact where the factor is a power of two; O up to float32's rounding of large sums.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.models.tower import Block, Tower
from qclip.seeds import generator

FOLDER = Path(__file__).parent / "results" / "outliers"
RECIPES = (
    *("w8a8-static", "w8a8", "w8a8-smoothquant", "w8a8-static-smoothquant", "w8a8-rotation", "w8a8-repq-vit"),
    *("w8a8-gptq", "w8a8-svdquant"),
)
KINDS = "SVOH"
SHARE, UNITS = 0.02, 16  # of the width that are outlying channels; hidden units that H adds
LAST_NORMS = ("ln_post", "ln_final")  # open_clip's, before the projections
Readers = list[nn.Module]


@torch.no_grad()
def inject(
    model: nn.Module,
    kinds: str,
    seed: int = 0,
    factor: float = 64.0,
    offset: float = 50.0,
    towers: tuple[str, ...] = ("vision", "text"),
) -> nn.Module:
    """A copy of a float model, in explicit form, with outliers of `kinds`; the same channels in every block of a tower.

    Raises ValueError: an unknown kind, a factor or an offset that is not positive, a reader without the bias that O
    needs. ModelError as `qclip.quantize`.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds are some of {KINDS}, not {kinds!r}")
    if factor <= 0 or offset <= 0:
        raise ValueError(f"factor and offset must be positive, not {factor:g} and {offset:g}")
    hard = copy.deepcopy(model)
    for name, tower in models.towers(hard).items():
        if name in towers:
            draw = generator(seed, f"outliers {name}")
            norms = [place for block in tower.blocks for place in _norms(block)]
            if "S" in kinds or "O" in kinds:
                width = norms[0][0].weight.numel()  # type: ignore[union-attr, operator]
                channels = torch.from_numpy(draw.choice(width, max(2, round(SHARE * width)), replace=False))
                if "S" in kinds:
                    for norm, readers in norms + _last_norm(tower):
                        scale(norm, readers, channels, factor)
                if "O" in kinds:
                    for norm, readers in norms:
                        shift(norm, readers, channels, offset)
            for block in tower.blocks:
                if "V" in kinds and block.attention is not None:
                    values(block, draw, factor)
                if "H" in kinds and block.mlp is not None:
                    hidden(block, draw, factor)
    return hard


def _norms(block: Block) -> list[tuple[nn.Module, Readers]]:
    """The norms of a block with everything that reads them."""
    out = []
    for place, kinds in ((block.attention_norm, ("q", "k", "v")), (block.mlp_norm, ("fc1",))):
        readers = [block.sites[kind].module for kind in kinds if kind in block.sites]
        if place is not None and readers:
            out.append((getattr(*place), readers))
    return out


def _last_norm(tower: Tower) -> list[tuple[nn.Module, Readers]]:
    site = tower.sites.get(f"{tower.name}.projection")
    owner = tower.module if tower.runner is None else tower.runner
    found = [getattr(owner, name) for name in LAST_NORMS if hasattr(owner, name)]
    return [(found[0], [site.module])] if found and site is not None else []


def scale(norm: nn.Module, readers: Readers, channels: Tensor, factor: float) -> None:
    norm.weight[channels] *= factor  # type: ignore[index, operator]
    norm.bias[channels] *= factor  # type: ignore[index, operator]
    for reader in readers:
        reader.weight[:, channels] /= factor  # type: ignore[index, operator]


def shift(norm: nn.Module, readers: Readers, channels: Tensor, offset: float) -> None:
    """A channel behind a norm has a standard deviation of about its weight."""
    sizes = norm.weight.abs()  # type: ignore[union-attr, operator]
    delta = offset * sizes[channels].clamp(min=0.1 * float(sizes.mean()))
    norm.bias[channels] += delta  # type: ignore[index, operator]
    for reader in readers:
        columns = reader.weight[:, channels].double()  # type: ignore[index]
        if reader.bias is None:
            raise ValueError("outliers of kind O need biases of all that reads a norm; use S")
        reader.bias.copy_(reader.bias.double() - columns @ delta.double())  # type: ignore[union-attr, operator]


def values(block: Block, draw: np.random.Generator, factor: float) -> None:
    v, out = block.sites["v"].module, block.sites["out"].module
    heads = getattr(*block.attention).heads  # type: ignore[misc]
    width = len(v.weight) // heads  # type: ignore[arg-type]
    channels = torch.tensor([head * width + int(draw.integers(width)) for head in range(0, heads, 2)])
    v.weight[channels] *= factor  # type: ignore[index, operator]
    if v.bias is not None:
        v.bias[channels] *= factor  # type: ignore[index, operator]
    out.weight[:, channels] /= factor  # type: ignore[index, operator]


def hidden(block: Block, draw: np.random.Generator, factor: float) -> None:
    core = getattr(*block.mlp)  # type: ignore[misc]
    fc1, fc2 = core.fc1, core.fc2
    units = torch.from_numpy(draw.choice(fc1.out_features, UNITS, replace=False))
    wider = nn.Linear(fc1.in_features, fc1.out_features + UNITS, fc1.bias is not None, device="meta")
    wider.weight = nn.Parameter(torch.cat([fc1.weight, factor * fc1.weight[units]]))
    if fc1.bias is not None:
        wider.bias = nn.Parameter(torch.cat([fc1.bias, factor * fc1.bias[units]]))
    reader = nn.Linear(fc2.in_features + UNITS, fc2.out_features, fc2.bias is not None, device="meta")
    reader.weight = nn.Parameter(torch.cat([fc2.weight, torch.zeros(len(fc2.weight), UNITS)], 1))
    reader.bias = fc2.bias
    core.fc1, core.fc2 = wider.train(fc1.training), reader.train(fc2.training)


def measure(name: str, data: str, calibration: str, recipes: list[str], kinds: list[str], offset: float) -> dict:
    """By kind ("" is the model as it is) and recipe: top-1 of float, what is lost of it (a share, with the ends of its
    95 % interval), and 1 - cosine of images to float."""
    model, rows = qclip.load_model(name), []
    for kind in ["", *kinds]:
        hard = inject(model, kind, offset=offset) if kind else model
        for recipe in recipes:
            small = qclip.quantize(hard, recipe, calibration)
            found = qclip.evaluate({"float": hard, recipe: small}, data, measurements=["clean", "agreement"])
            row: dict[str, Any] = {"kinds": kind, "recipe": recipe}
            for each in found:
                if each["metric"] == "top1" and each["subset"] == "all":
                    if each["model"] == "float":
                        row["float_top1"] = round(each["value"], 4)
                    elif each["reference"] == "float":
                        row["top1"] = [round(each[what], 5) for what in ("value", "low", "high")]
                if each["metric"] == "cosine_mean" and each["model"] == recipe and each["reference"]:
                    row["distance"] = float(f"{1 - each['value']:.3g}")
            rows.append(row)
            print(row, flush=True)
    about = {"model": name, "data": data.rpartition("/")[2], "calibration": calibration.rpartition("/")[2]}
    return {**about, "factor": 64, "offset": offset, "cpu": cpu_name(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--recipe", nargs="+", default=RECIPES)
    parser.add_argument("--kinds", nargs="+", default=["S", "V", "O", "H", "SVOH"])
    parser.add_argument("--offset", type=float, default=100.0, help="standard deviations that O adds")
    parser.add_argument("--output", type=Path, help="the JSON; default: benchmarks/results/outliers/MODEL.json")
    args = parser.parse_args()
    found = measure(args.model, args.data, args.calibration, args.recipe, args.kinds, args.offset)
    path = args.output or FOLDER / f"{args.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f"{json.dumps(found, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
