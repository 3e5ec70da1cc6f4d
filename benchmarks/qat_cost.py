"""What a step of training with rounding costs beside one in float: time and memory, of the same trainer.

    python -m benchmarks.qat_cost                        (ViT-B-32 with random weights, `photos`; writes the JSON)
    python -m benchmarks.qat_cost --model photos --recipe w4a8-lsq --batch 64 --rounds 7

A float step is the same one with every site's rounding switched off. Steps take turns, the ratio is that of medians.
Memory is the largest resident size of a process that trains two steps; the ratio of steps is without what it has before
the first.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import qclip
from qclip import models
from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.training.objectives import Objective
from qclip.training.pairs import Pairs
from qclip.training.processes import Processes
from qclip.training.settings import Settings
from qclip.training.step import Gradient
from qclip.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "qat" / "cost.json"
CASES = [("photos", "w4a8-lsq", 64), ("photos", "w4a4-lsq", 64), ("ViT-B-32", "w8a8-lsq", 16)]
NOUNS = "dog cat ship tree house horse river street child bridge flower train".split()


def trainer(name: str, recipe: str, batch: int) -> Trainer:
    model = qclip.load_model(name)
    encoders = models.encoders(model)
    side = encoders.image_size
    generator = torch.Generator().manual_seed(0)
    count = max(2 * batch, 64)
    settings = Settings(batch=batch, pairs=count, steps=1000, held_out=0, save_every=1000)
    images = torch.randn(count, 3, side, side, generator=generator)
    captions = [f"a photo of a {NOUNS[i % 12]} and {i} {NOUNS[i // 12 % 12]}s" for i in range(count)]
    pairs = Pairs.of((images, captions), encoders, count)
    student = qclip.prepare(model, recipe, pairs.samples(32)).eval()
    gradient = Gradient(student, model, pairs, Objective(settings.objective), settings, Processes.of_environment())
    return Trainer(student, gradient, settings, Processes.of_environment())


def step(run: Trainer, rounds: bool) -> float:
    run._round(rounds)
    before = time.perf_counter()
    run._step()
    return time.perf_counter() - before


def times(name: str, recipe: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, float and rounding in turns; the first of each is not counted."""
    run = trainer(name, recipe, batch)
    found: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for kind in (False, True) if turn % 2 else (True, False):
            seconds = step(run, kind)
            if turn:
                found[kind].append(seconds)
    ratios = [b / a for a, b in zip(found[False], found[True], strict=True)]
    return {
        "float_step_s": round(statistics.median(found[False]), 4),
        "rounded_step_s": round(statistics.median(found[True]), 4),
        "step_ratio": round(statistics.median(ratios), 3),
        "rounds": rounds,
    }


def peak() -> int:
    """Bytes that were resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(name: str, recipe: str, batch: int, rounds: bool) -> dict[str, int]:
    """Of a process that trains two steps."""
    run = trainer(name, recipe, batch)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(2):
        step(run, rounds)
    return {"before": before, "peak": peak()}


def own(*arguments: str) -> Any:
    """What this file gives in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.qat_cost", *arguments], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def measure(name: str, recipe: str, batch: int, rounds: int) -> dict[str, Any]:
    case = ["--model", name, "--recipe", recipe, "--batch", str(batch)]
    found = {"model": name, "recipe": recipe, "batch": batch, **own(*case, "--rounds", str(rounds), "--part", "times")}
    plain, rounded = (own(*case, "--part", part) for part in ("float-memory", "memory"))
    found["float_peak_mb"], found["rounded_peak_mb"] = (round(each["peak"] / 1e6) for each in (plain, rounded))
    found["memory_ratio"] = round(rounded["peak"] / plain["peak"], 3)
    found["memory_ratio_of_steps"] = round(
        (rounded["peak"] - rounded["before"]) / max(plain["peak"] - plain["before"], 1), 3
    )
    return {**found, "threads": torch.get_num_threads(), "cpu": cpu_name()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--recipe", default="w4a8-lsq")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", choices=("times", "memory", "float-memory"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    case = (args.model, args.recipe, args.batch)
    if args.part == "times":
        print(json.dumps(times(*case, args.rounds)))
    elif args.part:
        print(json.dumps(memory(*case, args.part == "memory")))
    else:
        rows = [measure(*each, args.rounds) for each in ([case] if args.model else CASES)]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.output, f"{json.dumps(rows, indent=1)}\n".encode())
        for row in rows:
            print(json.dumps(row))


if __name__ == "__main__":
    main()
