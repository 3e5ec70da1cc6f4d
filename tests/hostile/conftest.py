"""Commands in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """For every process that a test starts, the fork server first of all: this checkout, and one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a command to run in, empty."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"
