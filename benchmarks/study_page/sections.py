"""What a study says of each claim of the paper but that on spectra, with a table of counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qclip.data.corruptions import members
from qclip.metrics.paired import holm
from qclip.reporting import units
from qclip.study.found import SCORE

from ..findings_page import table
from .claims import (
    AGREES,
    ALPHA,
    DENIES,
    OOD,
    OPEN,
    Claim,
    Line,
    Section,
    Study,
    claim,
    clear,
    counted,
    direction,
    lead,
    place,
)

SIDES = (1, -1, 0)


def joint_wins(study: Study) -> Section:
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in study.wins:
        found.setdefault((row["model"], row["score"]), {})[row["metric"]] = row
    corrected = [float(p) for p in holm([_p(each) for each in found.values()])]
    body = []
    for ((model, score), each), p in zip(found.items(), corrected, strict=True):
        chance = each["wins_expected"]
        count = [str(each["wins"]["n"]), f"{each['wins']['value']:.0f}"]
        given = [_known(chance["value"], ".2f"), f"{_known(chance['low'], '.0f')} to {_known(chance['high'], '.0f')}"]
        ps = [_known(_p(each), ".3f"), _known(p, ".3f")]
        body.append([f"`{model}`", score, *count, *given, *ps, str(_all_clear(study, model, score))])
    by_mcm = [each for (_, score), each in found.items() if score == SCORE]
    wins, n = (sum(int(each["wins"][key]) for each in by_mcm) for key in ("value", "n"))
    chance_wins = sum(each["wins_expected"]["value"] or 0.0 for each in by_mcm)
    more = sum(p <= ALPHA for p in corrected)
    fewer = sum(each["wins"]["value"] < (each["wins_expected"]["low"] or 0) for each in found.values())
    because = (
        f"{wins} of {n} variants are better in all three by MCM, where chance gives {chance_wins:.1f}; {more} of "
        f"{len(found)} counts (by model and score) exceed chance at p <= {ALPHA:g} after Holm"
    )
    verdict = AGREES if more else DENIES if fewer == len(found) > 0 else OPEN
    lines = [
        "Better than float in top-1, ECE and AUROC (mean over OOD sets) at once, whether or not an interval tells.",
        "Chance is that of paired resamples in which nothing differs and all correlations stay; Holm's family is this",
        "table. *Told*: all three intervals exclude 0.",
        "",
    ]
    head = ["model", "score", "variants", "win-win-win", "by chance", "95 % of chance", "p", "Holm p", "told"]
    said = "Accuracy, calibration and OOD detection rise together"
    return Section("Joint wins", [Claim(said, verdict, because)], lines + table(head, body))


def _p(each: Mapping[str, Mapping[str, Any]]) -> float:
    value = each["wins_p"]["value"]
    return math.nan if value is None else value


def _known(number: float | None, form: str) -> str:
    return units.ABSENT if number is None or math.isnan(number) else f"{number:{form}}"


def _all_clear(study: Study, model: str, score: str) -> int:
    """Variants of which all three intervals tell an improvement."""
    better: dict[str, list[int]] = {}
    for name, roles in (("top1", ("id",)), ("ece", ("id",)), ("auroc", _mean_role(study, model))):
        for line in study.differences(name, roles, model, score):
            better.setdefault(line["variant"], []).append(direction(line))
    return sum(found == [1, 1, 1] for found in better.values())


def _mean_role(study: Study, model: str) -> tuple[str, ...]:
    mean = any(line["role"] == "ood-mean" for line in study.lines if line["model"] == model)
    return ("ood-mean",) if mean else OOD


def calibration(study: Study) -> Section:
    claims, body = [], []
    for model in study.models:
        gap = study.of_float(model, "signed_gap")
        eces, gaps = (study.differences(name, ("id",), model) for name in ("ece", "signed_gap"))
        if gap is None or not eces:
            continue
        kind = "overconfident" if _above(gap) else "underconfident" if _below(gap) else "neither"
        found = [direction(line) for line in eces]
        moved = [clear(line) for line in gaps]
        of = units.metric("signed_gap")
        body.append(
            [f"`{model}`", f"{of.value(gap['value'])} {of.interval(gap['low'], gap['high'])}", kind]
            + [str(found.count(side)) for side in SIDES]
            + [str(moved.count(side)) for side in SIDES]
        )
        if kind == "neither":
            because = f"its confidence minus accuracy, {of.value(gap['value'])} points, is not told from 0"
            claims.append(Claim(f"`{model}` changes as over- or underconfident models do", OPEN, because))
        else:
            word, side = ("worsens", -1) if kind == "overconfident" else ("improves", 1)
            claims.append(claim(f"Calibration of {kind} `{model}` {word}", eces, side))
    lines = [
        "Does calibration improve where the float model is underconfident, and worsen where overconfident?",
        "",
    ]
    head = ["model", "confidence minus accuracy, points", "so it is", "ECE better", "worse", "not told"]
    return Section("Calibration", claims, lines + table([*head, "more confident", "less", "not told"], body))


def _above(line: Line) -> bool:
    return line["low"] is not None and line["low"] > 0


def _below(line: Line) -> bool:
    return line["high"] is not None and line["high"] < 0


def detection(study: Study) -> Section:
    eces = {(e["model"], e["variant"]): direction(e) for e in study.differences("ece", ("id",))}
    body: list[list[str]] = []
    both: list[str] = []
    against = cases = 0
    for score in _scores(study):
        aurocs = study.differences("auroc", OOD, score=score)
        for model in study.models:
            mine = [line for line in aurocs if line["model"] == model]
            for of in dict.fromkeys(line["set"] for line in mine):
                found = [direction(line) for line in mine if line["set"] == of]
                body.append([f"`{model}`", of, score, *(str(found.count(side)) for side in SIDES)])
        for line in aurocs:
            if eces.get((line["model"], line["variant"])) == -1:
                if direction(line) == 1:
                    both.append(f"`{line['variant']}` of `{line['model']}` on {line['set']} by {score}")
                against += direction(line) == -1
                cases += 1
    worse = sum(each == -1 for each in eces.values())
    shown = "; ".join(both[:6]) + (f"; and {len(both) - 6} more" if len(both) > 6 else "")
    because = (
        f"ECE is told worse in {worse} of {len(eces)} variants; of {cases} differences in AUROC beside it {len(both)} "
        f"are told better and {against} worse"
    ) + (f" ({shown})" if shown else "")
    said = "OOD detection improves while calibration gets worse"
    claims = [Claim(said, lead(len(both), against, cases), because)]
    lines = ["How often AUROC is told better or worse than float's:", ""]
    head = ["model", "OOD set", "score", "better", "worse", "not told"]
    return Section("OOD detection", claims, lines + table(head, body))


def _scores(study: Study) -> list[str]:
    return list(dict.fromkeys(line["score"] for line in study.lines if line["metric"] == "auroc"))


def robustness(study: Study) -> Section:
    noises = set(members("noise")) | {"noise"}
    means = study.differences("mean_top1", ("corrupted",))
    noise = [line for line in means if line["corruption"] in noises]
    grouped = {line["set"] for line in study.lines if line["metric"] == "worst_group_top1"}
    shifts = [line for line in study.differences("top1", ("shift",)) if line["set"] not in grouped]
    worst = study.differences("worst_group_top1", ("id", "shift"))
    claims = [
        claim("Robustness to noise rises", noise, 1),
        claim("Accuracy under covariate shift does not rise but falls", shifts, -1),
        claim("Spurious correlation hurts more: the worst group loses", worst, -1),
    ]
    body = []
    for kind, lines in (("top-1 under", means), ("top-1 on", shifts), ("worst group of", worst)):
        for model in study.models:
            mine = [line for line in lines if line["model"] == model]
            for where in dict.fromkeys(line["corruption"] or line["set"] for line in mine):
                found = [direction(line) for line in mine if (line["corruption"] or line["set"]) == where]
                body.append([f"`{model}`", f"{kind} {place(where)}", *(str(found.count(side)) for side in SIDES)])
    others = [line for line in means if line["corruption"] not in noises]
    lines = [
        f"Noise: {counted(noise)}. Other corruptions: {counted(others)}.",
        f"Covariate shift: {counted(shifts)}. Worst groups: {counted(worst)}.",
        "",
    ]
    return Section("Noise, shift and groups", claims, lines + table(["model", "", "better", "worse", "not told"], body))
