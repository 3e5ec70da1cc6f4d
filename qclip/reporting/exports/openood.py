"""OpenOOD (Jingkang50/OpenOOD v1.5): a CSV per model and score with its columns, in percent with two decimals.

Its FPR@95 counts ID images rejected where 95 % of OOD images are caught (OOD is its positive class), its AUPR is the
area under trapezoids. Rows `nearood` and `farood` are means over sets.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from qclip.results import Results

from . import apart, part_of_name

COLUMNS = {
    "FPR@95": "fpr95_ood_positive",
    "AUROC": "auroc",
    "AUPR_IN": "aupr_in_trapezoid",
    "AUPR_OUT": "aupr_out_trapezoid",
}


class OpenOod:
    name, label = "openood", "OpenOOD"

    def __call__(self, results: Results) -> dict[str, str]:
        out = []
        rows = results.where(role=("ood", "ood-near", "ood-far"), reference="", metric=tuple(COLUMNS.values()))
        for model in rows.unique("model"):
            accuracy = next(iter(results.where(model=model, metric="top1", role="id", reference="", axis="")), None)
            for score in rows.unique("score"):
                found = rows.where(model=model, score=score)
                if found.rows:
                    text = _csv(found, None if accuracy is None else accuracy["value"])
                    out.append((f"{part_of_name(model)}_{part_of_name(score)}.csv", text))
        return dict(zip(apart(name for name, _ in out), (text for _, text in out), strict=True))


def _csv(rows: Results, accuracy: float | None) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", *COLUMNS, "ACC"])
    for kind, mean in (("ood-near", "nearood"), ("ood-far", "farood"), ("ood", "")):
        sets = rows.where(role=kind).unique("set")
        lines = [
            [rows.value(set=set_, metric=metric, **_any(rows, set_)) for metric in COLUMNS.values()] for set_ in sets
        ]
        for set_, values in zip(sets, lines, strict=True):
            writer.writerow([set_, *map(_percent, values), _percent(accuracy)])
        if lines and mean:
            columns = list(zip(*lines, strict=True))
            means = [None if None in column else sum(column) / len(column) for column in columns]  # type: ignore[arg-type]
            writer.writerow([mean, *map(_percent, means), _percent(accuracy)])
    return out.getvalue()


def _any(rows: Results, set_: str) -> dict[str, Any]:
    """Filters that name one model and score: `rows` holds one of each."""
    first = rows.where(set=set_).rows[0]
    return {"model": first["model"], "score": first["score"]}


def _percent(value: float | None) -> str:
    return "nan" if value is None else f"{100 * value:.2f}"
