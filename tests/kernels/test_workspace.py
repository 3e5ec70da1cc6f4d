"""The bytes that programs hold: counted, bounded, given back."""

import gc

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import cpu
from qkernels.recording import LIMIT, NoRoomError, Workspace, ledger, limit, record

from .test_recording import linear, weight, without_gradients  # noqa: F401  (fixtures)

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")


def test_the_limit_is_the_variable_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QKERNELS_PROGRAM_BYTES", raising=False)
    assert limit() == LIMIT
    monkeypatch.setenv("QKERNELS_PROGRAM_BYTES", "12345")
    assert limit() == 12345
    for text in ("", "-1", "1e6", "lots"):
        monkeypatch.setenv("QKERNELS_PROGRAM_BYTES", text)
        with pytest.raises(ValueError, match="QKERNELS_PROGRAM_BYTES=.*whole number of bytes"):
            limit()


def test_what_passes_the_limit_is_refused_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(64, 64)

    def function(x: Tensor) -> Tensor:
        return linear(*qkernels.quantize_per_token(linear(*qkernels.quantize_per_token(x), w)), w)

    gc.collect()
    before, workspace = ledger.bytes, Workspace()
    small = record(function, torch.randn(4, 64), workspace=workspace)
    held = ledger.bytes
    assert held > before
    monkeypatch.setenv("QKERNELS_PROGRAM_BYTES", str(held + 10_000))
    with pytest.raises(NoRoomError, match="QKERNELS_PROGRAM_BYTES"):
        record(function, torch.randn(4000, 64), workspace=workspace)
    gc.collect()
    assert ledger.bytes == held
    x = torch.randn(4, 64)
    assert torch.equal(small(x), function(x))
    monkeypatch.setenv("QKERNELS_PROGRAM_BYTES", "0")
    with pytest.raises(NoRoomError):
        record(function, torch.randn(4, 64))
    del small, workspace
    gc.collect()
    assert ledger.bytes == before
