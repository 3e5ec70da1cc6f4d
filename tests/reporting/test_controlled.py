"""Verdicts beside controls: what a gain is due to is read off the differences to float and to each control."""

from __future__ import annotations

from qclip.reporting import html
from qclip.reporting.controlled import findings
from qclip.results import Results

CLEAR, OPEN = (0.02, 0.01, 0.03), (0.002, -0.01, 0.014)


def flipped(ends: tuple[float, float, float]) -> tuple[float, float, float]:
    value, low, high = ends
    return -value, -high, -low


def controlled(differences: dict[tuple[str, str, str], tuple[float, float, float]]) -> Results:
    """(metric, arm, reference) -> difference with its ends."""
    results = Results()
    for (name, arm, against), (value, low, high) in differences.items():
        fields = {"model": arm, "set": "pets", "role": "id", "reference": against, "n": 500}
        results.add(metric=name, value=value, low=low, high=high, **fields)
        for p in ("difference_p", "difference_holm_p"):
            results.add(metric=p, value=0.0004, axis="metric", at=name, **fields)
    return results


def said(differences: dict, about: str) -> str:
    lines = [line for line in findings(controlled(differences)) if line.startswith(f"- {about}")]
    assert len(lines) == 1
    return lines[0]


def test_a_gain_that_no_control_has() -> None:
    text = said(
        {("top1", "r", "float"): CLEAR, ("top1", "r", "noise"): CLEAR, ("top1", "noise", "float"): OPEN},
        "Top-1 accuracy on pets",
    )
    assert "better, +2.00 points [+1.00, +3.00], Holm p < 0.001; more than any control" in text.replace("  ", " ")


def test_a_gain_that_a_control_has_too() -> None:
    same = {("top1", "r", "float"): CLEAR, ("top1", "r", "float-continued"): OPEN}
    text = said(same | {("top1", "float-continued", "float"): CLEAR}, "Top-1")
    assert "float continuation does the same (+0.20 points" in text and "any control" not in text
    text = said(same | {("top1", "float-continued", "float"): OPEN}, "Top-1")
    assert "it cannot be told from float continuation" in text
    worse = same | {("top1", "noise", "float"): CLEAR, ("top1", "r", "noise"): flipped(CLEAR)}
    text = said(worse | {("top1", "float-continued", "float"): CLEAR}, "Top-1")
    assert "the noise arm does better" in text


def test_a_gain_in_calibration_that_is_a_temperature() -> None:
    raw = {("ece", "r", "float"): flipped(CLEAR)}
    text = said(raw | {("ece_ts", "r", "float"): OPEN}, "ECE on pets")
    assert "explained by a temperature: with it refitted for both, cannot be told" in text
    text = said(raw | {("ece_ts", "r", "float"): flipped(CLEAR)}, "ECE on pets")
    assert "temperature" not in text


def test_no_gain_is_not_explained() -> None:
    for ends, word in ((OPEN, "cannot be told"), (flipped(CLEAR), "worse"), ((0.0, 0.0, 0.0), "equal")):
        text = said(
            {("top1", "r", "float"): ends, ("top1", "r", "noise"): OPEN, ("top1", "noise", "float"): CLEAR}, "T"
        )
        assert f": {word}, " in text and ";" not in text


def test_a_page_without_a_study_says_so() -> None:
    results = Results()
    results.add(metric="top1", model="m", set="pets", value=0.5)
    assert findings(results) == [] and "No recipe was trained beside controls." in html(results)
    same = {("top1", "r", "noise"): OPEN, ("top1", "noise", "float"): CLEAR}
    text = html(controlled({("top1", "r", "float"): CLEAR, **same}))
    assert "differences to float and to each control" in text and "the noise arm does the same" in text
