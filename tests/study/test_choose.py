"""A pick keeps the limits; what is beaten in everything is told from what is not."""

from __future__ import annotations

import pytest

from qclip.errors import InputError
from qclip.study import choose
from qclip.study.choose import Candidate, _beats, _broken, _order


def candidate(name: str, size: float, preferred: float | None, loss: float = 0.0) -> Candidate:
    return Candidate("m", name, size, None, preferred, {"top1": (loss, loss + 1)})


def test_one_beats_another_only_where_it_is_nowhere_worse() -> None:
    one, larger, better = candidate("a", 1, 0.9), candidate("b", 2, 0.9), candidate("c", 2, 0.95)
    assert _beats(one, larger, 1) and not _beats(larger, one, 1)
    assert not _beats(one, better, 1) and not _beats(better, one, 1)
    assert not _beats(one, candidate("d", 1, 0.9), 1)
    assert _beats(candidate("e", 1, 0.1), candidate("f", 1, 0.2), -1)  # of an error less is better


def test_limits_are_kept() -> None:
    limits = choose.Limits("top1", max_size=10, max_loss={"top1": 0.5})
    assert _broken(candidate("a", 10, 0.9, 0.5), limits) == []
    assert _broken(candidate("a", 10, 0.9, 0.5 + 1e-15), limits) == []
    assert _broken(candidate("a", 11, 0.9, 0.6), limits) == ["too large: 11 B", "loses 0.60 of top1"]
    assert _broken(candidate("a", 1, None), limits) == ["top1 is undefined or was not measured"]
    broken = choose.Limits("top1", max_latency=5, max_loss={"ece": 1})
    assert len(_broken(candidate("a", 1, 0.9), broken)) == 2


def test_the_pick_comes_first() -> None:
    found = [candidate("a", 2, 0.9), candidate("b", 1, 0.9), candidate("c", 1, 0.99)]
    found[2].why = ["too slow"]
    assert [each.variant for each in sorted(found, key=lambda each: _order(each, 1))] == ["b", "a", "c"]


@pytest.mark.parametrize(("text", "number"), [("60MB", 60e6), ("1.5 GB", 1.5e9), ("4096", 4096), ("3kb", 3000)])
def test_sizes(text: str, number: float) -> None:
    assert choose.size(text) == number


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "60XB", "nan", "9" * 30])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no size"):
        choose.size(text)


def test_times_and_losses() -> None:
    assert [choose.milliseconds(text) for text in ("10ms", "0.5s", "7")] == [10, 500, 7]
    assert choose.losses(["top1=0.5", "ece=-1"]) == {"top1": 0.5, "ece": -1}
    for bad in (["top1"], ["top1=x"], ["top1=1", "top1=2"]):
        with pytest.raises(InputError):
            choose.losses(bad)
