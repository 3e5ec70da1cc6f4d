"""The tiers that the tests of the ops run on, each in turn."""

from __future__ import annotations

import pytest

from qkernels import cpu
from tests.kernels import remote

TIERS = ["scalar", "avx2", "avxvnni", "avx512vnni", "neon"]


def force(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    """Run `tier` for the rest of the test, with every fall-back an error.

    Tiers of other processors run in another process, under an emulator.
    """
    if cpu.native is None:
        pytest.skip(f"needs the native kernels: {cpu.missing}")
    if tier not in cpu.native.tiers():
        if tier not in remote.CXX:
            pytest.skip(f"this processor cannot run the {tier} tier")
        if why := remote.missing(tier):
            pytest.skip(f"this processor cannot run the {tier} tier, and emulating it {why}")
        remote.install(monkeypatch, tier)
    monkeypatch.delenv("QKERNELS_BACKEND", raising=False)
    monkeypatch.setenv("QKERNELS_CPU_TIER", tier)
    monkeypatch.setenv("QKERNELS_STRICT", "1")
