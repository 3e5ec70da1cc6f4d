"""How fluid the page of a study with some 400 variants is, in headless Chromium: until it is drawn, until it is drawn
anew for another metric, place and cost; of a synthetic store, without models and images. The least of several times,
since other work may share the processor.

    python -m benchmarks.study_report            # benchmarks/results/study_report.json
    python -m benchmarks.study_report --keep out # the page alone, into that folder, to look at
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qclip.artifact import DESCRIPTION, TENSORS
from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.study import page
from qclip.study.cells import CLEAN, Block, Grid, expand, quantize_key
from qclip.study.facts import Facts
from qclip.study.plan_file import read
from qclip.study.rows import SCHEMA
from qclip.study.store import StudyStore

RESULT = Path(__file__).parent / "results" / "study_report.json"
RUNTIME = "synthetic"
WEIGHTS = 10_000_000  # of each model
PLAN = """
models = ["photos", "scenes-clean", "scenes-noisy"]
data = ["scenes:test"]
shift = ["scenes:style-shift", "scenes:spurious-test"]
calibration = ["scenes:train"]
[ood]
near = ["scenes:near-ood"]
far = ["scenes:far-ood"]
[methods]
methods = ["rtn", "smoothquant", "repq-vit", "gptq", "awq", "rotation", "svdquant"]
weights = [8, 6, 4, 3, 2]
activations = [8, 6, 4, 16]
[corruptions]
names = ["gaussian_noise", "defocus_blur", "fog", "jpeg_compression"]
"""
# Role, set, corruption and score of each place, and its metrics.
PLACES: list[tuple[str, str, str, str, tuple[str, ...]]] = [
    ("id", "scenes-test", "", "", ("top1", "ece", "nll", "brier", "signed_gap", "aurc")),
    ("shift", "scenes-style-shift", "", "", ("top1", "ece", "nll", "brier", "signed_gap", "aurc")),
    ("shift", "scenes-spurious-test", "", "", ("top1", "ece", "nll", "worst_group_top1", "group_gap")),
    ("ood-near", "scenes-near-ood", "", "mcm", ("auroc", "fpr95")),
    ("ood-far", "scenes-far-ood", "", "mcm", ("auroc", "fpr95")),
    ("ood-mean", "mean of 2 OOD sets", "", "mcm", ("auroc", "fpr95")),
]
NAMES = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
PLACES += [("corrupted", "scenes-test", name, "", ("mean_top1", "mean_ece", "mean_nll")) for name in NAMES]


def synthetic(folder: Path, text: str = PLAN) -> tuple[Grid, StudyStore]:
    """A plan and a store in which every cell was measured, with drawn numbers that are worse at fewer bits."""
    file = folder / "synthetic.toml"
    file.write_text(text)
    plan = read(file)
    names = {name for sets in plan.sets for name in sets.names()} | {
        n for m in plan.models for n in plan.calibrated_on(m)
    }
    bytes_ = dict.fromkeys(plan.models, 4 * WEIGHTS)
    facts = Facts({name: name for name in plan.models}, {name: name for name in names}, {}, bytes=bytes_)
    grid = expand(plan, facts)
    store = StudyStore.create(folder / "synthetic.study")
    draw = np.random.default_rng(0)
    rows = [row for block in grid.blocks for row in _rows(block, draw)]
    store.write_many(RUNTIME, pa.Table.from_pylist(rows, SCHEMA))
    store.note_runtime(RUNTIME, {})
    for block in grid.blocks:
        if block.variant.recipe is not None:
            made = store.folder / "artifacts" / f"{quantize_key(block.variant, facts, plan.measured.strict)}-{RUNTIME}"
            made.mkdir(parents=True, exist_ok=True)
            (made / DESCRIPTION).write_text("{}")
            with open(made / TENSORS, "wb") as tensors:  # as large as it would be, and empty
                tensors.truncate(WEIGHTS * block.variant.recipe.default.weight_bits // 8)
    return grid, store


def _rows(block: Block, draw: np.random.Generator) -> list[dict[str, Any]]:
    variant = block.variant
    bits = 16 if variant.recipe is None else variant.recipe.default.weight_bits
    cost = 2.0 ** -(bits - 2) * 0.2
    common = dict.fromkeys(SCHEMA.names, "") | {"at": None, "subset": "all", "severity": 0, "n": 1000, "seed": 0}
    common |= {"runtime": RUNTIME, "threads": 1, "seconds": 1.0, "model": variant.model, "variant": variant.label}
    common |= {"evaluation": block.sets.data}
    if variant.recipe is not None:
        common |= {"recipe": variant.recipe.name, "method": variant.recipe.method, "bits": variant.recipe.bits}
    plain = common | {"cell": block.cells[CLEAN], "role": "model", "low": None, "high": None}
    out = [
        plain | {"metric": "model_bytes", "value": WEIGHTS * bits / 8},
        plain | {"role": "id", "set": "scenes-test", "metric": "ms_per_image", "value": 1 + bits / 8 + draw.random()},
        plain | {"role": "site", "set": "all", "metric": "site_macs", "value": 1.0, "n": WEIGHTS, "axis": "state"},
    ]
    for role, of, corruption, score, metrics in PLACES:
        for name in metrics:
            better = 1 if name.endswith("top1") or name == "auroc" else -1
            gap = 0.0 if variant.recipe is None else -better * cost * draw.random() + draw.normal(0, 0.004)
            where = {"cell": block.cells[corruption or CLEAN], "role": role, "set": of, "corruption": corruption}
            row = common | where | {"score": score, "metric": name}
            value = 0.7 if better > 0 else 0.1
            out.append(row | {"value": value + gap, "low": value + gap - 0.01, "high": value + gap + 0.01})
            if variant.recipe is not None:
                out.append(row | {"value": gap, "low": gap - 0.01, "high": gap + 0.01, "reference": "float"})
    return out


# The page in a frame, its controls changed one by one: how long each took until the next frame was laid out.
PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
var began = performance.now(), times = {{}};
</script><iframe id="page" src="{page}" style="border:0;width:1280px;height:900px"></iframe><script>
document.getElementById("page").onload = function () {{
  var page = this.contentDocument;
  page.body.getBoundingClientRect();
  times.load = performance.now() - began;
  times.variants = page.querySelectorAll("#heats [data-of]").length;
  times.marks = page.querySelectorAll("#plots [data-of]").length;
  ["metric", "place", "against"].forEach(function (name) {{
    var control = page.getElementById(name), taken = [];
    for (var k = 1; k <= 12; k++) {{  // there and back
      var start = performance.now();
      control.selectedIndex = k % 2;
      control.dispatchEvent(new Event("change"));
      page.body.getBoundingClientRect();
      taken.push(performance.now() - start);
    }}
    times[name] = Math.min.apply(null, taken);
  }});
  var start = performance.now();
  page.querySelector("table.heat [data-of]").dispatchEvent(new Event("pointerover", {{ bubbles: true }}));
  page.body.getBoundingClientRect();
  times.pointed = performance.now() - start;
  document.body.setAttribute("data-found", JSON.stringify(times));
}};
</script>"""


def timed(index: Path, folder: Path) -> dict[str, Any]:
    """Milliseconds from the request to a page that is laid out, and of each control."""
    outer = folder / "probe.html"
    outer.write_text(PROBE.format(page=index.as_uri()))
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("needs chromium (Debian package `chromium`)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    flags += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--timeout=20000"]
    done = subprocess.run([browser, *flags, "--dump-dom", outer.as_uri()], capture_output=True, text=True, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="write the page here, and measure nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid, store = synthetic(folder)
        began = time.perf_counter()
        out, _ = page.write(grid, store, args.keep or folder / "out", pages=False)
        written = time.perf_counter() - began
        if args.keep:
            return
        size = (out / page.FILE).stat().st_size
        runs = [timed(out / page.FILE, folder) for _ in range(5)]
    counted = {key: runs[0][key] for key in ("variants", "marks")}
    least = {f"{key}_ms": round(min(run[key] for run in runs), 1) for key in runs[0] if key not in counted}
    found = {"cpu": cpu_name(), "bytes": size, "write_seconds": round(written, 2), **counted, **least}
    write_atomic(RESULT, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
