"""Results of version 1 (qclip 0.1 before its first release) as rows and curves of today.

There `subset` held places on an axis ("bin 07", "rank 012", "fpr 0.050", a group, a state) and the kind of an OOD set,
`score` of a site its backend, and what a set was for had to be guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]

# old metric -> (curve, column of the value, word before the place in `subset`, column of the place)
_CURVES = {
    "bin_accuracy": ("reliability", "accuracy", "bin", "bin"),
    "bin_confidence": ("reliability", "confidence", "bin", "bin"),
    "bin_count": ("reliability", "count", "bin", "bin"),
    "roc_tpr": ("roc", "tpr", "fpr", "fpr"),
    "singular_value": ("singular_values", "value", "rank", "rank"),
}
_BANDED = ("band_energy", "gain", "gain_white", "sqnr", "sqnr_white")
_DETECTION = ("auroc", "fpr95", "fpr95_ood_positive")


def upgraded(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Row], list[Row]]:
    """Rows and curves of version 2."""
    old = [dict(row) for row in rows]
    roles = _roles(old)
    grouped = {row.get("set") for row in old if row.get("metric") in ("worst_group_top1", "group_gap")}
    out: list[Row] = []
    curves: dict[tuple[Any, ...], Row] = {}
    for row in old:
        metric, subset = row.get("metric"), row.get("subset") or ""
        if metric in _CURVES:
            _onto_curve(curves, row, roles)
            continue
        name = row.get("set") or ""
        role = "corrupted" if row.get("corruption") else roles.get(name, "")
        if metric in _DETECTION:
            row["subset"] = ""
        elif metric in ("coverage_macs", "coverage_params"):
            row |= {"subset": "", "axis": "state", "at": subset}
            role = "model"
        elif metric == "site_macs":
            row |= {"subset": "", "axis": "state", "at": subset, "backend": row.get("score"), "score": ""}
            role = "site"
        elif metric in _BANDED:
            row |= {"axis": "band", "at": _number(subset.removeprefix("ranks ").split("-")[0])}
            role = _weights(name)
        elif metric in ("effective_rank", "stable_rank"):
            role = _weights(name)
        elif metric in ("model_bytes", "artifact_bytes"):
            role = "model"
        elif name in grouped and subset not in ("", "all"):
            row |= {"subset": "", "axis": "group", "at": subset}
        out.append(row | {"role": role})
    return out, list(curves.values())


def _roles(rows: list[Row]) -> dict[str, str]:
    """ID sets were corrupted or timed, OOD sets detected, and a set that was only labelled was a shift."""
    detected = {row.get("set"): row for row in rows if row.get("metric") == "auroc"}
    marked = {row.get("set") for row in rows if row.get("corruption") or row.get("metric") == "ms_per_image"}
    roles = {}
    for row in rows:
        name = row.get("set") or ""
        if row.get("metric") == "top1" and name not in roles:
            roles[name] = "id" if name in marked else "shift"
    for name, row in detected.items():
        kind = row.get("subset") or ""
        mean = str(name).startswith("mean of ") and str(name).endswith(" OOD sets")
        roles[name] = "ood-mean" if mean else f"ood-{kind}" if kind in ("near", "far") else "ood"
    if "id" not in roles.values():
        roles |= {name: "id" for name in [name for name, role in roles.items() if role == "shift"][:1]}
    return roles


def _onto_curve(curves: dict[tuple[Any, ...], Row], row: Row, roles: Mapping[str, str]) -> None:
    curve, column, word, place = _CURVES[row["metric"]]
    at = _number((row.get("subset") or "").removeprefix(word).strip())
    if at is None:
        return
    name = row.get("set") or ""
    key = (curve, row.get("model"), name, row.get("score"))
    described = {k: v for k, v in row.items() if k not in ("subset", "value", "low", "high", "seconds", "host", "n")}
    role = _weights(name) if curve == "singular_values" else roles.get(name, "")
    known = curves.setdefault(key, described | {"metric": curve, "role": role, "points": {place: []}})
    points = known["points"]
    if at not in points[place]:
        for other in points.values():
            other.append(None)
        points[place][-1] = int(at) if at.is_integer() and place != "fpr" else at
    points.setdefault(column, [None] * len(points[place]))[points[place].index(at)] = row.get("value")


def _weights(name: str) -> str:
    return "site" if "." in name else "tower"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
