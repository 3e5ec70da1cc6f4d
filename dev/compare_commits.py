"""Does this checkout still give the numbers of another commit? Codes and scales bit by bit, evaluations to 1e-12.

    python dev/compare_commits.py 14cdde2            # everything: all presets on all shipped checkpoints (some minutes)
    python dev/compare_commits.py 14cdde2 --quick    # scenes-clean only

The other commit is checked out beside this one (a git worktree in a temporary folder) with the kernels compiled here
where csrc/ is the same, else with its own. What is compared:

- for every checkpoint and preset: the names and bytes of all codes, zeros, scales, smoothing vectors and static scales,
  and the unit embeddings of 32 images and 8 captions;
- `evaluate` of float, w8a8, w8a8-smoothquant and w4a8 with corruptions, OOD sets, a shifted set and a dev set: all
  values and intervals. Rows are matched by model, set, corruption, severity, metric and reference; within those by
  size, so that the names of columns may change.

Exit status 0 where everything is equal, 1 where not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ("scenes-clean", "scenes-noisy", "photos")
RECIPES = ("w8a8", "w8a8-static", "w8a8-smoothquant", "w4a8", "w4a8-mixed", "w4a16", "w6a8", "w4a4")
FACTS = ("codes", "scales", "zeros", "smooth", "input_scale")
RENAMED = {"transforms.0.factor": "smooth"}  # names of state_dict that changed since 14cdde2
TOLERANCE = 1e-12
MEASURED = ("ms_per_image",)  # times: never equal
ON_PURPOSE = {"embeddings w6a8": "w6a8 runs on the INT8 kernels since then, and was simulated before"}


def worker(out: Path, checkpoints: list[str]) -> None:
    """Runs in either checkout: everything that is compared, as JSON."""
    import torch

    import qclip

    torch.set_num_threads(1)
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found: dict = {"codes": {}, "embeddings": {}, "rows": []}
    for name in checkpoints:
        for recipe in RECIPES:
            model = qclip.quantize(qclip.load_model(name), recipe, calibration="scenes:train?samples=64")
            label = f"{name} {recipe}"
            found["codes"][label] = {
                key: hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw(tensor)).hexdigest()
                for key, tensor in ((renamed(key), tensor) for key, tensor in model.state_dict().items())
                if key.rpartition(".")[2] in FACTS
            }
            side = model.visual.image_size
            side = side[0] if isinstance(side, tuple) else side
            pixels = torch.nn.functional.interpolate(images, (side, side))
            texts = model.tokenizer(
                [f"a photo of a {word}." for word in "cat dog bird frog red blue star ship".split()]
            )
            with torch.no_grad():
                pair = model.encode_image(pixels), model.encode_text(texts)
            found["embeddings"][label] = [hashlib.sha256(raw(part)).hexdigest() for part in pair]
            print(label, file=sys.stderr, flush=True)
    for name in checkpoints[:2]:
        float_model = qclip.load_model(name)
        models = {"float": float_model}
        for recipe in ("w8a8", "w8a8-smoothquant", "w4a8"):
            models[recipe] = qclip.quantize(float_model, recipe, calibration="scenes:train?samples=64")
        results = qclip.evaluate(
            models,
            data=["scenes:test?samples=300", "scenes:spurious-test?samples=200"],
            ood={"near": "scenes:near-ood?samples=150", "far": "scenes:far-ood?samples=150"},
            shift="scenes:style-shift?samples=150",
            dev="scenes:dev?samples=200",
            cache=False,
        )
        written = out.with_suffix(f".{name}.json")
        results.to_json(written)
        found["rows"].append(str(written))
        print(f"{name} evaluated", file=sys.stderr, flush=True)
    out.write_text(json.dumps(found))


def renamed(key: str) -> str:
    for new, old in RENAMED.items():
        if key.endswith(f".{new}"):
            return key.removesuffix(new) + old
    return key


def raw(tensor) -> bytes:  # noqa: ANN001
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def values(path: str) -> dict[str, list]:
    """key -> sorted [value, low, high] of all rows with that key, and [number] of all curves. This checkout reads both
    files: results of an older version come upgraded."""
    sys.path.insert(0, str(ROOT))
    from qclip.results import Results

    results = Results.from_json(path)
    found: dict[str, list] = defaultdict(list)
    for row in results.rows:
        if row["metric"] not in MEASURED:
            key = [str(row[c]) for c in ("model", "set", "corruption", "severity", "metric", "reference")]
            found[" | ".join(key)].append([row["value"], row["low"], row["high"]])
    for curve in results.curves:
        for name, column in curve["points"].items():
            key = [str(curve[c]) for c in ("model", "set", "corruption", "score", "metric")] + [name]
            found[" | ".join(key)] += [[number] for number in column]
    return {
        key: sorted(listed, key=lambda v: [(x is None, x if x is not None else 0.0) for x in v])
        for key, listed in found.items()
    }


def run(checkout: Path, out: Path, checkpoints: list[str]) -> dict:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", str(out), "--checkpoints", *checkpoints]
    subprocess.run(command, check=True, cwd=checkout, env=environment)
    return json.loads(out.read_text())


def check_out(commit: str, folder: Path) -> Path:
    """The other commit as a worktree with compiled kernels."""
    there = folder / "other"
    subprocess.run(["git", "worktree", "add", "-q", "--detach", str(there), commit], check=True, cwd=ROOT)
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", "csrc"], cwd=ROOT).returncode == 0
    if same and (compiled := list((ROOT / "qkernels").glob("_*.so"))):
        for file in compiled:
            shutil.copy(file, there / "qkernels")
    else:
        environment = os.environ | {"QKERNELS_CUDA": "0"}
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True, cwd=there, env=environment
        )
    return there


def close(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        (x is None) == (y is None) and (x is None or abs(x - y) <= TOLERANCE * max(1.0, abs(x)))
        for u, v in zip(a, b, strict=True)
        for x, y in zip(u, v, strict=True)
    )


def compare(old: dict, new: dict) -> int:
    """Prints what differs; how many things do."""
    bad = 0
    for part in ("codes", "embeddings"):
        for label, facts in old[part].items():
            if facts == new[part][label]:
                continue
            if why := ON_PURPOSE.get(f"{part} {label.split()[-1]}"):
                print(f"{part} of {label} differ on purpose: {why}")
                continue
            bad += 1
            if part == "codes":
                odd = sorted(
                    k for k in facts.keys() | new[part][label].keys() if facts.get(k) != new[part][label].get(k)
                )
                print(f"codes of {label}: {len(odd)} of {len(facts)} tensors differ, the first is {odd[0]}")
            else:
                print(f"embeddings of {label} differ in some bit")
    for before, after in zip(map(values, old["rows"]), map(values, new["rows"]), strict=True):
        for key, listed in before.items():
            if key not in after:
                bad += 1
                print(f"rows: {key}: {len(listed)} values are gone")
            elif not close(listed, after[key]):
                bad += 1
                print(f"rows: {key}: {listed[:3]} are now {after[key][:3]}")
        for key in after.keys() - before.keys():
            print(f"rows: {key} is new (no difference)")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--quick", action="store_true", help="scenes-clean only")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoints", nargs="+", default=list(CHECKPOINTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.checkpoints)
        return 0
    if given.commit is None:
        parser.error("name the commit to compare with")
    checkpoints = list(CHECKPOINTS[:1] if given.quick else CHECKPOINTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = check_out(given.commit, folder)
        try:
            old = run(there, folder / "old.json", checkpoints)
            new = run(ROOT, folder / "new.json", checkpoints)
            bad = compare(old, new)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(there)], cwd=ROOT)
    print("everything is equal" if bad == 0 else f"{bad} things differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
