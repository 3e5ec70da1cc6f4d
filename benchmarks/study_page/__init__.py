"""docs/study.md, from the rows of a study: what of the paper it bears out, what not, and what it cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qclip.reporting import units
from qclip.study.variants import FLOAT

from ..findings_page import table
from .claims import AGREES, DENIES, OPEN, Line, Section, Study, cell, clear, label, place
from .sections import calibration, detection, joint_wins, robustness
from .spectra import spectra

HEAD = """# The published study
What {variants} variants of the shipped checkpoints, quantized by {methods}, lose and gain in
reliability, and what of the paper "Less Precise Can Be More Reliable" (arXiv 2509.21173; its claims as its abstract
puts them) that bears out. Written by `python -m benchmarks.study write` from the {rows:,} rows of
`benchmarks/results/study/published.parquet`; nothing in it is typed. The plan is `benchmarks/studies/{plan}`;
docs/studies.md says how to declare one of your own.

Every number is a paired difference to float with its 95 % interval, in percentage points for shares; **bold** where the
interval excludes 0: then it is *told* better or worse. Where nothing differs chance alone tells one of twenty, half of
these to each side. A claim *agrees* where more differences are told in its direction than in the other, and so many
that of independent intervals chance would tell as many in at most one of twenty studies; it does not where that holds
of the other direction; else these models and sets are too small to tell. Variants share images and their float model,
so that their intervals are not independent and chance has a wider spread than this rule allows for.
"""
TITLES = {AGREES: "What agrees with the paper", DENIES: "What does not"}
TITLES |= {OPEN: "What these models are too small to tell"}
WIDE: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [  # title, metrics, roles
    ("accuracy and calibration", ("top1", "ece", "nll", "signed_gap", "worst_group_top1", "group_gap"), ("id",)),
    ("OOD detection, AUROC by MCM", ("auroc",), ("ood", "ood-near", "ood-far", "ood-mean")),
    ("corruptions, means over severities", ("mean_top1", "mean_ece"), ("corrupted",)),
    ("shift and groups", ("top1", "worst_group_top1", "group_gap"), ("shift",)),
]
SECTIONS: list[Callable[[Study], Section]] = [joint_wins, calibration, detection, robustness, spectra]


def page(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    """The whole document. rows: of the kept Parquet file; record: what its runs took."""
    study = Study(rows)
    sections = [make(study) for make in SECTIONS]
    methods = list(dict.fromkeys(line["method"] for line in study.lines if line["method"]))
    names = units.words([f"`{name}`" for name in methods]) if methods else "nothing"
    count = len(dict.fromkeys((line["model"], line["variant"]) for line in study.lines if line["variant"] != FLOAT))
    plan = record.get("plan", "published.toml")
    parts = [HEAD.format(variants=count, methods=names, rows=len(rows), plan=plan)]
    claims = [claim for section in sections for claim in section.claims]
    for verdict, title in TITLES.items():
        told = [f"- {claim.said}: {claim.because}." for claim in claims if claim.verdict == verdict]
        parts.append(f"## {title}\n" + "\n".join(told or ["Nothing that was asked."]) + "\n")
        if verdict == OPEN:
            parts.append("\n".join(_undecided(study)))
    parts += [f"## {section.title}\n" + "\n".join(section.body) for section in sections]
    parts.append("## All differences\n" + "\n".join(_tables(study)))
    parts.append("## What it took, and how to run it again\n" + "\n".join(_cost(record)))
    return "\n".join(parts)


def _tables(study: Study) -> list[str]:
    """A row per variant, with its method and bits; a column per metric and set."""
    lines = []
    for model in study.models:
        for title, names, roles in WIDE:
            by: dict[tuple[str, str, str], dict[tuple[str, str], Line]] = {}
            for line in (line for name in names for line in study.differences(name, roles, model)):
                row = by.setdefault((line["variant"], line["method"], line["bits"]), {})
                row[line["metric"], line["corruption"] or line["set"]] = line
            places = list(dict.fromkeys(each for row in by.values() for each in row))
            if places:
                alone = len({where for _, where in places}) == 1
                heads = [label(name) + ("" if alone else f", {place(where)}") for name, where in places]
                body = [
                    [f"`{about[0]}`", *about[1:], *(cell(row.get(place)) for place in places)]
                    for about, row in by.items()
                ]
                lines += [f"### `{model}`: {title}", *table(["variant", "method", "bits", *heads], body)]
    return lines


def _undecided(study: Study) -> list[str]:
    """Of every kind of difference how many intervals hold 0."""
    body = []
    for title, names, roles in WIDE:
        for name in names:
            found = [clear(line) for line in study.differences(name, roles)]
            if found:
                share = f"{100 * found.count(0) / len(found):.0f} %"
                body.append([f"{label(name)} ({title})", str(len(found)), str(found.count(0)), share])
    return ["Differences whose interval holds 0:", "", *table(["", "differences", "hold 0", ""], body)]


def _cost(record: Mapping[str, Any]) -> list[str]:
    runs: Iterable[Mapping[str, Any]] = record.get("runs", [])
    body = [
        [
            str(run["cpu"]),
            f"{run['workers']} x {run['threads']}",
            f"{run['cells']:,}",
            str(run["failed"]),
            f"{run['images']:,}",
        ]
        + [_minutes(run["estimated_seconds"]), _minutes(run["seconds"]), _stages(run["seconds_by_stage"])]
        for run in runs
    ]
    lines = ["The estimate is that of `qclip study plan`: from a short probe, without calibrating and quantizing.", ""]
    head = ["processor", "workers x threads", "cells", "failed", "images embedded", "estimated", "took", "of which"]
    lines += table(head, body) if body else ["What it took was not noted.", ""]
    return [
        *lines,
        "```",
        "python -m benchmarks.study run        # from the root; its Parquet sets are those of benchmarks/findings.py",
        "python -m benchmarks.study write",
        "```",
        "",
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {_minutes(each)}" for stage, each in seconds.items())
