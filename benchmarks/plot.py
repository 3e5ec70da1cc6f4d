"""Draws `qclip bench --json` results as one SVG for the README.

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

WIDTH, LEFT, RIGHT, ROW, HEAD = 760.0, 150.0, 120.0, 20.0, 30.0
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .head { font-weight: 600 } .ours { fill: #0969da }
.peer { fill: #afb8c1 } .limit { stroke: #cf222e; stroke-dasharray: 3 3 } .note { fill: #57606a; font-size: 11px }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .ours { fill: #2f81f7 } .peer { fill: #57606a } .note { fill: #8b949e }
}
"""


def group(found: dict[str, Any], top: float) -> tuple[list[Markup], float]:
    """The bars of one run (ms an item, shortest first) from `top` on, and where they end."""
    rows = {f"qclip {found['recipe']}": found["ours"], **found["peers"]}
    most = max(row["ms_per_item"] for row in rows.values())
    title = "{model}, {tower} tower, batch {batch}".format(**found)
    if found["tower"] == "text":
        title += ", prompts that fill the context" if found["full"] else ", prompts of a few words"
    body = [svg.text(0, top + 14, title, "head")]
    span, y = WIDTH - LEFT - RIGHT, top + HEAD - 6
    limit = None
    if found["percent_of_peak"]:
        limit = LEFT + span * found["ours"]["ms_per_item"] * found["percent_of_peak"] / 100 / most
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ms_per_item"]):
        long = span * row["ms_per_item"] / most
        ours = name not in found["peers"]
        shown = f"{row['ms_per_item']:.2f} ms" + ("" if ours else f", {found['ratios'][name]:.2f}x")
        body += [
            svg.text(LEFT - 8, y + 13, name, "", "end"),
            svg.rect(LEFT, y + 3, max(long, 1), ROW - 6, "ours" if ours else "peer"),
            svg.text(LEFT + long + 6, y + 13, shown),
        ]
        y += ROW
    if limit is not None:
        body.append(svg.element("line", x1=limit, x2=limit, y1=top + HEAD - 6, y2=y, class_="limit"))
    return body, y + 12


def draw(runs: list[dict[str, Any]]) -> str:
    body: list[Markup] = [svg.element("style", STYLE)]
    top = 4.0
    for found in runs:
        marks, top = group(found, top)
        body += marks
    cpu, threads = runs[0]["cpu"], runs[0]["threads"]
    note = f"Milliseconds an image or prompt, {threads} threads, {cpu}; dashed: the limit of the INT8 instructions"
    body.append(svg.text(0, top + 8, note, "note"))
    return svg.element(
        "svg",
        Markup("").join(body),
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=top + 16,
        viewBox=f"0 0 {WIDTH} {top + 16}",
        role="img",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    drawn = draw([json.loads(path.read_text()) for path in args.results])
    write_atomic(args.output, f"{drawn}\n".encode())


if __name__ == "__main__":
    main()
