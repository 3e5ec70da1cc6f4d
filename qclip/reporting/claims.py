"""Level and shape of weights or features beside every control, drawn."""

from __future__ import annotations

from . import units
from .index import Cohort, Index
from .parts import Figure
from .plots import Marks, along

CLAIMS = {"level": 1.0, "shape": 0.0}  # what no change is
WIDE = 420.0


def claims(index: Index, cohort: Cohort, role: str) -> list[Figure]:
    """A figure for each claim and each tower ("tower") or set of images ("id"): the models, then what each control
    would be in the place of each, with 95 % intervals."""
    out = []
    rows = [row for claim in CLAIMS for row in index.rows(claim) if row["role"] == role]
    controls = list(dict.fromkeys(row["at"] for row in rows if row["axis"] == "control"))
    places = {0.0: "model"} | {1.0 + k: name.replace("_", " ") for k, name in enumerate(controls)}
    for where in dict.fromkeys(row["set"] for row in rows):
        for claim, nothing in CLAIMS.items():
            marks: Marks = {}
            for row in rows:
                if (row["set"], row["metric"]) == (where, claim) and not row["reference"]:
                    place = 1.0 + controls.index(row["at"]) if row["axis"] else 0.0
                    marks.setdefault(row["model"], {})[place] = row
            title = f"{where} tower: {claim}" if role == "tower" else f"{where}: {claim} of the features"
            out += along(cohort, marks, title, units.title(claim), places, "", 1.0, nothing, WIDE)
    return out
