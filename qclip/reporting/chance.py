"""Where a reference does no better than guessing, so that a difference to it says little."""

from __future__ import annotations

from collections.abc import Iterator

from qclip.data.corruptions import GROUPS
from qclip.results import Row

from . import units
from .index import Cohort, Index

RECALL = ("image_to_text_recall", "text_to_image_recall")
NAMED = 4  # places that the sentence names


def at_chance(index: Index, cohort: Cohort) -> list[str]:
    """One sentence that names where the reference's interval reaches what guessing gives, or none. Guessing: one class
    in as many as there are, an AUROC of one half, k of the images that are searched."""
    if not cohort.reference:
        return []
    found = [
        f"{where} ({measure.record.label} {measure.value(row['value'])} {measure.interval(row['low'], row['high'])}, "
        f"by guessing {measure.value(guessed)})"
        for where, row, guessed in _guessable(index, cohort.reference)
        if row["low"] is not None and row["low"] <= guessed
        for measure in [units.metric(row["metric"])]
    ]
    if not found:
        return []
    rest = len(found) - NAMED
    named = [*found[:NAMED], f"{rest} more"] if rest > 0 else found
    return [
        f"{cohort.reference} itself is not shown to be better than guessing on {units.words(named)}: differences to it "
        "say little there, and no better or worse should be read into them."
    ]


def _guessable(index: Index, reference: str) -> Iterator[tuple[str, Row, float]]:
    """Where, the reference's own row, and what guessing gives."""
    for row in index.rows("top1", "probe_top1", "mean_top1", "auroc", *RECALL):
        if row["model"] != reference or row["reference"] or row["value"] is None:
            continue
        if row["metric"] == "auroc":
            if row["score"] == index.judged_score and not row["axis"]:
                yield row["set"], row, 0.5
        elif row["metric"] in RECALL:
            if row["at"] == 1 and row["n"]:
                yield row["set"], row, 1 / row["n"]
        elif (guessed := index.value("", "chance_top1", set=row["set"])) is not None:
            plain = not row["severity"] and row["subset"] == "all" and not row["axis"]
            under = row["corruption"]
            if plain and (not under or row["metric"] == "mean_top1" and under not in GROUPS):
                yield (
                    f"{row['set']} under {units.small(units.corruption(under))}" if under else row["set"],
                    row,
                    guessed,
                )
