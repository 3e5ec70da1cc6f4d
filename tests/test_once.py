"""What several test processes share is made by one of them."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.once import alone


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "made/on/the/way"
    with alone(folder), open(folder / "lock") as another, pytest.raises(BlockingIOError):
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(folder / "lock") as another:
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_fails_lets_the_next_one_in(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(tmp_path):
        raise ZeroDivisionError
    with alone(tmp_path):
        pass
