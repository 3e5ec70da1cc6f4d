"""Every test of an op runs on every backend: the reference, and each CPU tier in turn with fall-backs forbidden."""

from __future__ import annotations

import pytest

from tests.kernels.tiers import TIERS, force

BACKENDS = ("reference", *TIERS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend or tier that runs during the test."""
    name = request.param
    if name == "reference":
        monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    else:
        force(monkeypatch, name)
    return name
