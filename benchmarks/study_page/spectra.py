"""What a study says of spectra: findings beyond their controls, and correlations with what changed in reliability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qclip.spectral.verdicts import Judgement, judgements
from qclip.study.correlations import MEASURES, over
from qclip.study.found import SCORE
from qclip.study.rows import results_row

from ..findings_page import table
from .claims import AGREES, ALPHA, OPEN, Claim, Section, Study, lead

FOUND = {
    "damped": "high-rank damping beyond every control",
    "raised": "high-rank amplification beyond every control",
    "shrunk": "a shrink",
    "grown": "a growth",
    "open": "nothing beyond the controls",
}


def spectra(study: Study) -> Section:
    found: list[tuple[str, Judgement]] = []
    for model in study.models:
        mine = [results_row(dict(row) | {"host": "", "seconds": None}) for row in study.towers if row["model"] == model]
        found += [(model, each) for each in judgements(mine)]
    counts = {name: sum(each.finding == name for _, each in found) for name in FOUND}
    told = ", ".join(f"{FOUND[name]} in {count}" for name, count in counts.items() if count)
    others = len(found) - counts["damped"] - counts["open"]
    verdict = lead(counts["damped"], others, len(found))
    because = f"of {len(found)} towers of variants {told}" if found else "no spectra were measured"
    claims = [Claim("Quantization damps the high ranks of the weights", verdict, because)]
    correlated = over([line for line in study.lines if line["score"] in ("", SCORE)], ("top1", "ece", "auroc"))
    strong = [each for each in correlated if each.holm_p <= ALPHA]
    weak = [each for each in correlated if each.p <= ALPHA]
    tested = sum(not math.isnan(each.p) for each in correlated)
    because = (
        f"of {tested} rank correlations of a tower's {' or '.join(MEASURES)} with a difference to float "
        f"{len(weak)} have p <= {ALPHA:g}, {len(strong)} after Holm"
    )
    shapes = [each for each in strong if each.measure == "shape"]
    claims.append(Claim("Reliability changes with the shape of the spectra", AGREES if shapes else OPEN, because))
    lines = [
        "*Shape*: whether the last ranks lose more than the first (negative: high-rank damping). *Level*: the gain",
        "common to all ranks. A finding must lie beyond all controls that could explain it (docs/methods.md, Spectra).",
        "",
    ]
    head = ["model", "variant", "tower", "level", "shape", "found"]
    body = [[f"`{model}`", f"`{j.model}`", j.tower, _ends(j.level), _ends(j.shape), _found(j)] for model, j in found]
    lines += table(head, body)
    lines += [
        f"Rank correlations (Spearman) over the variants of a model that have p <= {ALPHA:g} by permutation; Holm's",
        "family is all that were tested:",
        "",
    ]
    kept = []
    for c in weak:
        about = [f"`{c.model}`", f"{c.measure} ({c.tower})", f"{c.metric} on {c.set}", str(c.n)]
        kept.append([*about, f"{c.rho:+.2f}", f"{c.p:.4f}", f"{c.holm_p:.3f}"])
    head = ["model", "spectrum", "change of", "variants", "rho", "p", "Holm p"]
    lines += table(head, kept) if kept else ["None.", ""]
    return Section("Spectra of the weights", claims, lines)


def _found(each: Judgement) -> str:
    if each.finding in ("shrunk", "grown"):
        word = "shrink" if each.finding == "shrunk" else "growth"
        size = f"{abs(100 * (1 - each.level['value'])):.2f} %"
        return f"a {'uniform ' if each.alike else ''}{word} by {size}" + (
            "" if each.alike else ", not shown to be a filter"
        )
    return FOUND[each.finding]


def _ends(row: Mapping[str, Any]) -> str:
    value, low, high = (f"{row[name]:.4f}".replace("-0.0000", "0.0000") for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
