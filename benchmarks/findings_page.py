"""docs/findings.md, from results: tables of paired differences, and sentences that follow from their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qclip import Results
from qclip.metrics import metric
from qclip.reporting.units import metric as printed
from qclip.spectral import verdict

RECIPES = ("w8a8", "w6a8", "w4a8")
CHECKPOINTS = ("photos", "scenes-clean", "scenes-noisy")
Row = Mapping[str, Any]

HEAD = """# Findings
What quantization did to the reliability of the three shipped checkpoints, and what of the paper "Less Precise Can Be
More Reliable" (arXiv 2509.21173) it bears out. Written by `python -m benchmarks.findings write` from
`benchmarks/results/findings/`; `python -m benchmarks.findings measure --data DIR` measures again ({hosts}). Every
number is a paired difference to float with its 95 % interval, in percentage points for shares; **bold** where the
interval excludes 0. These are small models of ours, not the paper's; post-training rounding to nearest only, no method
that calibrates, no training.
"""


def page(found: Mapping[str, Results]) -> str:
    hosts = ", ".join(dict.fromkeys(str(r.meta.get("cpu", "unknown processor")) for r in found.values()))
    parts = [HEAD.format(hosts=hosts)]
    for title, section in SECTIONS:
        lines = section(found)
        parts.append(f"## {title}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def differences(results: Results, name: str, **where: Any) -> dict[str, Row]:
    """model -> the row of its difference to float."""
    rows = results.where(metric=name, reference="float", **where).rows
    return {row["model"]: row for row in rows}


def direction(row: Row) -> int:
    """1: better than float, -1: worse, 0: no difference shown."""
    if row["value"] is None or row["low"] is None or row["low"] <= 0 <= row["high"]:
        return 0
    return metric(row["metric"]).better * (1 if row["value"] > 0 else -1)


def cell(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "not measured"
    of = printed(row["metric"])
    text = f"{of.difference(row['value'])} {of.difference_interval(row['low'], row['high'])}"
    return f"**{text}**" if row["low"] is not None and not row["low"] <= 0 <= row["high"] else text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def counted(rows: Sequence[Row]) -> str:
    """ "2 better, 1 worse, 3 without a difference that can be told" """
    found = [direction(row) for row in rows]
    return (
        f"{found.count(1)} better, {found.count(-1)} worse, "
        f"{found.count(0)} without a difference that can be told, of {len(found)}"
    )


def _sets(results: Results, *roles: str) -> list[str]:
    return results.where(role=roles).unique("set")


def calibration(found: Mapping[str, Results]) -> list[str]:
    rows, per_model, gaps = [], {}, {}
    for name in CHECKPOINTS:
        if name not in found:
            continue
        results = found[name]
        (set_,) = _sets(results, "id")[:1]
        gap = results.row(model="float", metric="signed_gap", set=set_, role="id")
        eces = differences(results, "ece", set=set_, role="id", axis="", subset="all")
        confidence = differences(results, "signed_gap", set=set_, role="id", axis="", subset="all")
        if gap is None:
            continue
        gaps[name] = gap
        per_model[name] = [eces[r] for r in RECIPES if r in eces]
        rows.append(
            [f"`{name}`", f"{100 * gap['value']:+.1f}", *(cell(eces.get(r)) for r in RECIPES)]
            + [cell(confidence.get("w4a8"))]
        )
    lines = ["Does quantization move calibration in opposite directions for an under- and an overconfident model?", ""]
    lines += table(
        ["checkpoint", "confidence minus accuracy of float", *(f"ECE, `{r}`" for r in RECIPES), "gap, `w4a8`"], rows
    )
    over = {name for name, gap in gaps.items() if gap["low"] > 0}
    under = {name for name, gap in gaps.items() if gap["high"] < 0}
    told = {
        sign: {name for name, rows_ in per_model.items() if any(direction(r) == sign for r in rows_)}
        for sign in (1, -1)
    }
    if (told[1] & under and told[-1] & over) or (told[-1] & under and told[1] & over):
        better = "underconfident" if told[1] & under else "overconfident"
        lines.append(f"Yes, here: the {better} model gains in calibration where the other one loses.")
    else:
        all_rows = [row for each in per_model.values() for row in each]
        lines.append(f"Not shown here: differences in ECE are {counted(all_rows)}; no opposite directions can be told.")
    return lines


def detection(found: Mapping[str, Results]) -> list[str]:
    rows, both, all_rows = [], [], []
    for name in CHECKPOINTS:
        if name not in found:
            continue
        results = found[name]
        (set_,) = _sets(results, "id")[:1]
        eces = differences(results, "ece", set=set_, role="id", axis="", subset="all")
        for ood in _sets(results, "ood", "ood-near", "ood-far"):
            for score in ("mcm", "energy"):
                auroc = differences(results, "auroc", set=ood, score=score)
                if not auroc:
                    continue
                rows.append([f"`{name}`", f"{ood}, {score}", *(cell(auroc.get(r)) for r in RECIPES)])
                for r in RECIPES:
                    if r in auroc:
                        all_rows.append(auroc[r])
                        if r in eces and direction(auroc[r]) == 1 and direction(eces[r]) == -1:
                            both.append(f"`{name}` {r} on {ood} by {score}")
    lines = ["Does OOD detection improve while calibration gets worse?", ""]
    lines += table(["checkpoint", "AUROC on", *(f"`{r}`" for r in RECIPES)], rows)
    lines.append(f"Of the differences in AUROC {counted(all_rows)}.")
    lines.append(
        f"Better detection beside worse calibration is seen: {'; '.join(both)}."
        if both
        else "No case of better detection beside worse calibration can be told."
    )
    return lines


def robustness(found: Mapping[str, Results]) -> list[str]:
    rows, noise, shifts = [], [], []
    for name in CHECKPOINTS:
        if name not in found:
            continue
        results = found[name]
        for corruption in results.where(metric="mean_top1").unique("corruption"):
            each = differences(results, "mean_top1", corruption=corruption)
            if each:
                rows.append([f"`{name}`", corruption.replace("_", " "), *(cell(each.get(r)) for r in RECIPES)])
                noise += [each[r] for r in RECIPES if r in each and "noise" in corruption]
        for set_ in _sets(results, "shift"):
            each = differences(results, "top1", set=set_, role="shift", axis="", subset="all")
            if each:
                rows.append([f"`{name}`", f"{set_} (shift)", *(cell(each.get(r)) for r in RECIPES)])
                shifts += [each[r] for r in RECIPES if r in each]
    lines = ["Does robustness to noise rise while covariate shift gains nothing?", ""]
    lines += table(["checkpoint", "top-1 under", *(f"`{r}`" for r in RECIPES)], rows)
    lines.append(f"Noise: {counted(noise)}. Shift: {counted(shifts)}.")
    rises = [direction(row) for row in noise]
    lines.append(
        "Noise robustness rises more often than it falls."
        if rises.count(1) > rises.count(-1)
        else "A rise of noise robustness is not borne out here."
    )
    return lines


def groups(found: Mapping[str, Results]) -> list[str]:
    rows, all_rows = [], []
    for name in CHECKPOINTS:
        if name not in found:
            continue
        for row_set in found[name].where(metric="worst_group_top1").unique("set"):
            worst = differences(found[name], "worst_group_top1", set=row_set)
            gap = differences(found[name], "group_gap", set=row_set)
            rows.append([f"`{name}`", f"{row_set}: worst group", *(cell(worst.get(r)) for r in RECIPES)])
            rows.append([f"`{name}`", f"{row_set}: best minus worst", *(cell(gap.get(r)) for r in RECIPES)])
            all_rows += [worst[r] for r in RECIPES if r in worst]
    lines = ["Are worst groups hurt?", ""]
    lines += table(["checkpoint", "", *(f"`{r}`" for r in RECIPES)], rows)
    lines.append(f"Worst groups: {counted(all_rows)}." if all_rows else "No set with groups was measured.")
    return lines


def spectra(found: Mapping[str, Results]) -> list[str]:
    lines = ["Is high-rank energy of the weights damped in *shape*, beyond the controls?", ""]
    for name in CHECKPOINTS:
        if name in found:
            lines += [f"- `{name}`: {sentence}" for sentence in verdict(found[name].rows)]
    return lines


def saturation(found: Mapping[str, Results]) -> list[str]:
    lines = [
        "What does the 16-bit saturation of AVX2 kernels (oneDNN's, where there is no VNNI) do? The same INT8 codes,",
        "summed exactly and with pairs that saturate, emulated exactly (`benchmarks/saturation.py`):",
        "",
    ]
    if "saturation" not in found:
        return [*lines, "Not measured."]
    results = found["saturation"]
    rows = []
    names = [("top1", {}), ("ece", {}), ("nll", {})]
    names += [("auroc", {"set": s, "score": "mcm"}) for s in _sets(results, "ood", "ood-near", "ood-far")]
    (set_,) = _sets(results, "id")[:1]
    told = []
    for name, where in names:
        each = differences(
            results, name, **({"set": set_, "role": "id", "axis": "", "subset": "all"} if not where else where)
        )
        label = f"{printed(name).name}{', ' + where['set'] if where else ''}"
        rows.append([label, cell(each.get("exact sums")), cell(each.get("16-bit sums"))])
        told += [each[m] for m in ("16-bit sums",) if m in each]
    cosine = differences(results, "cosine_mean", set=set_)
    lines += table(["difference to float", "exact sums", "16-bit sums"], rows)
    for model in ("exact sums", "16-bit sums"):
        if model in cosine:
            lines.append(f"Mean cosine to float with {model}: {cosine[model]['value']:.5f}.")
    lines.append(f"With saturation: {counted(told)}.")
    return lines


def sets(found: Mapping[str, Results]) -> list[str]:
    rows = []
    for name, results in found.items():
        for row in results.where(reference="float", axis="", metric=("top1", "auroc", "cosine_mean")):
            if row["n"] is not None and not row["corruption"]:
                rows.append([f"`{name}`", row["set"], row["role"], f"{row['n']:,}"])
    lines = [
        "Images on which each was measured; corruptions are of 1,000 of the first set's, means over severities.",
        "",
    ]
    return lines + table(["results", "set", "role", "images"], list(map(list, dict.fromkeys(map(tuple, rows)))))


SECTIONS: list[tuple[str, Callable[[Mapping[str, Results]], list[str]]]] = [
    ("Calibration", calibration),
    ("OOD detection", detection),
    ("Noise, corruption and shift", robustness),
    ("Worst groups", groups),
    ("Spectra of the weights", spectra),
    ("Saturating sums", saturation),
    ("Sets", sets),
]
