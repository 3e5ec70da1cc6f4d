"""One recipe over several models: does it move a metric the same way in all of them?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qclip.metrics import metric
from qclip.metrics.paired import FEWEST_PAIRS, holm, wilcoxon
from qclip.results import Results, Row

TESTED = ("top1", "ece", "nll", "auroc")


def across_models(results: Results) -> None:
    """Append Wilcoxon's signed-rank test over models for every recipe that was measured on two and more of them.

    Rows of `METRIC_wilcoxon_p` and, corrected by Holm over all that this call adds, `METRIC_wilcoxon_holm_p`, with
    axis "recipe" and the number of models in `n`. The differences are those of the table, of whole clean sets; with
    fewer than six models nothing can be significant: the value is undefined and a note says so.
    """
    found: dict[tuple[str, str, str, str, str], list[float]] = {}
    for row in _differences(results.rows):
        key = row["recipe"], row["metric"], row["set"], row["role"], row["score"]
        found.setdefault(key, []).append(row["value"])
    families = {key: values for key, values in found.items() if len(values) > 1}
    if not families:
        return
    p = [wilcoxon(np.array(values)) for values in families.values()]
    for (key, values), plain, corrected in zip(families.items(), p, holm(p), strict=True):
        recipe, name, where, role, score = key
        fields = {"set": where, "role": role, "score": score, "recipe": recipe, "axis": "recipe", "at": recipe}
        results.add(metric=f"{name}_wilcoxon_p", value=plain, n=len(values), **fields)
        results.add(metric=f"{name}_wilcoxon_holm_p", value=float(corrected), n=len(values), **fields)
    tested = int(np.sum(~np.isnan(p)))
    names = ", ".join(dict.fromkeys(metric(key[1]).label for key in families))
    if tested:
        results.note(f"Wilcoxon over models: Holm's family is {tested} tests ({names}; recipes and sets of this table)")
    if tested < len(p):
        results.note(
            f"Wilcoxon over models: {len(p) - tested} tests have fewer than {FEWEST_PAIRS} models, too few to ever "
            "reach .05"
        )


def _differences(rows: Iterable[Row]) -> Iterable[Row]:
    return (
        row
        for row in rows
        if row["metric"] in TESTED
        and row["reference"]
        and row["recipe"]
        and row["value"] is not None
        and row["subset"] == "all"
        and not (row["axis"] or row["corruption"])
    )
