"""Speed of a quantized tower beside its peers: interleaved calls on the same input and threads, medians, in one run.

A ratio is peer seconds over ours, both from the same minutes of the same machine. Every contender's output is compared
with the float32 model first, so that nobody is fast by computing something else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qclip import recipes, rewrite, zoo
from qclip.machine import cpu_name
from qclip.progress import Progress
from qclip.ptq import quantize

from . import contender, measure, prepare, processor, result
from .budget import Budget
from .case import BATCH, Case, encode, make_input
from .macs import count_macs
from .peers import PEERS, peer_names
from .rightness import least_cosine
from .seat import Seat, write_model


def bench(
    model: str | Path | nn.Module,
    recipe: str | Path | dict | recipes.Recipe = "w8a8",
    *,
    tower: str = "image",
    batch: int | None = None,
    peers: Iterable[str] = ("torch-fp32",),
    calibration: object = None,
    full: bool = False,
    seconds: float = 60.0,
    arch: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time `recipe` on one tower of `model`, and peers, on a CPU with torch's threads. Float32 in, embeddings out.

    `batch` images of standard normal pixels, or prompts "a photo of a NAME" (`full`: prompts that fill the context);
    `seconds` for all that comes once the model is loaded and quantized: peers are made ready (export, calibration,
    compilation), then everyone takes turns. Ctrl-C while they do ends it; what was measured until then is returned.

    Returns JSON: `ours` and `peers[NAME]` (seconds per call: median and quartiles; turns; ms_per_item; cosine to
    float32; a peer's `settings`, of which the fastest one that is right speaks for it), `ratios[NAME]` = peer seconds /
    our seconds, `warnings` (who is wrong), `unequal`, `absent` (NAME -> why), `failed` (NAME -> why and last lines),
    `interrupted`, `cpu`, `tier`, `held` (variables that hold somebody to an instruction set), `threads`,
    `peak_gops`, `percent_of_peak`, notes. Raises InputError for an unknown peer, recipe or model.
    """
    chosen = recipes.get(recipe)
    names = peer_names(",".join(peers) or "none")
    batch = batch or BATCH[tower]
    say = progress or (lambda what, done, total: None)
    say("loading", 0, 1)
    original = zoo.load_model(model, arch=arch)
    x = make_input(original, tower, batch, seed, full)
    with torch.inference_mode():
        wanted = encode(original, tower)(x).float().clone()
    say(f"quantizing, {chosen.name}", 0, 1)
    quantized = quantize(original, chosen, calibration, seed)
    bits = min(chosen.default.weight_bits, chosen.default.activation_bits)
    limits = {"ours": least_cosine(bits), "peers": least_cosine(8)}
    found: dict[str, Any] = {
        "model": str(getattr(original, "qclip_source", None) or model),
        "recipe": chosen.name,
        "tower": tower,
        "batch": batch,
        "full": full,
        "unit": "image" if tower == "image" else "prompt",
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "tier": processor.tiers()[0],
        "held": processor.settings(),
        "asked_seconds": seconds,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        case = Case(original, tower, x, torch.get_num_threads(), Path(folder))
        budget = Budget(seconds)
        told = functools.partial(_in_tenths, say)
        seats = _seats(names, case, wanted, say)
        for seat in seats:
            stack.callback(seat.end)
        ready = prepare.prepare(seats, budget, case.threads, told)
        entrants = [_ours(quantized, chosen.name, case, wanted, limits["ours"])]
        for seat in seats:
            entrants += contender.theirs(seat, ready.ready[seat.name], seat.saturates, limits["peers"])
        measured = measure.measure(entrants, budget, told, processor.peak)
        failed = ready.failed | measured.failed
        found["spent_seconds"] = round(budget.spent(), 1)
        found["failed"] = {n: {"why": why, "log": s.log()} for n, why in failed.items() for s in seats if s.name == n}
        found |= result.told(entrants, measured, batch, limits)
        found["absent"] = {name: why for name, why in ready.late.items() if name not in found["peers"]}
        found["notes"] += [f"{name} {why}" for name, why in ready.late.items() if name in found["peers"]]
        found["unequal"] = _unequal(names, ready.ready)
        found["warnings"] += [f"{name} {why}" for name, why in found["unequal"].items()]
        if found["ours"] is None:
            return found  # interrupted before anything was measured
        found |= _work(count_macs(case.explicit(), tower, x), found["ours"]["seconds"], measured.speeds)
    found["notes"] += _notes(quantized, chosen.name, tower, found["peak_gops"])
    return found


def _in_tenths(say: Progress, what: str, done: float, total: float) -> None:
    """Seconds as whole numbers, which progress is made of."""
    say(what, round(10 * done), max(1, round(10 * total)))


def _seats(names: tuple[str, ...], case: Case, wanted: Tensor, say: Progress) -> list[Seat]:
    if not names:
        return []
    say("writing the model for its peers", 0, 1)
    write_model(case.original, case.folder)
    tier = processor.tiers()
    peers = {name: PEERS.get(name) for name in names}
    return [
        Seat(name, peer, dataclasses.replace(case, saturates=processor.saturates(peer.held_by, *tier)), wanted)
        for name, peer in peers.items()
    ]


def _ours(model: nn.Module, name: str, case: Case, wanted: Tensor, limit: float) -> contender.Contender:
    run = case.run(model)
    with torch.inference_mode():
        cosines = torch.nn.functional.cosine_similarity(run().float(), wanted, dim=-1)
    return contender.ours(name, run, float(cosines.mean()), float(cosines.min()), limit)


def _unequal(names: tuple[str, ...], ready: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Peers that use another instruction set than ours, and why: by what holds them, and by what they tell."""
    reasons, tier = {}, processor.tiers()
    for name in names:
        why = processor.unequal(PEERS.get(name).held_by, *tier)
        told = [each["instructions"] for each in ready[name] if processor.beyond(each["instructions"], tier[0])]
        if why or told:
            reason = why or f"runs {told[0]} in part, our kernels {tier[0]}"
            reasons[name] = f"{reason}: its ratio compares two instruction sets"
    return reasons


def _work(macs: int, seconds: float, speeds: list[float]) -> dict[str, Any]:
    """Operations per nanosecond, and their share of the INT8 peak that was seen between the rounds."""
    gops, peak = 2 * macs / seconds / 1e9, processor.peak() and max([*speeds, processor.peak() or 0.0])
    return {"macs": macs, "gops": gops, "peak_gops": peak, "percent_of_peak": 100 * gops / peak if peak else None}


def _notes(quantized: nn.Module, name: str, tower: str, peak: float | None) -> list[str]:
    notes = []
    if peak and (crowded := processor.crowded(peak, torch.get_num_threads())):
        notes.append(crowded)
    done = rewrite.quantization(quantized)
    if done is not None and done.coverage.share("simulated"):
        notes.append(f"{name} is simulated in float arithmetic here: its time says nothing about a kernel")
    if tower == "text":
        notes.append(
            "the text tower runs up to the last end-of-text token of the batch where that is exact; "
            "percent_of_peak counts what was computed"
        )
    return notes
