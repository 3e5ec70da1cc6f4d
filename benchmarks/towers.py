"""Whole towers beside their peers, piece by piece: one JSON each in `benchmarks/results`, one process each.

    python -m benchmarks.towers --hold avx2            (every piece that is not there yet; interrupted: run it again)
    python -m benchmarks.towers --hold avx2 --only vit-b-32-image-16-w8a8 --force
    python -m benchmarks.towers --summary              (what is there, as one table)

Needs the peers of the extra `bench`. A piece takes `--seconds` (200) and what loading takes. Files are named
PROCESSOR-TIER-PIECE.json. `--hold` sets what holds our kernels, oneDNN, MKL and torch to an instruction set
(`HOLD` in qclip/bench/processor.py); who cannot be held - ONNX Runtime - is named in the result's warnings.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from qclip.bench.processor import HOLD, tiers
from qclip.files import write_atomic
from qclip.machine import cpu_name

RESULTS = Path(__file__).parent / "results"
FLOAT = "torch-fp32"
#: Piece -> arguments of `qclip bench`.
PIECES = {
    "vit-b-32-image-16-w8a8": [
        "ViT-B-32",
        "--recipe",
        "w8a8",
        "--batch",
        "16",
        "--peers",
        f"{FLOAT},onnxruntime,openvino",
    ],
    "vit-b-32-image-16-w6a8": ["ViT-B-32", "--recipe", "w6a8", "--batch", "16", "--peers", FLOAT],
    "vit-b-32-image-16-w4a8": ["ViT-B-32", "--recipe", "w4a8", "--batch", "16", "--peers", FLOAT],
    "vit-b-32-image-1-w8a8": ["ViT-B-32", "--recipe", "w8a8", "--batch", "1", "--peers", f"{FLOAT},openvino"],
    "vit-b-16-image-8-w8a8": ["ViT-B-16", "--recipe", "w8a8", "--batch", "8", "--peers", f"{FLOAT},openvino"],
    "vit-l-14-image-8-w8a8": ["ViT-L-14", "--recipe", "w8a8", "--batch", "8", "--peers", f"{FLOAT},openvino"],
    "vit-b-32-text-64-w8a8": [
        *["ViT-B-32", "--recipe", "w8a8", "--tower", "text", "--batch", "64", "--peers", f"{FLOAT},openvino"],
    ],
    "vit-b-32-text-64-full-w8a8": [
        *["ViT-B-32", "--recipe", "w8a8", "--tower", "text", "--full", "--batch", "64"],
        *["--peers", f"{FLOAT},openvino"],
    ],
    "siglip-b-16-256-image-8-w8a8": [
        *["ViT-B-16-SigLIP-256", "--recipe", "w8a8", "--batch", "8", "--peers", f"{FLOAT},openvino"],
    ],
}
#: One of each family of image towers, beside float32 alone. Text towers: `benchmarks.text_towers`.
FAMILIES = [
    *["EVA02-B-16", "PE-Core-B-16", "ViTamin-B", "MobileCLIP2-S0"],
    *["vit_relpos_medium_patch16_cls_224", "swin_base_patch4_window7_224"],
]
for name in FAMILIES:
    PIECES[f"{name.lower().replace('_', '-')}-image-8-w8a8"] = [
        *[name, "--recipe", "w8a8", "--batch", "8", "--peers", FLOAT],
    ]


def processor_id(cpuinfo: str) -> str:
    """As "AMD-EPYC-f25m17": many clouds hide which EPYC or Xeon it is; family and model tell the generation."""
    facts = dict(re.findall(r"^(cpu family|model|model name)\s*:\s*(.*)$", cpuinfo, re.M)[::-1])
    name = re.sub(r"\((?:R|TM|C)\)|\bCPU\b|@.*|\bProcessor\b", " ", facts.get("model name", "") or cpu_name())
    words = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return words + (f"-f{facts['cpu family']}m{facts['model']}" if "cpu family" in facts else "")


def place(piece: str, tier: str) -> Path:
    info = Path("/proc/cpuinfo")
    return RESULTS / f"{processor_id(info.read_text() if info.is_file() else '')}-{tier}-{piece}.json"


def run(piece: str, hold: str | None, seconds: float, path: Path, peers: str | None = None) -> int:
    """Measure a piece in a process of its own; the file appears when all of it is done. Returns the exit code."""
    command = [sys.executable, "-m", "qclip", "bench", *PIECES[piece], "--seconds", str(seconds), "--json"]
    command += ["--peers", peers] if peers else []
    environment = os.environ | (HOLD[hold] if hold else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    found = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode in (0, 1) and found.get("ours") and not found["interrupted"]:  # 1: a peer failed, and is named
        for failure in found.get("failed", {}).values():
            failure.pop("log", None)  # it was shown, and holds paths of this machine
        write_atomic(path, f"{json.dumps(found, indent=1)}\n".encode())
        print(line(found), flush=True)
    else:
        print(f"{piece}: exit code {done.returncode}, nothing written", flush=True)
    return done.returncode


def line(found: dict[str, Any]) -> str:
    """A result in a line: ours, and how many times faster it is than each peer's setting that speaks for it."""
    peers = [f"{name} {found['ratios'][name]:.2f}x ({row['setting']})" for name, row in found["peers"].items()]
    what = "{model} {tower} {batch} {recipe}, {tier}: {ms:.2f} ms".format(**found, ms=found["ours"]["ms_per_item"])
    bad = [*found.get("warnings", []), *(f"{name} {why}" for name, why in found.get("absent", {}).items())]
    bad += [f"{name} failed" for name in found.get("failed", {})]
    return "\n".join([f"{what}; {'; '.join(peers) or 'alone'}", *(f"    {each}" for each in bad)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hold", choices=sorted(HOLD), help="hold everybody to this instruction set")
    parser.add_argument("--only", choices=sorted(PIECES), nargs="+", metavar="PIECE", help=", ".join(PIECES))
    parser.add_argument("--seconds", type=float, default=200.0, help="per piece")
    parser.add_argument("--peers", help="these and not the piece's own, as for `qclip bench`")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    args = parser.parse_args()
    tier = args.hold or tiers()[0] or "reference"
    for piece in args.only or PIECES:
        path = place(piece, tier)
        if args.summary or (path.is_file() and not args.force):
            print(
                line(json.loads(path.read_text())) if path.is_file() else f"{piece}, {tier}: not measured", flush=True
            )
        elif code := run(piece, args.hold, args.seconds, path, args.peers):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
