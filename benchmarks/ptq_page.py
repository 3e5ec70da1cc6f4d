"""docs/ptq.md, from results: a table for each width, and which method to choose, told from the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qclip import Results

from .findings_page import cell, direction, table
from .outliers import FOLDER
from .ptq import LOOKING, SETTINGS, Setting, label

Row = Mapping[str, Any]

HEAD = """# Post-training methods, measured
Every method at every width on the shipped checkpoints. Written by `python -m benchmarks.ptq write` from
`benchmarks/results/ptq/`; `python -m benchmarks.ptq measure --data DIR` measures again ({hosts}). Differences are
paired, to float, on the same images, with 95 % intervals, in percentage points for shares; **bold** where the interval
excludes 0. These are small models of ours: above 4 bits top-1 hardly separates methods, so they are ordered by the
error of the embeddings.

- *error*: 1 - mean cosine of image embeddings to float's, in thousandths; *x rtn*: that error over the one of rounding
  to nearest at the same widths, the first row of each table.
- *KL*: of the zero-shot probabilities from float's, in thousandths of a nat.
- *noise*: top-1 under Gaussian noise, mean over five severities. *AUROC*: OOD detection by MCM.
- *kernels*: share of multiply-adds that run on integer kernels; the rest is float, or simulated on the grid.
- *bits a weight*: all that a file holds of the quantized weights: codes, scales, zero points, side terms.
- *s*: seconds to quantize, with its calibration. Of a method that draws, the error is the mean over the seeds
  that were measured, with the extremes in brackets where there are several; its other numbers are those of seed 0.
"""
TOLD = (("top1", "top-1"), ("mean_top1", "noise"), ("ece", "ECE"), ("auroc", "AUROC"))


def page(found: Mapping[str, Results]) -> str:
    hosts = ", ".join(dict.fromkeys(str(r.meta.get("cpu", "unknown processor")) for r in found.values()))
    parts = [HEAD.format(hosts=hosts)]
    best = {}
    for name, setting in SETTINGS.items():
        if name not in found:
            continue
        results = found[name]
        parts.append(f"## `{name}`\n{_about(results)}\n")
        for title, names in setting.plan.items():
            variants = [Variant(results, each) for each in names]
            measured = [each for each in variants if each.error is not None]
            if measured:
                best[name, title] = _ordered(measured)
                parts.append(f"### {title}\n" + "\n".join(_table(measured[0], measured)))
            if absent := [f"`{each.name}`" for each in variants if each.error is None]:
                parts.append(f"Not measured: {', '.join(absent)}.\n")
        parts += _elsewhere(results, setting)
    parts += _outliers()
    parts.append("## Which to choose\n" + "\n".join(_choice(best)) + "\n")
    return "\n".join(parts)


class Variant:
    """One recipe on one checkpoint. error: 1 - mean cosine; None: not measured."""

    def __init__(self, results: Results, name: str) -> None:
        self.name, self._results = name, results
        errors = [self._error(label(name, seed)) for seed in range(3)]
        self.errors = [each for each in errors if each is not None]
        self.error = sum(self.errors) / len(self.errors) if self.errors else None

    def _error(self, model: str) -> float | None:
        row = self._results.row(model=model, metric="cosine_mean", reference="float")
        return None if row is None or row["value"] is None else 1 - row["value"]

    def difference(self, metric: str) -> Row | None:
        corruption = "gaussian_noise" if metric == "mean_top1" else ""
        return self._results.row(model=self.name, metric=metric, reference="float", corruption=corruption)

    def of_model(self, metric: str, **where: Any) -> float | None:
        row = self._results.row(model=self.name, metric=metric, role="model", **where)
        return None if row is None else row["value"]

    @property
    def real(self) -> float:
        return self.of_model("coverage_macs", at="real") or 0.0


def _about(results: Results) -> str:
    (set_,) = results.where(model="float", metric="top1", role="id").unique("set")
    top1 = results.row(model="float", metric="top1", set=set_)
    noise = results.row(model="float", metric="mean_top1", corruption="gaussian_noise")
    text = f"Float: top-1 {100 * top1['value']:.1f} % on {set_} ({top1['n']:,} images)"
    return text + (f", {100 * noise['value']:.1f} % under Gaussian noise." if noise else ".")


def _ordered(variants: Sequence[Variant]) -> list[Variant]:
    return sorted(variants, key=lambda each: each.error or 0.0)


def _table(rtn: Variant, variants: Sequence[Variant]) -> list[str]:
    rows = []
    for each in [rtn, *(v for v in _ordered(variants) if v is not rtn)]:
        assert each.error is not None and rtn.error is not None
        spread = f" ({1e3 * min(each.errors):.3g}-{1e3 * max(each.errors):.3g})" if len(each.errors) > 1 else ""
        kl, bits = each.difference("kl"), each.of_model("bits_per_weight")
        rows.append(
            [
                f"`{each.name}`",
                f"{1e3 * each.error:.3g}{spread}",
                "" if each is rtn else f"{each.error / rtn.error:.2f}",
                "" if kl is None else f"{1e3 * kl['value']:.3g}",
                *(cell(each.difference(metric)) for metric, _ in TOLD),
                f"{100 * each.real:.0f} %",
                "" if bits is None else f"{bits:.2f}",
                f"{each.of_model('quantize_seconds') or 0:.0f}",
            ]
        )
    head = ["recipe", "error", "x rtn", "KL", *(title for _, title in TOLD), "kernels", "bits a weight", "s"]
    return table(head, rows)


def _elsewhere(results: Results, setting: Setting) -> list[str]:
    """What it costs to calibrate on images unlike those that come later."""
    rows = []
    for name in LOOKING:
        usual = Variant(results, name)
        others = [Variant(results, label(name, 0, where)) for where in setting.elsewhere]
        if usual.error is None or all(each.error is None for each in others):
            continue
        told = [f"{1e3 * usual.error:.3g}"]
        for each in others:
            if each.error is None:
                told.append("")
                continue
            lost = cell(each.difference("top1"))
            told.append(f"{1e3 * each.error:.3g} ({each.error / usual.error:.2f}x; {lost})")
        rows.append([f"`{name}`", *told])
    if not rows:
        return []
    head = ["recipe", "as above", *setting.elsewhere]
    about = "Error when the same method calibrates on other images; beside it, times what it is above, and top-1.\n"
    return ["### Calibrated elsewhere\n" + about + "\n".join(table(head, rows))]


OUTLIERS = {
    "": "as it is",
    "S": "S: some channels behind norms, 64 times as large",
    "V": "V: some channels of v, 64 times as large",
    "O": "O: an offset of {offset:g} standard deviations on some channels behind norms",
    "H": "H: some hidden units, 64 times as large",
    "SVOH": "all of them",
}


def _outliers() -> list[str]:
    """Small models have no outlying channels; large CLIPs do, so they are put in (`benchmarks/outliers.py`)."""
    parts = []
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        recipes = list(dict.fromkeys(row["recipe"] for row in found["rows"]))
        rows = []
        for kind in dict.fromkeys(row["kinds"] for row in found["rows"]):
            cells = []
            for recipe in recipes:
                (row,) = (r for r in found["rows"] if (r["kinds"], r["recipe"]) == (kind, recipe))
                value, low, high = (100 * each for each in row["top1"])
                text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
                cells.append(f"{1e3 * row['distance']:.3g}; " + (f"**{text}**" if low > 0 or high < 0 else text))
            rows.append([OUTLIERS.get(kind, kind).format(**found), *cells])
        head = ["outliers", *(f"`{recipe}`" for recipe in recipes)]
        parts.append(
            f"## Outlying channels in `{found['model']}`\nLarge CLIPs have some, small models none, so they are put in "
            "without changing what the float model computes (`python -m benchmarks.outliers`). Error and top-1 on "
            f"`{found['data']}`, calibrated on `{found['calibration']}`.\n" + "\n".join(table(head, rows))
        )
    return parts


def _choice(best: Mapping[tuple[str, str], Sequence[Variant]]) -> list[str]:
    lines = []
    for title in dict.fromkeys(title for _, title in best):
        told = []
        for (name, at), variants in best.items():
            if at != title:
                continue
            deployed = [each for each in variants if each.real > 0.9]
            nearest, usable = variants[0], (deployed or variants)[0]
            text = f"on `{name}` the nearest to float is `{nearest.name}` (error {1e3 * (nearest.error or 0):.3g})"
            if usable is not nearest and deployed:
                text += f", of those that run on the kernels `{usable.name}` ({1e3 * (usable.error or 0):.3g})"
            lost = [
                f"{each.name} {cell(row)}"
                for each in variants
                if (row := each.difference("top1")) is not None and direction(row) == -1
            ]
            text += f"; top-1 is lost by {len(lost)} of {len(variants)}"
            noisy = [v for v in variants if (row := v.difference("mean_top1")) is not None and direction(row) == -1]
            if noisy:
                text += f", top-1 under noise by {', '.join(f'`{v.name}`' for v in noisy)}"
            told.append(text)
        lines.append(f"- **{title}**: {'; '.join(told)}.")
    return lines
