"""Tables of a study as text: Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from qclip.reporting import units

from .found import ALL, Asked, Found
from .rows import TIMED
from .tables import Printed

COLUMNS = ("model", "evaluation", "variant", "recipe", "method", "bits", "calibration", "seed", "set", "corruption")
COLUMNS += ("severity", "score", "metric", "value", "low", "high", "difference", "difference_low", "difference_high")
COLUMNS += ("n", "reason")
WHERE = ("host", "threads", "seconds")


def markdown(tables: Sequence[Printed], notes: Sequence[str] = ()) -> str:
    out = []
    for each in tables:
        out += [f"### {each.title}", ""]
        cells = [[_plain(cell) for cell in row] for row in (each.columns, *each.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(each.columns))]
        lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        out += [*lines, ""]
        out += [f"- {note}" for note in each.notes] + ([""] if each.notes else [])
    return "\n".join([*out, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", units.MINUS: "$-$", units.ABSENT: "--"}


def latex(tables: Sequence[Printed], notes: Sequence[str] = ()) -> str:
    """`tabular`s, for a table environment of the reader's own."""
    out = []
    for each in tables:
        out += [f"% {each.title}", rf"\begin{{tabular}}{{{'l' * len(each.columns)}}}", r"\hline"]
        for at, row in enumerate((each.columns, *each.rows)):
            out.append(" & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in row) + r" \\")
            out += [r"\hline"] if at == 0 else []
        out += [r"\hline", r"\end{tabular}", *(f"% {note}" for note in each.notes), ""]
    return "\n".join([*out, *(f"% {note}" for note in notes)]).rstrip() + "\n"


def comma_separated(found: Found, asked: Asked = ALL) -> str:
    """A line per value, in full precision, in the order of the plan: two runs of it are equal text."""
    out = io.StringIO()
    columns = [*COLUMNS, *(WHERE if asked.where else ())]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in found.lines:
        if line["metric"] not in TIMED or asked.where:
            writer.writerow({name: _exact(line[name]) for name in columns})
    return out.getvalue()


def _exact(value: Any) -> Any:
    return "" if value is None else repr(value) if isinstance(value, float) else value
