"""Every test of an op runs on every backend: the reference, and each CPU tier in turn with fall-backs forbidden."""

from __future__ import annotations

import pytest

from qkernels import cpu

BACKENDS = ("reference", "scalar", "avx2", "avx512vnni")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend or tier that runs during the test."""
    name = request.param
    if name == "reference":
        monkeypatch.setenv("QKERNELS_BACKEND", "reference")
        return name
    if cpu.native is None:
        pytest.skip(f"needs the native kernels: {cpu.missing}")
    if name not in cpu.native.tiers():
        pytest.skip(f"this processor cannot run the {name} tier")
    monkeypatch.delenv("QKERNELS_BACKEND", raising=False)
    monkeypatch.setenv("QKERNELS_CPU_TIER", name)
    monkeypatch.setenv("QKERNELS_STRICT", "1")
    return name
