"""What methods cost: seconds to quantize ViT-B/32 on 512 images, and the peak of memory, one process a recipe.

    python -m benchmarks.ptq_cost [RECIPE ...] [--images 512] [--threads 2] [--json FILE]

Weights are random, and so are the images, which a method does not mind: it does the same work. Prints seconds with
their parts that are passes over the images alone, and the peak of resident memory over that of the float model alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from qclip.files import write_atomic

RECIPES = ("w8a8-static", "w8a8-smoothquant", "w4a16-hqq", "w3a8-raana", "w4a8-gptq", "w4a8-awq")


def measure(recipe: str, images: int, threads: int) -> dict:
    import torch

    import qclip
    from qclip import machine, models

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    began = peak()
    model = qclip.load_model("ViT-B-32")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    pixels = torch.randn(images, 3, 224, 224)
    encoders = models.encoders(model)
    start = time.perf_counter()
    with torch.inference_mode():
        for part in pixels.split(32):
            encoders.encode_image(part)
    one_pass = time.perf_counter() - start
    start = time.perf_counter()
    qclip.quantize_(model, recipe, pixels)
    return {
        "recipe": recipe,
        "seconds": round(time.perf_counter() - start, 1),
        "one_float_pass": round(one_pass, 1),
        "peak_over_float": round((peak() - began - pixels.nbytes) / size, 2),
        "images": images,
        "threads": threads,
        "cpu": machine.environment()["cpu"],
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.recipes[0], args.images, args.threads)))
        return
    rows = []
    for recipe in args.recipes:
        line = [sys.executable, "-m", "benchmarks.ptq_cost", recipe, "--one"]
        line += ["--images", str(args.images), "--threads", str(args.threads)]
        ran = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        if ran.returncode == 0:
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
        if args.json is not None:
            write_atomic(args.json, f"{json.dumps(rows, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
