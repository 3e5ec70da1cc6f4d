"""How much memory a quantized model takes to load and run: growth of peak RSS in a fresh process.

    python benchmarks/memory.py ViT-L-14 w8a8       (first makes an artifact of random weights, in a temporary folder)

Prints one JSON line: bytes of the float32 parameters, peak RSS before and after loading and after one image and one
text through the towers at batch 1, and the growth as a share of the float32 bytes.

The baseline is after importing what loads models, torch and open_clip among it (0.8 GB). The tokenizer, made when the
first text comes, and the workspaces of the forward passes count as growth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import json, sys
import qclip.ptq, qclip.zoo, torch
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = qclip.load(sys.argv[1])
loaded = peak()
encoders = qclip.encoders(model)
with torch.inference_mode():
    encoders.encode_image(torch.zeros(1, 3, encoders.image_size, encoders.image_size))
    encoders.encode_text(encoders.tokenizer(["a photo of a dog"]))
print(json.dumps({"rss_import": before, "rss_loaded": loaded, "rss_run": peak()}))
"""


def make(name: str, recipe: str, folder: Path) -> tuple[Path, int]:
    import qclip

    model = qclip.load_model(name)
    size = sum(p.numel() * 4 for p in model.parameters())
    return qclip.save(qclip.quantize_(model, recipe), folder / "artifact"), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="ViT-L-14")
    parser.add_argument("recipe", nargs="?", default="w8a8")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact, size = make(args.model, args.recipe, Path(folder))
        on_disk = sum(f.stat().st_size for f in artifact.iterdir())
        out = subprocess.run([sys.executable, "-c", PROBE, str(artifact)], check=True, capture_output=True, text=True)
    facts = json.loads(out.stdout.splitlines()[-1])
    growth = (facts["rss_run"] - facts["rss_import"]) / size
    print(
        json.dumps(
            {
                "model": args.model,
                "recipe": args.recipe,
                "float32_bytes": size,
                "artifact_bytes": on_disk,
                "artifact_share": round(on_disk / size, 4),
                **facts,
                "growth_share": round(growth, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
