"""A result as a table for the terminal: times, how many times faster ours is, cosine of the outputs to float32."""

from __future__ import annotations

from typing import Any

TITLE = "{model}, {tower} tower, batch {batch}, {threads} threads, {cpu}, {tier}"
COLUMNS = ["who", "setting", "ms/{unit}", "ours faster", "cosine", "turns", ""]

OTHER = "not held alike"


def table(found: dict[str, Any]) -> tuple[str, list[str], list[list[Any]]]:
    """Title, columns and rows: ours, then each peer with the setting that speaks for it and, below, its others."""
    own = found["ours"]
    rows = [_row(f"qclip {found['recipe']}", own, "", "")]
    for name, best in found["peers"].items():
        others = [each for each in best["settings"] if each["setting"] != best["setting"]]
        for label, each in [(name, best), *(("", each) for each in others)]:
            row = _row(label, each, each["setting"], f"{each['seconds'] / own['seconds']:.2f}x")
            rows.append([*row[:-1], row[-1] or OTHER * (name in found["unequal"])])
    for what in ("absent", "failed"):
        rows += [[name, what, "", "", "", "", ""] for name in found[what] if name not in found["peers"]]
    return TITLE.format(**found), [each.format(**found) for each in COLUMNS], rows


def _row(who: str, each: dict[str, Any], setting: str, ratio: str) -> list[Any]:
    cosine = "no number" if each["cosine"] is None else f"{each['cosine']:.5f}"
    cells = [f"{each['ms_per_item']:.3f}", ratio, cosine, str(each["turns"])]
    return [who, setting, *cells, each["remark"]]


def remarks(found: dict[str, Any]) -> list[str]:
    """Lines below the table: the share of the peak, warnings, who is absent, notes."""
    lines = []
    if found.get("percent_of_peak") is not None:
        share, peak = found["percent_of_peak"], found["peak_gops"]
        lines.append(f"{share:.1f} % of the INT8 peak of {peak:.0f} GOPS, measured in the same run")
    if found["held"]:
        lines.append("held: " + " ".join(f"{name}={value}" for name, value in found["held"].items()))
    lines += [f"warning: {each}" for each in found["warnings"]]
    lines += [f"absent: {name} {why}; --seconds gives more time" for name, why in found["absent"].items()]
    lines += [f"failed: {name}: {each['why']}" for name, each in found["failed"].items()]
    return lines + [f"note: {each}" for each in found["notes"]]
