"""Draws results of `qclip bench --json` as one SVG for the README: processors without VNNI beside those with it.

python -m benchmarks.plot benchmarks/results/*.json --output docs/speed.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qclip.files import write_atomic
from qclip.reporting import svg

WIDTH, LEFT, RIGHT, ROW, HEAD = 760.0, 96.0, 112.0, 20.0, 30.0  # of a column: names left, numbers right of the bars
GAP = 20.0
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .head { font-weight: 600 } .ours { fill: #0969da }
.peer { fill: #afb8c1 } .limit { stroke: #cf222e; stroke-dasharray: 3 3 } .note { fill: #57606a; font-size: 11px }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .ours { fill: #2f81f7 } .peer { fill: #57606a } .note { fill: #8b949e }
}
"""
Found = dict[str, Any]
#: What a mark behind a peer's name means, in the order in which a peer has it.
MARKS = {
    "\N{DAGGER}": "wrong: cosine to float32 below that of 4-bit embeddings",
    "\N{DOUBLE DAGGER}": "can saturate",
    "*": "not held to the same instructions",
}


def group(found: Found, left: float, top: float, width: float) -> tuple[list[Markup], float]:
    """The bars of one run (ms an item, shortest first) in a column from (left, top) on, and where they end."""
    rows = {f"qclip {found['recipe']}": found["ours"], **found["peers"]}
    most = max(row["ms_per_item"] for row in rows.values())
    start, span, y = left + LEFT, width - LEFT - RIGHT, top
    limit = None
    if found["percent_of_peak"]:
        limit = start + span * found["ours"]["ms_per_item"] * found["percent_of_peak"] / 100 / most
    body = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ms_per_item"]):
        long = span * row["ms_per_item"] / most
        ours = name not in found["peers"]
        shown = f"{row['ms_per_item']:.2f} ms" + ("" if ours else f", {found['ratios'][name]:.2f}x")
        body += [
            svg.text(start - 8, y + 13, name + mark(found, name), "", "end"),
            svg.rect(start, y + 3, max(long, 1), ROW - 6, "ours" if ours else "peer"),
            svg.text(start + long + 6, y + 13, shown),
        ]
        y += ROW
    if limit is not None:
        body.append(svg.element("line", x1=limit, x2=limit, y1=top, y2=y, class_="limit"))
    return body, y


def mark(found: Found, name: str) -> str:
    """What is to be known of a peer's bar, as a sign of `MARKS`."""
    remark = found["peers"].get(name, {}).get("remark", "")
    wrong, saturates, unlike = MARKS
    if remark:
        return wrong if remark == "wrong" else saturates
    return unlike if name in found.get("unequal", {}) else ""


def title(found: Found) -> str:
    """Of all columns: model, tower, batch."""
    text = "{model}, {tower} tower, batch {batch}".format(**found)
    if found["tower"] == "text":
        text += ", prompts that fill the context" if found["full"] else ", prompts of a few words"
    return text


def draw(runs: list[Found]) -> str:
    """One column for each tier, the one with least first; runs of the same work stand side by side."""
    tiers = sorted({found["tier"] for found in runs}, key=lambda tier: ("vnni" in tier, tier))
    width = (WIDTH - GAP * (len(tiers) - 1)) / len(tiers)
    lefts = {tier: at * (width + GAP) for at, tier in enumerate(tiers)}
    body: list[Markup] = [svg.element("style", STYLE)]
    for tier in tiers if len(tiers) > 1 else ():
        body.append(svg.text(lefts[tier], 14, f"{tier}: {'with' if 'vnni' in tier else 'without'} VNNI", "head"))
    top = 30.0 if len(tiers) > 1 else 4.0
    for heading in dict.fromkeys(title(found) for found in runs):
        body.append(svg.text(0, top + 14, heading, "head"))
        ends = []
        for tier in tiers:
            end = top + HEAD - 6
            for found in (each for each in runs if (title(each), each["tier"]) == (heading, tier)):
                marks, end = group(found, lefts[tier], end, width)
                body += marks
                end += 6
            ends.append(end)
        top = max(ends) + 6
    for note in notes(runs):
        body.append(svg.text(0, top + 8, note, "note"))
        top += 15
    return svg.element(
        "svg",
        Markup("").join(body),
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=top + 4,
        viewBox=f"0 0 {WIDTH} {top + 4}",
        role="img",
    )


def notes(runs: list[Found]) -> list[str]:
    """On what the bars are, and what the marks mean that are there."""
    where = ", ".join(dict.fromkeys("{cpu} ({threads} threads)".format(**found) for found in runs))
    lines = [f"Milliseconds an image or prompt, {where}; dashed: the limit of the INT8 instructions"]
    there = {mark(found, name) for found in runs for name in found["peers"]}
    if meanings := [f"{sign} {meaning}" for sign, meaning in MARKS.items() if sign in there]:
        lines.append("; ".join(meanings))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    drawn = draw([json.loads(path.read_text()) for path in args.results])
    write_atomic(args.output, f"{drawn}\n".encode())


if __name__ == "__main__":
    main()
