"""Calls of random batch sizes, as a server makes them: from programs, by modules and in float32, taking turns.

    python benchmarks/batches.py photos                       # 200 calls of 1 to 8 images at w8a8
    python benchmarks/batches.py ViT-B-32 --text --most 1     # prompts of 1 to 18 words, one at a time
    python benchmarks/batches.py photos --costs               # what making a program costs, in replays' savings

A model is a shipped checkpoint, or the name of an architecture of open_clip (random weights). Every call is made three
ways, in an order that rotates, on torch's threads; recording counts where it happens. Prints seconds of all calls,
ratios of their sums and of their medians per size, and what was recorded; `--json FILE` keeps that with the processor.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qclip
import qkernels
from qclip import models, zoo
from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.models import replay

WORDS = "a photo of the red bus near an old bridge with two small birds and one dog".split()
WAYS = ("programs", "modules", "float")


def build(name: str) -> nn.Module:
    if name in zoo.checkpoints():
        return zoo.load_model(name)
    import open_clip

    return open_clip.create_model(name).eval()


def inputs(model: nn.Module, text: bool, calls: int, most: int, seed: int) -> list[tuple[str, Tensor]]:
    """(size in words, input) for every call."""
    draw, encoders, found = random.Random(seed), models.encoders(model), []
    for _ in range(calls):
        batch = draw.randint(1, most)
        if text:
            prompts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 18))) for _ in range(batch)]
            tokens = encoders.tokenizer(prompts)
            found.append((f"{batch} x {int(tokens.argmax(-1).max()) + 1}", tokens))
        else:
            found.append((str(batch), torch.randn(batch, 3, encoders.image_size, encoders.image_size)))
    return found


def timed(function: Callable[[Tensor], Any], x: Tensor) -> float:
    began = time.perf_counter()
    function(x)
    return time.perf_counter() - began


def compare(
    ways: dict[str, Callable[[Tensor], Any]], calls: list[tuple[str, Tensor]], repeats: int, forget: Callable[[], None]
) -> dict[str, Any]:
    """What is recorded at which call does not depend on time, so each call counts with its median over the repeats."""
    runs: list[dict[str, list[float]]] = []
    names = list(ways)
    for _ in range(repeats):
        forget()
        runs.append({way: [] for way in ways})
        for number, (_, x) in enumerate(calls):
            for shift in range(len(names)):
                way = names[(number + shift) % len(names)]
                os.environ["QKERNELS_PROGRAM"] = "1" if way == "programs" else "0"
                runs[-1][way].append(timed(ways[way], x))
    os.environ.pop("QKERNELS_PROGRAM")
    times = {way: list(map(statistics.median, zip(*(run[way] for run in runs), strict=True))) for way in ways}
    sizes = sorted({size for size, _ in calls}, key=lambda size: [int(part) for part in size.split(" x ")])
    median = {
        size: {w: statistics.median(t for t, (s, _) in zip(times[w], calls, strict=True) if s == size) for w in ways}
        for size in sizes
    }
    total = {way: sum(t) for way, t in times.items()}
    return {
        "seconds": total,
        "modules_over_programs": total["modules"] / total["programs"],
        "float_over_programs": total["float"] / total["programs"],
        "float_over_modules": total["float"] / total["modules"],
        "median_ms": {size: {w: round(1000 * s, 3) for w, s in m.items()} for size, m in median.items()},
    }


def costs(function: Callable[..., Any], x: Tensor) -> dict[str, float]:
    """Milliseconds, and in replays that save as much: a trace of a family, and a derived program with its check."""
    from qkernels.recording import Family, Workspace, check, record

    free = (0, 1) if x.dim() == 2 else (0,)
    x, workspace = x.contiguous(), Workspace()
    function(x)
    ms: dict[str, float] = {}
    family = Family(function, (x,), free)

    def derive() -> None:
        check(family.program(x, workspace=workspace), (x,), function(x))

    program = family.program(x, workspace=workspace)
    for name, call in (
        ("modules", lambda: function(x)),
        ("replay", lambda: program(x)),
        ("trace", lambda: Family(function, (x,), free)),
        ("derive", derive),
        ("record", lambda: record(function, x)),
    ):
        ms[name] = 1000 * statistics.median(timed(lambda _, call=call: call(), x) for _ in range(7))
    ms["trace"] /= 2 ** len(free)
    ms["derive"] -= ms["modules"]
    saved = max(ms["modules"] - ms["replay"], 1e-6)
    return ms | {f"{name}_in_calls": ms[name] / saved for name in ("trace", "derive", "record")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--text", action="store_true", help="prompts of 1 to 18 words instead of images")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--most", type=int, default=8, help="largest batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, help="of all calls, each time with nothing recorded")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    model = build(options.model)
    small = qclip.quantize_(copy.deepcopy(model), options.recipe)
    calls = inputs(model, options.text, options.calls, options.most, options.seed)
    encode = [(m.encode_text if options.text else m.encode_image) for m in (small, small, model)]
    tower = models.towers(small)["text" if options.text else "vision"]
    runner = tower.module if tower.runner is None else tower.runner
    info = qkernels.info()
    result: dict[str, Any] = {"processor": cpu_name(), "tier": info["tier"], "threads": torch.get_num_threads()}
    result |= {"model": options.model, "recipe": options.recipe, "inputs": "text" if options.text else "image"}
    with torch.inference_mode():
        for function in encode[1:]:  # memory and thread pools are there
            os.environ["QKERNELS_PROGRAM"] = "0"
            function(calls[0][1])
        if options.costs:
            os.environ["QKERNELS_PROGRAM"] = "0"
            if options.text:  # what is recorded begins behind the last word
                result |= {size: costs(small._encode_text, small.visible_tokens(x)) for size, x in dict(calls).items()}
            else:
                result |= {size: costs(encode[0], x) for size, x in dict(calls).items()}
        else:

            def forget() -> None:
                tower.use_programs(False)
                tower.use_programs()

            result |= compare(dict(zip(WAYS, encode, strict=True)), calls, options.repeats, forget)
            result |= {"counts": replay.counts(runner), "process": replay.process_counts()}
    for name, value in result.items():
        print(f"{name:24} {value}")
    if options.json:
        write_atomic(options.json, f"{json.dumps(result, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
