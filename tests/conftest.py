"""Fixtures for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; tests that need it skip by name where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "cifar10_test.parquet").is_file():
        pytest.skip("needs ../shared/data, the real images (not part of the repository)")
    return folder
