"""Recipes of training beside their controls on the shipped checkpoints, and docs/qat.md told from that.

    python -m benchmarks.qat measure --data DIR                       # DIR: the Parquet files named below; hours
    python -m benchmarks.qat measure --data DIR --only photos --recipe w4a8-reliable
    python -m benchmarks.qat write                                    # docs/qat.md from benchmarks/results/qat

`measure` is `qclip controls` with fixed settings. Its arms stand in runs/qat/CHECKPOINT: what is finished is kept, the
same command goes on from what a killed one left there; recipes share the controls that are the same. Nothing is chosen
by the sets that it measures on: settings of recipes are chosen elsewhere, on the dev splits that the page names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from qclip import Results
from qclip.files import write_atomic
from qclip.reliability.runs import JUDGED
from qclip.results.table import missing

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "qat"
PAGE = ROOT / "docs" / "qat.md"
RUNS = ROOT / "runs" / "qat"
RECIPES = ("w4a8-reliable", "w4a4-reliable", "w8a8-reliable")
SEEDS = 3
PLAIN = ("source", "backend", "host", "seconds")  # left out of what is kept
#: Files of rows that other measurements left beside the comparisons.
ROWS = ("accuracy", "ablation", "cost")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One checkpoint: what is learned from, and what is measured on. `settings`: of training; the rest is the
    recipe's."""

    pairs: tuple[str, ...]
    data: str
    dev: str
    ood: tuple[str, ...]
    settings: dict[str, Any]


SETTINGS = {
    "photos": Setting(
        (  # of the sets that it was trained on
            "parquet:{data}/cifar10_train.parquet?samples=6000",
            "parquet:{data}/flickr8k_train_64.parquet?samples=2000",
        ),
        "parquet:{data}/cifar10_test.parquet?samples=2000",
        "parquet:{data}/cifar10_dev.parquet?samples=1000",
        ("far=parquet:{data}/dtd10_64.parquet?samples=600", "far=parquet:{data}/mnist_test.parquet?samples=600"),
        {"steps": 200, "batch": 64, "pairs": 8000},
    ),
    **{
        name: Setting(
            ("scenes:train",),
            "scenes:test",
            "scenes:dev",
            ("near=scenes:near-ood", "far=scenes:far-ood"),
            {"steps": 400, "batch": 64, "pairs": 9000},
        )
        for name in ("scenes-clean", "scenes-noisy")
    },
}


def measure(name: str, recipe: str, data: str, runs: Path, seeds: int, controls: list[str] | None) -> None:
    import qclip

    setting = SETTINGS[name]
    last = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        text = f"{what} {done}/{total}"
        if (done % 10 == 0 or done == total) and text != last:
            print(text, flush=True)
            last = text

    found = qclip.controlled(
        qclip.load_model(name),
        recipe,
        [each.format(data=data) for each in setting.pairs],
        runs / name,
        data=setting.data.format(data=data),
        dev=setting.dev.format(data=data),
        ood=[each.format(data=data) for each in setting.ood],
        seeds=seeds,
        controls=controls,
        evaluation={"scores": ["mcm", "energy"]},
        progress=progress,
        **setting.settings,
    )
    kept = slim(found)
    kept.meta = {key: value for key, value in found.meta.items() if key != "models"} | {"model": name, "recipe": recipe}
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept.to_json(FOLDER / f"controls-{name}-{recipe}.json")


def slim(found: Results) -> Results:
    """What was judged, of means and single runs, and the accuracy of subsets; differences of means alone."""
    arms = set(found.where(metric="difference_p").unique("model"))
    out = Results(notes=found.notes)
    for row in found:
        name = str(row["at"]) if row["metric"] in ("difference_p", "difference_holm_p") else row["metric"]
        whole = row["corruption"] == "" or name == "mean_top1"
        place = row["axis"] in ("", "metric") and row["severity"] == 0 and row["role"] in ROLES
        single = row["model"] not in arms and row["model"] != "float"
        if name in JUDGED and whole and place and not (single and row["reference"]):
            out.rows.append(row | {column: missing(column) for column in PLAIN})
    return out


ROLES = ("id", "corrupted", "ood", "ood-near", "ood-far", "ood-mean")


def results() -> tuple[dict[str, Results], dict[str, Any]]:
    """The comparisons, and the files of `ROWS` that there are."""
    studies = {path.stem: Results.from_json(path) for path in sorted(FOLDER.glob("controls-*.json"))}
    return studies, {name: json.loads(p.read_text()) for name in ROWS if (p := FOLDER / f"{name}.json").exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("measure")
    one.add_argument("--data", default="", help="folder of the Parquet files; scenes need none")
    one.add_argument("--only", choices=list(SETTINGS))
    one.add_argument("--recipe", help="this one alone")
    one.add_argument("--control", action="append", help="these alone")
    one.add_argument("--seeds", type=int, default=SEEDS)
    one.add_argument("--runs", type=Path, default=RUNS)
    sub.add_parser("write")
    args = parser.parse_args()
    if args.what == "write":
        from .qat_page import page

        write_atomic(PAGE, page(*results()).encode())
        return
    print(f"{torch.get_num_threads()} threads")
    for name in [args.only] if args.only else SETTINGS:
        for recipe in [args.recipe] if args.recipe else RECIPES:
            measure(name, recipe, args.data, args.runs, args.seeds, args.control)


if __name__ == "__main__":
    main()
