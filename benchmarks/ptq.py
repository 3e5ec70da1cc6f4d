"""Every post-training method at every width, measured on the shipped checkpoints, and docs/ptq.md told from that.

    python -m benchmarks.ptq measure --data DIR                     # DIR: the Parquet files named below; about an hour
    python -m benchmarks.ptq measure --data DIR --only photos --recipe w4a8-gptq
    python -m benchmarks.ptq write                                  # docs/ptq.md from benchmarks/results/ptq

`measure` keeps what it has after every variant and goes on where it was; a variant is measured again where its recipe
has changed. Methods calibrate on images that are not of the test's distribution where there are any (`photos`: pictures
with captions from Flickr8k; the test is CIFAR-10). `--force` measures everything again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qclip import Results
from qclip.errors import RecipeError
from qclip.files import write_atomic
from qclip.results.table import missing

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "ptq"
PAGE = ROOT / "docs" / "ptq.md"

#: By group of one table: names of recipes, the first of which is what the others are compared with.
PLAN = {
    "W8A8": (
        *("w8a8", "w8a8-smoothquant", "w8a8-gptq", "w8a8-awq", "w8a8-rotation", "w8a8-smoothquant+gptq"),
        *("w8a8-static", "w8a8-static-smoothquant", "w8a8-repq-vit", "w8a8-ptq4vit"),
    ),
    "W6A6": ("w6a6", "w6a6-gptq", "w6a6-repq-vit", "w6a6-ptq4vit", "w6a6-rotation"),
    "W4A8": (
        *("w4a8", "w4a8-smoothquant", "w4a8-awq", "w4a8-gptq", "w4a8-awq+gptq", "w4a8-rotation"),
        *("w4a8-rotation+gptq", "w4a8-hqq", "w4a8-raana", "w4a8-svdquant", "w4a8-repq-vit", "w4a8-mixed"),
    ),
    "W4A16": ("w4a16", "w4a16-gptq", "w4a16-awq", "w4a16-hqq", "w4a16-raana"),
    "W3A8": (
        *("w3a8", "w3a8-gptq", "w3a8-awq", "w3a8-awq+gptq", "w3a8-hqq", "w3a8-raana", "w3.3a8-raana"),
        *("w3a8-rotation+gptq", "w3a8-svdquant"),
    ),
    "W2A8": ("w2a8", "w2a8-gptq", "w2a8-awq", "w2a8-hqq", "w2a8-raana", "w2.3a8-raana", "w2a8-rotation+gptq"),
    "W4A4": (
        *("w4a4", "w4a4-smoothquant", "w4a4-gptq", "w4a4-rotation", "w4a4-rotation+gptq", "w4a4-repq-vit"),
        *("w4a4-ptq4vit", "w4a4-svdquant"),
    ),
}
#: On the other checkpoints: round to nearest, and the methods that were best on the first.
SHORT = {
    "W8A8": ("w8a8", "w8a8-smoothquant"),
    "W4A8": ("w4a8", "w4a8-gptq", "w4a8-awq+gptq", "w4a8-rotation+gptq"),
    "W3A8": ("w3a8", "w3a8-gptq", "w3a8-rotation+gptq", "w3a8-raana"),
    "W4A4": ("w4a4", "w4a4-rotation+gptq"),
}
RANDOM = ("raana", "rotation")  # methods that draw: measured with three seeds
SEEDS = (0, 1, 2)
#: Methods that look at images, measured with other calibration sets, too.
LOOKING = ("w8a8-static", "w8a8-static-smoothquant", "w8a8-repq-vit", "w4a8-gptq", "w3a8-gptq", "w3a8-awq", "w2a8-gptq")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One checkpoint and its images. calibration: what methods see; `elsewhere`, by name: what some see besides, to
    tell what that does; the others as for `qclip.evaluate`."""

    plan: dict[str, tuple[str, ...]]
    calibration: str
    data: str
    ood: tuple[str, ...]
    elsewhere: dict[str, str] = dataclasses.field(default_factory=dict)


SETTINGS = {
    "photos": Setting(
        PLAN,
        "parquet:{data}/flickr8k_train_64.parquet?samples=512",
        "parquet:{data}/cifar10_test.parquet?samples=2000",
        ("far=parquet:{data}/dtd10_64.parquet?samples=600",),
        {
            "the test's own kind (CIFAR-10 train)": "parquet:{data}/cifar10_train.parquet?samples=512",
            "drawn scenes": "scenes:train?samples=512",
            "digits (MNIST)": "parquet:{data}/mnist_test.parquet?samples=512",
        },
    ),
    **{
        name: Setting(SHORT, "scenes:train?samples=512", "scenes:test?samples=2000", ("scenes:near-ood?samples=600",))
        for name in ("scenes-clean", "scenes-noisy")
    },
}
KEPT = ("top1", "ece", "nll", "mean_top1", "auroc", "cosine_mean", "kl", "agreement")  # differences to float
ABSOLUTE = ("top1", "ece", "auroc", "mean_top1")  # of float itself
MODEL = ("model_bytes", "coverage_macs", "quantize_seconds", "bits_per_weight")  # of the variant itself
PLAIN = ("source", "backend", "host", "seconds")  # left out of what is kept


def variants(setting: Setting) -> Iterator[tuple[str, int, str]]:
    """Recipes with seeds, and where they calibrate: "" or a name of `elsewhere`."""
    for names in setting.plan.values():
        for name in names:
            for seed in SEEDS if any(method in name for method in RANDOM) else SEEDS[:1]:
                yield name, seed, ""
    yield from ((name, 0, where) for where in setting.elsewhere for name in LOOKING)


def label(recipe: str, seed: int, where: str = "") -> str:
    return recipe + (f" seed {seed}" if seed else "") + (f" on {where}" if where else "")


def measure(name: str, data: str, recipe: str | None, force: bool) -> None:
    import qclip
    from qclip import recipes

    setting, path = SETTINGS[name], FOLDER / f"{name}.json"
    kept = Results.from_json(path) if path.exists() and not force else Results()
    float_model = qclip.load_model(name)
    wanted = [each for each in variants(setting) if recipe in (None, each[0])]
    for done, (wish, seed, where) in enumerate(wanted):
        what = label(wish, seed, where)
        try:
            chosen = recipes.get(wish)
        except RecipeError as why:
            print(f"{what} is left out: {why}")
            continue
        known = [row for row in kept if row["model"] == what]
        if recipe is None and known and known[0]["recipe_hash"] == chosen.hash:
            continue
        began = time.perf_counter()
        images = setting.elsewhere.get(where, setting.calibration)
        small = qclip.quantize(float_model, chosen, images.format(data=data), seed=seed)
        took = time.perf_counter() - began
        whole = not seed and not where  # of the others only the error is told, and top-1
        found = qclip.evaluate(
            {"float": float_model, what: small},
            setting.data.format(data=data),
            [each.format(data=data) for each in setting.ood] if whole else [],
            corruptions=("gaussian_noise",) if whole else (),
            scores=["mcm"],
            measurements=["clean", "ood", "corrupted", "agreement"] if whole else ["clean", "agreement"],
        )
        about = {"model": what, "role": "model", "recipe": wish, "recipe_hash": chosen.hash}
        found.add(metric="quantize_seconds", value=took, **about)
        found.add(metric="bits_per_weight", value=qclip.coverage(small).bits_per_weight, **about)
        new = (what, "float") if whole else (what,)
        kept.rows = [row for row in kept if row["model"] not in new]
        kept.rows += [slim(row) for row in found if is_kept(row) and row["model"] in new]
        kept.meta = {k: v for k, v in found.meta.items() if k != "models"}
        path.parent.mkdir(parents=True, exist_ok=True)
        kept.to_json(path)
        print(
            f"{name} {done + 1}/{len(wanted)} {what}: {took:.0f} s, then {time.perf_counter() - began - took:.0f} s",
            flush=True,
        )


def slim(row: dict[str, Any]) -> dict[str, Any]:
    return row | {column: missing(column) for column in PLAIN}


def is_kept(row: dict[str, Any]) -> bool:
    if row["role"] == "model":
        return row["metric"] in MODEL and row["model"] != "float"
    if row["subset"] != "all" or row["axis"] or (row["corruption"] and row["metric"] != "mean_top1"):
        return False
    if row["model"] == "float":
        return row["metric"] in ABSOLUTE
    return row["reference"] == "float" and row["metric"] in KEPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("measure")
    one.add_argument("--data", required=True, help="folder of the Parquet files")
    one.add_argument("--only", choices=list(SETTINGS))
    one.add_argument("--recipe", help="this one alone, measured again")
    one.add_argument("--force", action="store_true")
    sub.add_parser("write")
    args = parser.parse_args()
    if args.what == "write":
        from .ptq_page import page

        text = page({path.stem: Results.from_json(path) for path in sorted(FOLDER.glob("*.json"))})
        write_atomic(PAGE, text.encode())
        return
    print(f"{torch.get_num_threads()} threads")
    for name in [args.only] if args.only else SETTINGS:
        measure(name, args.data, args.recipe, args.force)


if __name__ == "__main__":
    main()
