"""What each term of the reliable objective does: trained with it and without it, measured on splits for choices.

    python -m benchmarks.qat_ablation shares --data DIR             # gradient norms of terms; DIR: the Parquet files
    python -m benchmarks.qat_ablation measure --data DIR            # the arms below, one after the other
    python -m benchmarks.qat_ablation measure --data DIR --only base --only all
    python -m benchmarks.qat_ablation artifact --data DIR PATH --arm NAME   # one that was trained elsewhere

Every arm has the same steps, pairs and seed. No test is read: accuracy and calibration are of a part of `cifar10_dev`,
temperatures of the rest of it; OOD sets are classes of Tiny ImageNet that CIFAR-10 has not, and drawn scenes; noise is
speckle, of ImageNet-C's corruptions for such choices. `measure` writes benchmarks/results/qat/ablation.json after every
arm and goes on where it was; training goes on from checkpoints in --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qclip
from qclip import recipes
from qclip.data import as_set
from qclip.files import write_atomic
from qclip.training import Pairs, Settings, prepare
from qclip.training.objectives import Objective
from qclip.training.processes import Processes
from qclip.training.step import Gradient

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "qat" / "ablation.json"
MODEL, RECIPE, SEED = "photos", "w4a8-reliable", 0
PAIRS = ("parquet:{data}/cifar10_train.parquet?samples=600", "parquet:{data}/flickr8k_train_64.parquet?samples=200")
STEPS = {
    "steps": 60,
    "batch": 64,
    "pairs": 800,
    "precision": "bfloat16",
    "save_every": 20,
}
BASE = "contrastive+10*mse"
#: Terms with their weights in the recipes.
TERMS = {"noise": 0.3, "consensus": 30.0, "margin": 0.3}
ALONE = {"esd": 10.0, "spectral": 100.0}  # terms that "all" is without
UNKNOWN = (  # classes of Tiny ImageNet, of nothing that CIFAR-10 or DTD's or MNIST's images show
    *(
        "banana",
        "beaker",
        "beer bottle",
        "bow tie",
        "candle",
        "comic book",
        "dumbbell",
        "espresso",
        "fountain",
        "guacamole",
    ),
    *(
        "hourglass",
        "ice cream",
        "iPod",
        "lampshade",
        "lemon",
        "mashed potato",
        "meat loaf",
        "orange",
        "pizza",
        "pretzel",
    ),
    *("refrigerator", "sandal", "sock", "sunglasses", "syringe", "teapot", "teddy", "umbrella", "volleyball", "wok"),
)
METRICS = ("top1", "ece", "ece_ts", "nll", "nll_ts", "brier", "signed_gap", "mean_top1", "auroc")


def weighted(terms: dict[str, float]) -> str:
    return "+".join([BASE, *(f"{weight:g}*{name}" for name, weight in terms.items())])


def arms() -> dict[str, str]:
    """Objectives by name: base, base + each term, all, all but each."""
    each = {f"+ {name}": weighted({name: weight}) for name, weight in TERMS.items()}
    without = {f"all - {name}": weighted({k: v for k, v in TERMS.items() if k != name}) for name in TERMS}
    alone = {f"+ {name}": weighted({name: weight}) for name, weight in ALONE.items()}
    return {"all": weighted(TERMS), "base": BASE, **each, **without, **alone}


def dev_sets(data: str) -> list[dict[str, Any]]:
    """What is measured, as `qclip.evaluate` takes it: accuracy, calibration and detection; noise on fewer images."""
    dev = as_set(f"parquet:{data}/cifar10_dev.parquet")
    order = np.random.default_rng(0).permutation(len(dev))
    fitted, told, noisy = np.split(order[:3200], [800, 2800])
    tiny = as_set(f"parquet:{data}/tiny_imagenet_train_32.parquet")
    labels, classes = tiny.labelled()
    names = [name.split(",")[0] for name in classes]
    rows = np.flatnonzero(np.isin(labels, [names.index(name) for name in UNKNOWN]))[:400]
    clean = {
        "data": dev.select(np.sort(told)),
        "dev": dev.select(np.sort(fitted)),
        "ood": {"near": tiny.select(rows), "far": as_set("scenes:test?samples=400")},
        "scores": ["mcm", "energy"],
        "measurements": ["clean", "ood"],
    }
    noise = {"data": dev.select(np.sort(noisy)), "corruptions": ("speckle_noise",), "measurements": ["corrupted"]}
    return [clean, noise]


def rows_of(found: qclip.Results, about: dict[str, Any], label: str) -> Iterator[dict[str, Any]]:
    """Of one model: its values, and its paired differences to float."""
    for row in found:
        if row["model"] != label or row["metric"] not in METRICS or row["subset"] != "all" or row["axis"]:
            continue
        if (row["corruption"] and row["metric"] != "mean_top1") or not np.isfinite(row["value"]):
            continue
        where = f" {row['role'].removeprefix('ood-')} {row['score']}" if row["score"] else ""
        split = "dev, difference to float" if row["reference"] else "dev"
        more = {name: row[name] for name in ("low", "high") if np.isfinite(row[name])}
        yield about | {"split": split, "metric": row["metric"] + where, "value": row["value"], **more}


def kept() -> list[dict[str, Any]]:
    return json.loads(KEPT.read_text())["rows"] if KEPT.exists() else []


def keep(rows: list[dict[str, Any]]) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_atomic(KEPT, f'{{"command": "python -m benchmarks.qat_ablation measure", "rows": [\n{lines}\n]}}\n'.encode())


def measure(args: argparse.Namespace) -> None:
    wanted = {name: objective for name, objective in arms().items() if args.only is None or name in args.only}
    teacher = qclip.load_model(MODEL)
    settings = STEPS | args.set
    for name, objective in wanted.items():
        about = {"arm": name + args.label, "objective": objective, "seed": SEED, "steps": settings["steps"]}
        about |= {"note": args.note} if args.note else {}
        if any(about.items() <= row.items() for row in kept()):
            continue
        folder = Path(args.work) / (name + args.label).replace(" ", "")
        pairs = [each.format(data=args.data) for each in PAIRS]
        trained = qclip.train(teacher, RECIPE, pairs, folder, objective=objective, seed=SEED, **settings)
        judge(trained, about, args.data)


def artifact(args: argparse.Namespace) -> None:
    """What was trained elsewhere, on the same splits."""
    trained = qclip.load_model(args.path)
    done = trained.qclip_quantization
    about = {name: done.provenance["training"]["settings"][name] for name in ("objective", "seed", "steps")}
    judge(trained, {"arm": args.arm, "recipe": done.recipe.name, **about, "note": args.note}, args.data)


def judge(model: nn.Module, about: dict[str, Any], data: str) -> None:
    rows = [row for row in kept() if row["arm"] not in (about["arm"], "float")]
    about = {"model": MODEL, "recipe": RECIPE, **about}
    plain = about | {"arm": "float", "recipe": RECIPE, "objective": "float", "steps": 0, "note": ""}
    for each in dev_sets(data):
        found = qclip.evaluate({"float": qclip.load_model(MODEL), "arm": model}, **each)
        rows += [*rows_of(found, plain, "float"), *rows_of(found, about, "arm")]
    keep(rows)
    show([row for row in rows if row["arm"] == about["arm"]])


def show(rows: list[dict[str, Any]]) -> None:
    print(rows[0]["arm"], rows[0]["objective"])
    for row in rows:
        if row["split"] != "dev":
            low, high = row.get("low", np.nan), row.get("high", np.nan)
            print(f"   {row['metric']:30} {row['value']:+.4f} [{low:+.4f}, {high:+.4f}]", flush=True)


def norms(gradient: Gradient, student: nn.Module, objective: str, step: int) -> dict[str, float]:
    """Of each term's gradient by the weights that learn, in one step."""
    found = {}
    for part in objective.split("+"):
        student.zero_grad(set_to_none=True)
        gradient.objective = Objective(part)
        gradient(step, 0.0)
        squares = [float(p.grad.square().sum()) for p in student.parameters() if p.grad is not None]
        found[part] = sum(squares) ** 0.5
    return found


def shares(args: argparse.Namespace) -> None:
    model = qclip.load_model(MODEL)
    recipe = recipes.get(RECIPE)
    objective = args.objective or weighted(TERMS)
    settings = Settings.of(recipe, objective=objective, **args.set)
    data = Pairs.of(
        [each.format(data=args.data) for each in PAIRS], qclip.encoders(model), settings.pairs, settings.seed
    )
    learned, _ = data.split(settings.held_out, settings.seed)
    learned, apart = learned.split(settings.apart, settings.seed, "pairs apart")
    student = prepare(model, recipe, learned.samples(), settings.seed).eval()
    gradient = Gradient(student, model, learned, Objective(objective), settings, Processes(), apart=apart)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=settings.rate)
    for step in range(args.steps):
        found = norms(gradient, student, objective, step)
        whole = sum(found.values())
        print(step, "  ".join(f"{part} {norm:.3g} ({norm / whole:.0%})" for part, norm in found.items()), flush=True)
        for more in range(args.between):  # towards what training makes of it
            student.zero_grad(set_to_none=True)
            gradient.objective = Objective(objective)
            gradient(step * args.between + more, 0.0)
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--data", required=True, help="folder of the Parquet files")
    both.add_argument("--set", type=json.loads, default={}, help="settings that differ, as JSON")
    one = sub.add_parser("measure", parents=[both])
    one.add_argument("--only", action="append", help="an arm; again for more")
    one.add_argument("--work", default="runs/qat", help="folder for checkpoints")
    one.add_argument("--label", default="", help="behind the arm's name")
    one.add_argument("--note", default="", help="of pairs and settings, for the page")
    third = sub.add_parser("artifact", parents=[both])
    third.add_argument("path")
    third.add_argument("--arm", required=True, help="its name in the table")
    third.add_argument("--note", default="")
    other = sub.add_parser("shares", parents=[both])
    other.add_argument("--objective")
    other.add_argument("--steps", type=int, default=3)
    other.add_argument("--between", type=int, default=0, help="steps of training between two measured ones")
    args = parser.parse_args()
    {"measure": measure, "artifact": artifact, "shares": shares}[args.what](args)


if __name__ == "__main__":
    main()
