"""Commands in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """For every process that a test starts, the fork server first: this checkout, one thread, and signals: shells
    start what runs in the background with SIGINT ignored, nohup with SIGHUP, and a command leaves both so."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a command to run in, empty."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"
