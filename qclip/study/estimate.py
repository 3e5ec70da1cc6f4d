"""What the rest of a plan would take, from a short probe of each model."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from qclip import data as qdata
from qclip import zoo
from qclip.reliability import evaluate
from qclip.reliability.request import SAMPLE

from .cells import CLEAN, corruptions_of
from .run import OWN_BYTES, Ready
from .tasks import Task

EMBEDDING = 4 * 512  # bytes of one, about


def estimate(ready: Ready, workers: int, probe: bool) -> dict[str, Any]:
    """`seconds` (without those of calibrating and quantizing; None without a probe), `memory_bytes`, `disk_bytes` and
    the `images` that are embedded."""
    facts = ready.grid.facts
    images = sum(_images(task, facts.images) for task in ready.todo)
    resident = max((len(task.blocks) + 1 for task in ready.todo), default=0)
    memory = workers * resident * (max(facts.bytes.values()) + OWN_BYTES)
    variants = {(b.variant.model, b.variant.label): b.variant for task in ready.todo for b in task.blocks}
    disk = images * EMBEDDING
    for variant in variants.values():
        if variant.recipe is not None:
            disk += int(facts.bytes[variant.model] * variant.recipe.default.weight_bits / 32)
    return {
        "images": images,
        "seconds": _seconds(ready, workers) if probe and ready.todo else None if ready.todo else 0.0,
        "memory_bytes": memory,
        "disk_bytes": disk,
    }


def _images(task: Task, sizes: dict[str, int]) -> int:
    """How many images are embedded, counted for each variant."""
    sets, measured = task.sets, task.measured
    one = sizes[sets.data] if measured.full else min(SAMPLE, sizes[sets.data])
    total = 0
    for block in task.blocks:
        for condition in block.cells:
            if condition == CLEAN:
                total += sum(sizes[name] for name in dict.fromkeys(sets.names()))
            elif corruptions_of(condition) == (condition,):
                total += one * len(measured.severities)
    return total


def _seconds(ready: Ready, workers: int) -> float:
    """Of the float model on few images of its first set, and on more: what an image costs, and what a set does."""
    total = 0.0
    known: dict[tuple[str, str], tuple[float, float]] = {}
    for task in ready.todo:
        key = task.model, task.sets.data
        if key not in known:
            known[key] = _probed(task, ready.work.device)
        image, each = known[key]
        conditions = sum(len(block.cells) for block in task.blocks)
        total += image * _images(task, ready.grid.facts.images) + each * conditions
    return total / workers


def _probed(task: Task, device: str) -> tuple[float, float]:
    """Seconds that decoding and embedding one image take, and seconds of one set beside its images."""
    data = qdata.load(task.sets.data)
    model = zoo.load_model(task.model, device)
    settings: dict[str, Any] = {"measurements": ["clean"], "corruptions": (), "cache": False}
    sizes, seconds = [], []
    for batches in (1, 1, 4):  # the first time is also that of what is loaded and compiled once
        few = data.select(np.arange(min(batches * task.measured.batch, len(data))))
        began = time.perf_counter()
        evaluate({"float": model}, few, batch=task.measured.batch, replicates=task.measured.replicates, **settings)
        sizes.append(len(few))
        seconds.append(time.perf_counter() - began)
    more = sizes[2] - sizes[1]
    image = max(0.0, (seconds[2] - seconds[1]) / more) if more else seconds[1] / max(1, sizes[1])
    return image, max(0.0, seconds[1] - image * sizes[1])
