"""The page's content for a terminal: verdicts with differences and intervals, then what explains them."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed
from rich.text import Text

from qclip.errors import printable
from qclip.results import Results

from . import labelled, units, verdicts
from .chance import at_chance
from .index import Cohort, Index
from .parts import Table
from .sections import about, compare
from .sections.coverage import STATES
from .sections.ood import detection
from .sections.spectra import SpectraSection, ranks
from .verdicts import Answers, Comparison, Verdict

WIDTH = 100
COLUMNS = 4  # variants side by side: more do not fit with their intervals
STYLES = {Verdict.BETTER: "bold blue", Verdict.WORSE: "bold dark_orange3", Verdict.UP: "bold", Verdict.DOWN: "bold"}
PLAIN = str.maketrans(
    {
        "\N{CHECK MARK}": "+",
        "\N{BALLOT X}": "x",
        "\N{WHITE CIRCLE}": "o",
        "\N{UPWARDS ARROW}": "^",
        "\N{DOWNWARDS ARROW}": "v",
        "\N{PLUS-MINUS SIGN}": "+-",
        "\N{NOT EQUAL TO}": "!=",
        "\N{ALMOST EQUAL TO}": "~",
        "\N{MIDDLE DOT}": "-",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{INFINITY}": "inf",
        "\N{BULLET}": "*",
        "\N{BOX DRAWINGS LIGHT HORIZONTAL}": "-",
        units.MINUS: "-",
        units.ABSENT: "-",
    }
)


def table(results: Results) -> str:
    """The results as text of at most 100 columns; in colour where stdout is a terminal (and `NO_COLOR` is not set)."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    out = io.StringIO()
    console = Console(
        file=out,
        width=WIDTH,
        force_terminal=colour,
        color_system="256" if colour else None,
        highlight=False,
        legacy_windows=False,
    )
    _print(console, Index(_printable(results)))
    lines = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
    return _encodable(lines)


def _printable(results: Results) -> Results:
    """With a visible sign for each control character of a name: a results file commands no terminal."""

    def signs(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: printable(value) if isinstance(value, str) else value for name, value in fields.items()}

    rows, curves = ([signs(fields) for fields in found] for found in (results.rows, results.curves))
    return Results(rows, [printable(note) for note in results.notes], results.meta, curves)


def _encodable(text: str) -> str:
    """With plain signs where stdout cannot print ours."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
        return text
    except (UnicodeEncodeError, LookupError):
        return text.translate(PLAIN).encode(encoding, "replace").decode(encoding)


def _print(console: Console, index: Index) -> None:
    if not index.results.rows:
        console.print("no results: the table is empty")
    answers = []
    for cohort in index.cohorts:
        found = compare(index, cohort) if cohort.reference else {}
        answers.append(found)
        for part in cohort.chunks(COLUMNS) if found else []:
            _verdicts(console, index, part, found)
        if found:
            _sentences(console, index, cohort, found)
    if said := verdicts.multiplicity(answers):
        symbols = ", ".join(f"{v.symbol} {v.word}" for v in (Verdict.BETTER, Verdict.WORSE, Verdict.OPEN))
        console.print(f"\n{symbols}. Shares in percentage points. {said}", markup=False)
    alone = [model for cohort in index.cohorts if not cohort.reference for model in cohort.models]
    if alone:
        _absolute(console, index, alone)
    for sentence in SpectraSection().sentences(index):
        console.print(f"\N{BULLET} {sentence}", markup=False)
    _shares(console, index)
    for note in [*verdicts.few_images(index), *index.results.notes]:
        console.print(f"note: {note}", markup=False)


def _new_table(title: str) -> Printed:
    return Printed(
        title=escape(title),
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
    )


def _verdicts(console: Console, index: Index, part: Cohort, answers: Answers) -> None:
    grid = _new_table(f"\nAgainst {part.reference}")
    grid.add_column("measure", max_width=30, overflow="fold")
    grid.add_column(escape(part.short(part.reference)), justify="right", overflow="fold")
    for model in part.variants:
        grid.add_column(escape(part.short(model)), max_width=16, overflow="fold")
    last = ""
    for question, by_model in answers.items():
        if question.axis != last:
            if last:
                grid.add_section()
            grid.add_row(Text(question.axis, "bold"))
        last = question.axis
        base = question.measure.value(verdicts.absolute(index, part.reference, question))
        name = Text(question.name + "\n")
        name.append(question.where, "dim")
        grid.add_row(name, base, *(_cell(by_model[model]) for model in part.variants))
    console.print(grid)


def _cell(answer: Comparison) -> Text:
    out = Text(f"{answer.verdict.symbol} {answer.difference}\n", STYLES.get(answer.verdict, ""))
    out.append(answer.interval, "dim")
    return out


def _sentences(console: Console, index: Index, cohort: Cohort, answers: Answers) -> None:
    console.print()
    for warning in at_chance(index, cohort):
        console.print(f"\N{BULLET} {warning}", markup=False)
    for model in cohort.variants:
        line = Text("\N{BULLET} ")
        line.append(model, "bold")
        line.append(": " + " ".join(about(index, cohort, model, answers)))
        console.print(line)


def _absolute(console: Console, index: Index, models: list[str]) -> None:
    """Models that were compared with nothing."""
    sets = list(dict.fromkeys([*index.id_sets, *index.shift_sets, *index.spurious_sets]))
    for table in (*labelled.tables(index, sets), *detection(index), *ranks(index)):
        kept = [row for row in table.rows if row[0].text in models]
        if kept:
            _plain(console, Table(table.title, table.head, kept, table.note))


def _plain(console: Console, table: Table) -> None:
    shown = _new_table(f"\n{table.title}" + (f" ({table.note})" if table.note else ""))
    for column, cell in enumerate(table.head[:8]):
        shown.add_column(escape(cell.text), justify="left" if column == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text("\n".join(part for part in (cell.text, cell.small) if part)) for cell in row[:8]))
    console.print(shown)


def _shares(console: Console, index: Index) -> None:
    """Coverage, size and time, a row for each model."""
    times = list(dict.fromkeys(row["set"] for row in index.rows("ms_per_image")))[:1]
    grid = _new_table("\nCoverage, size and speed")
    grid.add_column("model", max_width=34, overflow="fold")
    for name in ("MACs real / simulated / float", "in memory", "ms an image"):
        grid.add_column(name, justify="right")
    rows = 0
    for model in index.models:
        shares = [index.value(model, "coverage_macs", axis="state", at=state) for state in STATES]
        size = index.value(model, "model_bytes")
        time = next((v for s in times if (v := index.value(model, "ms_per_image", set=s)) is not None), None)
        if any(v is not None for v in (*shares, size, time)):
            known = any(v is not None for v in shares)
            covered = " / ".join(units.percent(v or 0.0, 0) for v in shares) if known else units.ABSENT
            told = "simulated" if time is not None and index.simulated(model) else units.milliseconds(time)
            grid.add_row(escape(model), covered, units.size(size), told)
            rows += 1
    if rows:
        console.print(grid)
