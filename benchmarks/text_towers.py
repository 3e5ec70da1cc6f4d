"""Text towers of open_clip whose tokenizers are not to be had without the network, beside float32 in eager mode.

    python -m benchmarks.text_towers [NAME ...] [--hold avx2] [--batch 8] [--rounds 15] [--json FILE]

Random weights, random token ids that fill the context (at most 77), float and w8a8 in turns; medians. A vocabulary is
cut to 1,000 words, since a lookup takes no time that counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

import qclip
from benchmarks.sweep import inputs, stirred
from qclip import models
from qclip.bench.processor import HOLD, tiers
from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.models.open_clip import architecture

NAMES = ("xlm-roberta-base-ViT-B-32", "mt5-base-ViT-B-32", "nllb-clip-base")


@torch.inference_mode()
def measure(name: str, batch: int, rounds: int) -> dict:
    import open_clip

    description = architecture(open_clip.get_model_config(name))
    words = description["config"]["text_cfg"]["hf_config"]
    words["vocab_size"] = 1000
    description["config"]["vision_cfg"]["layers"] = 1
    model = stirred(models.create_from_config(description))
    tokens = inputs(model, batch)[1]
    towers = [models.encoders(each).encode_text for each in (model, qclip.quantize(model, "w8a8"))]
    found: list[list[float]] = [[], []]
    for turn in range(rounds + 3):
        for tower, times in zip(towers, found, strict=True):
            start = time.perf_counter()
            tower(tokens)
            if turn >= 3:  # the first calls are traced
                times.append(time.perf_counter() - start)
    plain, ours = (1000 * statistics.median(times) for times in found)
    ratio = statistics.median(a / b for a, b in zip(*found, strict=True))
    return {
        "name": name,
        "batch": batch,
        "tokens": tokens.shape[1],
        "float32_ms": plain,
        "w8a8_ms": ours,
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--hold", choices=sorted(HOLD), help="hold everybody to this instruction set")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.hold and os.environ.get("QCLIP_HELD") != args.hold:  # libraries read it when they are loaded
        held = os.environ | HOLD[args.hold] | {"QCLIP_HELD": args.hold}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.text_towers", *sys.argv[1:]], held)
    rows = []
    for name in args.names:
        row = measure(name, args.batch, args.rounds) | {"tier": args.hold or tiers()[0], "cpu": cpu_name()}
        print("{name}, {tier}: {w8a8_ms:.1f} ms, float32 {float32_ms:.1f} ms, {ratio:.2f}x".format(**row), flush=True)
        rows.append(row)
    if args.json:
        write_atomic(args.json, f"{json.dumps(rows, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
