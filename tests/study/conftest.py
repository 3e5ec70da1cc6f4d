"""The small study, run once for all tests that only read."""

from __future__ import annotations

import pytest

from qclip.study.run import Ready
from tests.study.small import Told, measured, plan_of


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ready, Told]:
    """The small study, run: read it, do not write into its store."""
    folder = tmp_path_factory.mktemp("study")
    return measured(plan_of(folder), folder / "store")
