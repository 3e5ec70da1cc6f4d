"""One self-contained HTML page: what was compared, the verdicts, the figures, every number. No network, no script
needed."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qclip import files
from qclip.results import Results

from . import overview, svg, units, verdicts
from .chance import at_chance
from .index import Cohort, Index
from .overview import Axis
from .parts import Cell, Panel, Table
from .sections import Section, about, all_sections, compare, overview_of
from .sections.coverage import STATES
from .sections.paired import joint_wins
from .verdicts import Comparison, Question, Verdict

FILE = "report.html"
COLUMNS = 6  # variants side by side in one verdict table
MANY = 8  # models from which on a filter helps
MOST_ROWS = 80  # of a section's tables, where they are shown openly and printed
MOST_SENTENCES = 8  # of a section, of which more are folded


def report(results: Results, path: str | os.PathLike[str], force: bool = False) -> Path:
    """Write the page and return where it is.

    path: the file, or a folder, which gets `report.html`. The file appears whole or not at all.
    Raises OutputExistsError where the file exists and `force` is not given, InputError where `path` cannot be written,
    OutputError where writing fails.
    """
    target = check_output(path, force)
    return files.write_atomic(target, html(results).encode("utf-8", "replace"))


def check_output(path: str | os.PathLike[str], force: bool = False) -> Path:
    """Where `report(results, path, force)` will write; raises as it would."""
    target = Path(path)
    if os.path.isdir(target):
        target = target / FILE
    files.check_file(target, force)
    return target


def html(results: Results) -> str:
    """The page as text."""
    return _templates().get_template("page.html.j2").render(_context(Index(results)))


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("qclip.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_unbroken,
    )


def _unbroken(value: Any) -> Any:
    """A number and its percent sign stay on one line."""
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if plain else value


@dataclasses.dataclass(frozen=True)
class Card:
    """A quantized model in a few words."""

    model: str
    facts: list[str]
    sentences: list[str]


@dataclasses.dataclass(frozen=True)
class Shown:
    """A section with what it found in these results. Without panels and tables only `absent` is printed."""

    section: Section
    panels: list[Panel]
    tables: list[Table]
    sentences: list[str]

    @property
    def filled(self) -> bool:
        return bool(self.panels or self.tables)

    @property
    def folded(self) -> str:
        """What the tables are folded behind; "" where they are shown openly."""
        return self.section.tables_title or ("All numbers" if self.long else "")

    @property
    def long(self) -> bool:
        """Whether the tables are too long to be shown openly, and for paper."""
        return sum(len(table.rows) for table in self.tables) > MOST_ROWS

    @property
    def printed(self) -> bool:
        return self.section.tables_printed and not self.long


@dataclasses.dataclass(frozen=True)
class Judged:
    """The verdict tables of one cohort."""

    cohort: Cohort
    axes: list[Axis]
    sentences: list[str]
    cards: list[Card]
    tables: list[VerdictTable]

    @property
    def many(self) -> bool:
        """Too many variants to stand side by side."""
        return len(self.cohort.variants) > COLUMNS

    @property
    def measured(self) -> list[Axis]:
        return [axis for axis in self.axes if axis.measured]


@dataclasses.dataclass(frozen=True)
class Answer:
    comparison: Comparison
    now: str  # the model's own value
    bar: Markup


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a verdict table. `axis` is filled on the first row of each axis only."""

    axis: str
    question: Question
    n: str
    base: str
    answers: list[Answer]


@dataclasses.dataclass(frozen=True)
class VerdictTable:
    cohort: Cohort
    lines: list[Line]


def _context(index: Index) -> dict[str, Any]:
    cohorts = [cohort for cohort in index.cohorts if cohort.reference]
    answers = [compare(index, cohort) for cohort in cohorts]
    judged = [_judged(index, cohort, found) for cohort, found in zip(cohorts, answers, strict=True)]
    return {
        "title": title(index),
        "lead": lead(index),
        "facts": facts(index),
        "short_facts": short_facts(index),
        "models": model_table(index),
        "judged": [part for part in judged if part.tables],
        "multiplicity": verdicts.multiplicity(answers),
        "legend": list(Verdict),
        "many": len(index.models) > MANY,
        "sections": [_shown(section, index) for section in all_sections()],
        "most_sentences": MOST_SENTENCES,
        "notes": notes(index),
        "empty": not index.results.rows,
    }


def _shown(section: Section, index: Index) -> Shown:
    return Shown(section, section.panels(index), section.tables(index), section.sentences(index))


def title(index: Index) -> str:
    """ "Reliability of a and b after quantization"."""
    names = [cohort.label for cohort in index.cohorts if cohort.reference]
    if len(names) == 1 and names[0] == "float":  # the label says nothing about the model; its source does
        source = index.described.get("float", {}).get("source", "")
        names = [source.removeprefix("local-dir:").rstrip("/").rsplit("/", 1)[-1]] if source else []
    quantized = any(index.described[model].get("recipe") for model in index.models)
    tail = " after quantization" if quantized else ""
    if names and len(names) <= 3:
        return f"Reliability of {units.words(names)}{tail}"
    if not index.models:
        return "Reliability report"
    count = len(index.models)
    return f"Reliability of {'one model' if count == 1 else f'{count} models'}{tail}"


def lead(index: Index) -> str:
    """What was done, in one sentence."""
    if not index.results.rows:
        return "This table of results holds no rows, so there is nothing to show."
    cohorts = [cohort for cohort in index.cohorts if cohort.reference]
    if not cohorts:
        return "Nothing was compared: there are no differences between models among the results."
    pairs: dict[str, list[str]] = {}  # the same comparison, made for several models
    for cohort in cohorts:
        pair = f"{units.words([cohort.short(m) for m in cohort.variants])} with {cohort.short(cohort.reference)}"
        pairs.setdefault(pair, []).append(cohort.label)
    told = [
        pair if pair.endswith(f" with {labels[0]}") else f"{pair} of {units.words(labels)}"
        for pair, labels in pairs.items()
    ]
    said = f"Compared {'; '.join(told)}."
    if len(said) > 240:
        said = f"Compared {sum(len(cohort.variants) for cohort in cohorts)} models with their references."
    return said + " Every difference is paired, on the same images, and has a 95 % interval."


def short_facts(index: Index) -> list[str]:
    """What the numbers rest on, for the line below the title."""
    images = sum(index.n(name) or 0 for name in _sets(index))
    out = [f"{units.count(images)} images"] if images else []
    return out + [text for name, text in facts(index) if name in ("Host", "Date", "Page written")]


def _sets(index: Index) -> list[str]:
    return list(dict.fromkeys([*index.labelled_sets, *(name for name, _ in index.ood_sets)]))


def facts(index: Index) -> list[tuple[str, str]]:
    """(name, text) pairs for the head of the page."""
    meta = index.meta
    named = [f"{name} ({units.count(n)})" if (n := index.n(name)) else name for name in _sets(index)]
    versions = meta.get("versions")
    shown = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
    host = str(meta.get("cpu") or next((row["host"] for row in index.results.rows if row["host"]), ""))
    threads = _threads(meta.get("threads"))
    date = str(meta.get("created") or meta.get("date") or datetime.date.today().isoformat())
    return [
        (name, text)
        for name, text in (
            ("Data (images)", ", ".join(named)),
            ("Host", host + threads if host else ""),
            ("Versions", shown),
            ("Intervals", f"95 %, {meta['replicates']} paired bootstrap replicates" if meta.get("replicates") else ""),
            ("Seed", str(meta["seed"]) if meta.get("seed") is not None else ""),
            ("Command", str(meta.get("command") or "")),
            ("Date" if meta.get("created") or meta.get("date") else "Page written", date),
        )
        if text
    ]


def _threads(number: Any) -> str:
    return f", {number} thread{'s' * (number != 1)}" if number else ""


def model_table(index: Index) -> Table | None:
    """Who is who: source, recipe, method, bits."""
    if not index.models:
        return None
    columns = ("source", "recipe", "method", "bits", "recipe_hash")
    used = [column for column in columns if any(index.described[model].get(column) for model in index.models)]
    heads = {"source": "Source", "recipe": "Recipe", "method": "Method", "bits": "Bits", "recipe_hash": "Recipe hash"}
    rows = [
        [Cell(model), *(Cell(index.described[model].get(c) or units.ABSENT) for c in used)] for model in index.models
    ]
    return Table("Models", [Cell("Model"), *(Cell(heads[c]) for c in used)], rows)


def notes(index: Index) -> list[str]:
    out = verdicts.few_images(index) + [str(note) for note in index.results.notes]
    if index.repeated:
        out.append(f"{index.repeated} rows repeat the key of an earlier one; the last is shown.")
    return out


def _judged(index: Index, cohort: Cohort, answers: dict[Question, dict[str, Comparison]]) -> Judged:
    if not answers:
        return Judged(cohort, [], [], [], [])
    axes = overview_of(index, cohort, answers)
    said = at_chance(index, cohort) + overview.sentences(index, cohort, axes, answers) + joint_wins(index, cohort)
    cards = [
        Card(model, _card_facts(index, cohort, model), about(index, cohort, model, answers))
        for model in cohort.variants
    ]
    tables = []
    for part in cohort.chunks(COLUMNS):
        lines, last = [], ""
        for question, by_model in answers.items():
            shown = [by_model[model] for model in part.variants]
            reach = max((abs(v) for a in shown for v in (a.value, a.low, a.high) if svg.finite(v)), default=0.0)  # type: ignore[arg-type]
            measure = question.measure
            n = index.n(question.set, question.corruption, question.part)
            cells = [
                Answer(
                    a,
                    measure.value(verdicts.absolute(index, a.model, question)),
                    svg.interval_bar(a.value, a.low, a.high, reach, a.verdict.css),
                )
                for a in shown
            ]
            base = measure.value(verdicts.absolute(index, cohort.reference, question))
            axis = "" if question.axis == last else question.axis
            lines.append(Line(axis, question, units.count(n) if n else "", base, cells))
            last = question.axis
        tables.append(VerdictTable(part, lines))
    return Judged(cohort, axes, said, cards, tables)


def _card_facts(index: Index, cohort: Cohort, model: str) -> list[str]:
    described = index.described[model]
    out = [f"{described['bits']} bits"] if described.get("bits") else []
    out += [described["method"]] if described.get("method") else []
    shares = {state: index.value(model, "coverage_macs", axis="state", at=state) for state in STATES}
    out += [f"{units.percent(share, 0)} of MACs {state}" for state, share in shares.items() if share]
    ours, theirs = (index.value(m, "model_bytes") for m in (model, cohort.reference))
    if ours and theirs:
        out.append(f"{ours / theirs:.2f}\N{MULTIPLICATION SIGN} the size")
    return out
