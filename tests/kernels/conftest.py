"""Every test of an op runs on every backend: the reference, and each CPU tier in turn with fall-backs forbidden. What
it finds in fresh memory is poison, and what it writes beside its outputs is a fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels import fresh_memory
from tests.kernels.tiers import TIERS, force

BACKENDS = ("reference", *TIERS)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """See `fresh_memory`."""
    with fresh_memory.poisoned():
        yield
    fresh_memory.check()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend or tier that runs during the test."""
    name = request.param
    if name == "reference":
        monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    else:
        force(monkeypatch, name)
    return name
