"""What quantization did to the reliability of the shipped checkpoints: measured once, told from the measurements.

    python -m benchmarks.findings measure --data DIR [--only NAME]   # DIR: the Parquet files named below; minutes each
    python -m benchmarks.findings write                              # docs/findings.md from benchmarks/results/findings

`measure` evaluates `photos`, `scenes-clean` (overconfident) and `scenes-noisy` (underconfident) as float, `w8a8`,
`w6a8` and `w4a8`, `photos` with INT8 sums that saturate at 16 bits beside exact ones, and the spectra of their weights;
it keeps the rows that `write` reads. Nothing in the page is typed: every sentence follows from rows and intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qclip import Results
from qclip.files import write_atomic
from qclip.results.table import missing

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "findings"
PAGE = ROOT / "docs" / "findings.md"
RECIPES = ("w8a8", "w6a8", "w4a8")
CORRUPTIONS = ("gaussian_noise", "shot_noise", "defocus_blur", "fog")
# Of sets: differences to float, and these of float itself. Of towers: what the verdict on spectra reads.
COMPARED = (
    *("top1", "ece", "nll", "signed_gap", "auroc", "mean_top1", "worst_group_top1", "group_gap", "cosine_mean"),
    "index_recall",
)
ABSOLUTE = ("top1", "ece", "signed_gap")
SPECTRA = ("level", "shape", "gain", "sqnr")
PLAIN = ("source", "recipe", "method", "bits", "recipe_hash", "backend", "host", "seconds", "seed")  # left out
SETS = {
    "photos": {
        "data": "parquet:{data}/cifar10_test.parquet?samples=5000",
        "dev": "parquet:{data}/cifar10_dev.parquet?samples=2000",
        "shift": ["parquet:{data}/cinic10_shift_32.parquet"],
        "ood": [
            "near=parquet:{data}/imagenet_near_64.parquet",
            "far=parquet:{data}/dtd10_64.parquet",
            "far=parquet:{data}/mnist_test.parquet?samples=2000",
        ],
    },
    "scenes-clean": {},
    "scenes-noisy": {},
}
SCENES = {
    "data": "scenes:test",
    "dev": "scenes:dev",
    "shift": ["scenes:style-shift", "scenes:spurious-test"],
    "ood": ["scenes:near-ood", "scenes:far-ood"],
}


def measure(name: str, data: str) -> Results:
    import qclip

    float_model = qclip.load_model(name)
    models = {"float": float_model, **{recipe: qclip.quantize(float_model, recipe) for recipe in RECIPES}}
    filled = json.loads(json.dumps(SETS[name] or SCENES).replace("{data}", data))
    scores = ["mcm", "msp", "energy"]
    results = qclip.evaluate(models, **filled, corruptions=CORRUPTIONS, scores=scores)
    spectra = qclip.weight_spectrum(float_model, {k: v for k, v in models.items() if k != "float"})
    return kept(Results.merge(results, spectra))


def measure_saturation(data: str) -> Results:
    import qclip

    from .saturation import with_pair_sums

    model = qclip.load_model("photos")
    small = qclip.quantize(model, "w8a8")
    models = {"exact sums": with_pair_sums(model, small, False), "16-bit sums": with_pair_sums(model, small, True)}
    filled = json.loads(json.dumps(SETS["photos"]).replace("{data}", data))
    filled["data"] = filled["data"].split("?")[0] + "?samples=2000"
    filled["ood"] = [each.split("?")[0] + "?samples=200" for each in filled["ood"]]
    filled["dev"] = filled["dev"].split("?")[0] + "?samples=500"
    filled["shift"] = []
    return kept(qclip.evaluate({"float": model, **models}, **filled, corruptions=(), scores=["mcm", "msp", "energy"]))


def kept(results: Results) -> Results:
    """The rows that the page reads."""
    out = Results(meta={k: v for k, v in results.meta.items() if k != "models"}, notes=list(results.notes))
    out.rows = [row | {column: missing(column) for column in PLAIN} for row in results if _is_read(row)]
    return out


def _is_read(row: dict[str, Any]) -> bool:
    if row["role"] == "tower":
        return row["metric"] in SPECTRA
    if row["subset"] != "all" or (row["corruption"] and row["metric"] != "mean_top1") or row["axis"] == "fitted_on":
        return False
    if row["metric"] in ABSOLUTE and row["model"] == "float" and not row["axis"]:
        return True
    return row["reference"] == "float" and row["metric"] in COMPARED and row["axis"] in ("", "neighbours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("measure")
    one.add_argument("--data", required=True, help="folder of the Parquet files")
    one.add_argument("--only", choices=[*SETS, "saturation"])
    sub.add_parser("write")
    args = parser.parse_args()
    if args.what == "write":
        from .findings_page import page

        text = page({path.stem: Results.from_json(path) for path in sorted(FOLDER.glob("*.json"))})
        write_atomic(PAGE, text.encode())
        return
    for name in [args.only] if args.only else [*SETS, "saturation"]:
        found: Any = measure_saturation(args.data) if name == "saturation" else measure(name, args.data)
        found.to_json(FOLDER / f"{name}.json")
        print(f"{name}: {len(found)} rows")


if __name__ == "__main__":
    main()
