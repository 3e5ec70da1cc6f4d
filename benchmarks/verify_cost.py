"""What `qclip verify` costs beyond the passes of its two models: time, and growth of peak RSS in a fresh process.

    python -m benchmarks.verify_cost ViT-B-32 w8a8 --images 1000

Draws images of 256 x 256 pixels into a temporary folder as JPEG and quantizes random weights. In one process, with
both models loaded: the time in which each model embeds the images (decoding, preprocessing, `encode_image`, batches of
32, as a program of its own would), then `verify` of `index_recall@10` on the same images without labels, then the
passes again. Prints one JSON line: both times, their ratio, and the growth of peak RSS since the import as a share of
the float32 parameters' bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import json, sys, time
import qclip.verification, qclip.zoo, qclip.ptq, torch
from qclip import data
name, artifact, folder = sys.argv[1:4]
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
torch.manual_seed(0)
model = qclip.load_model(name)
size = sum(p.numel() * 4 for p in model.parameters())
small = qclip.load(artifact)
images = data.load(f"folder:{folder}")
def passes():
    began = time.perf_counter()
    for each in (model, small):
        encoders = qclip.encoders(each)
        with torch.inference_mode():
            for _, pixels in data.batches(images, encoders.preprocess, size=32):
                encoders.encode_image(pixels)
    return time.perf_counter() - began
def verify():
    began = time.perf_counter()
    found = qclip.verify(small, model, "index_recall@10>=0.5", images, cache=False)
    return time.perf_counter() - began, found.outcomes[0].value
first = passes()
seconds, recall = verify()
own = min(first, passes())
print(json.dumps({"passes_s": own, "verify_s": seconds, "ratio": seconds / own, "recall": recall,
    "growth_share": (peak() - before) / size, "threads": torch.get_num_threads()}))
"""


def draw(folder: Path, count: int) -> None:
    from qclip import data

    drawn = data.load(f"scenes:test?side=256&samples={count}")
    for i in range(count):
        drawn.image(i).save(folder / f"{i:05}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="ViT-B-32")
    parser.add_argument("recipe", nargs="?", default="w8a8")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    import torch

    import qclip

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        draw(folder / "images", args.images)
        torch.manual_seed(0)
        model = qclip.load_model(args.model)
        qclip.save(qclip.quantize_(model, args.recipe), folder / "artifact")
        command = [sys.executable, "-c", PROBE, args.model, str(folder / "artifact"), str(folder / "images")]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    print(json.dumps({"model": args.model, "recipe": args.recipe, "images": args.images} | json.loads(found)))


if __name__ == "__main__":
    main()
