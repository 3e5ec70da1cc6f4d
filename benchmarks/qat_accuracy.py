"""What training recovers where even the best post-training methods lose accuracy: 2-bit weights, and 4-bit inputs.

    python -m benchmarks.qat_accuracy --data DIR                     # DIR: the Parquet files; half an hour
    python -m benchmarks.qat_accuracy --data DIR --only w2a8-rotation+gptq+lsq

Trains `photos` on 1,000 pairs of the sets that it was trained on, measures on 2,000 images of CIFAR-10's test, and
writes benchmarks/results/qat/accuracy.json after every recipe; docs/qat.md shows it. Trained models stand in --runs;
what is there is not trained again. Recipes and settings were chosen by `cifar10_dev` (dev/qat_ladder).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qclip
from qclip import recipes
from qclip.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "qat" / "accuracy.json"
RUNS = ROOT / "runs" / "qat" / "accuracy"
MODEL, SEED = "photos", 0
PAIRS = ("parquet:{data}/cifar10_train.parquet?samples=700", "parquet:{data}/flickr8k_train_64.parquet?samples=300")
CALIBRATION = "parquet:{data}/cifar10_train.parquet?samples=512"  # the test's own kind, for post-training methods, too
TEST = "parquet:{data}/cifar10_test.parquet?samples=2000"
COMMON: dict[str, Any] = {
    "objective": "contrastive+100*mse+1000*imitation",
    "batch": 32,
    "beside": 1.0,
    "precision": "bfloat16",
    "pairs": 1000,
}
#: Recipes by width: rounding to nearest, post-training methods, and what is trained, with its settings.
ARMS: dict[str, dict[str, Any]] = {
    "w2a8": {},
    "w2a8-gptq": {},
    "w2a8-raana": {},
    "w2.3a8-raana": {},
    "w2a8-rotation+gptq": {},
    "w2a8-rotation+gptq+lsq": {**COMMON, "steps": 450, "rate": 3e-4},
    "w4a4": {},
    "w4a4-rotation": {},
    "w4a4-rotation+gptq": {},
    "w4a4-rotation+gptq+lsq-token": {**COMMON, "steps": 360, "rate": 2e-4},
}


def model_of(recipe: str, base: nn.Module, data: str, runs: Path) -> nn.Module:
    """As the recipe makes it of `base`: computed, or trained, where it does not stand in `runs`."""
    if recipes.get(recipe).trained is None:
        return qclip.quantize(base, recipe, CALIBRATION.format(data=data), seed=SEED)
    path = runs / recipe
    if not path.exists():
        found = qclip.train(
            base,
            recipe,
            [each.format(data=data) for each in PAIRS],
            runs / f"{recipe}.training",
            seed=SEED,
            **ARMS[recipe],
        )
        qclip.save(found, path)
    return qclip.load(path)


def rows_of(recipe: str, base: nn.Module, data: str, runs: Path) -> list[dict[str, Any]]:
    found = qclip.evaluate(
        {"float": base, recipe: model_of(recipe, base, data, runs)},
        TEST.format(data=data),
        measurements=["clean", "agreement"],
    )
    out = []
    for name in ("float", recipe):
        about = {"model": MODEL, "recipe": name, "seed": SEED, "split": "cifar10_test"}
        about["steps"] = ARMS.get(name, {}).get("steps")
        for row in found:
            if row["model"] != name or row["subset"] != "all" or row["axis"]:
                continue
            if row["metric"] == "top1" and not row["reference"]:
                out.append(about | {"metric": "top1"} | {key: row[key] for key in ("value", "low", "high")})
            if row["metric"] == "cosine_mean" and row["reference"] == "float":
                error = {"value": 1 - row["value"], "low": 1 - row["high"], "high": 1 - row["low"]}
                out.append(about | {"metric": "error"} | error)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the Parquet files")
    parser.add_argument("--only", choices=ARMS, nargs="+", metavar="RECIPE")
    parser.add_argument("--runs", type=Path, default=RUNS)
    args = parser.parse_args()
    kept = json.loads(KEPT.read_text())["rows"] if KEPT.exists() else []
    base = qclip.load_model(MODEL)
    for recipe in args.only or ARMS:
        new = rows_of(recipe, base, args.data, args.runs)
        names = {row["recipe"] for row in new}
        kept = [row for row in kept if row["recipe"] not in names] + new
        kept.sort(key=lambda row: ["float", *ARMS].index(row["recipe"]))
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        about = {"threads": torch.get_num_threads(), "cpu": qclip.machine.cpu_name()}
        write_atomic(KEPT, f"{json.dumps({**about, 'rows': kept}, indent=1)}\n".encode())
        print(recipe, {row["metric"]: round(row["value"], 4) for row in new if row["recipe"] == recipe}, flush=True)


if __name__ == "__main__":
    main()
