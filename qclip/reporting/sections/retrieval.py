"""Images that find their captions, and captions that find their image."""

from __future__ import annotations

from ..index import Index
from ..parts import Cell, Table
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section

BOTH = {"image_to_text_recall": "image to text", "text_to_image_recall": "text to image"}
JUDGED = 1  # the k that speaks for the axis


class RetrievalSection(Section):
    name = "retrieval"
    title = "Retrieval"
    intro = (
        "Recall at k: an image finds any of its captions among the first k, a caption its one image. Each "
        "model searches its own index."
    )
    absent = "No set with captions was given, so retrieval was not measured."
    tables_title = ""

    def questions(self, index: Index) -> list[Question]:
        found = dict.fromkeys((r["set"], r["metric"], r["at"]) for r in index.rows(*BOTH) if r["axis"] == "k")
        return [Question("Retrieval", metric, name, leading=k == JUDGED, k=k) for name, metric, k in found]

    def tables(self, index: Index) -> list[Table]:
        out = []
        for name in dict.fromkeys(row["set"] for row in index.rows(*BOTH)):
            at = sorted({r["at"] for r in index.rows(*BOTH) if r["set"] == name and r["axis"] == "k"})
            columns = [
                Column(metric, {"set": name, "axis": "k", "at": k}, Cell(f"Recall at {k}", said))
                for metric, said in BOTH.items()
                for k in at
            ]
            out += by_model(index, name, columns)
        return out
