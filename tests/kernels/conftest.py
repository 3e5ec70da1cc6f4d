"""Every test of an op runs on every backend: the reference, and each CPU tier in turn with fall-backs forbidden. What
it finds in fresh memory is poison, and what it writes beside its outputs is a fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qkernels import cpu
from tests.kernels import fresh_memory, remote
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tiers of other processors are slow: an emulator runs them."""
    here = set(TIERS) if cpu.native is None else set(cpu.native.tiers())
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in remote.CXX and value not in here for value in given):
            item.add_marker(pytest.mark.slow)
