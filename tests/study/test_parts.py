"""What of models that were measured together belongs to each one's cell."""

from __future__ import annotations

from qclip.results import Results
from qclip.study.parts import part_of


def test_a_cell_has_its_own_notes_and_those_of_all() -> None:
    """A name that is the end, or the beginning, of another's is another name."""
    own, others, all_ = "w8a8: odd", ["w8a8-hqq: odd", "rtn-w8: odd", "seen of w8a8-hqq alone"], "float: of all"
    results = Results(notes=[own, *others, all_, "nothing was tuned"])
    labels = ["float", "w8a8", "w8a8-hqq", "rtn-w8", "w8"]
    assert part_of(results, "w8a8", "", labels).notes == [own, all_, "nothing was tuned"]
    assert part_of(results, "w8", "", labels).notes == [all_, "nothing was tuned"]
    assert part_of(results, "float", "", labels).notes == [all_, "nothing was tuned"]
