"""Activations of an epilogue: a column has the same bits wherever it lies, among whole panels of 64 columns, whose
vectors pass side by side, or at the end of the matrix, where they pass one by one."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels import Int8Weight
from tests.kernels.tiers import TIERS, force

PANEL = 64


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, "codes"], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_tanh"])
@pytest.mark.parametrize("tier", TIERS)
def test_columns_have_the_same_bits_in_a_panel_and_at_the_end(
    tier: str, activation: str, out: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 1: the linear part of a column is a code times its scale, both signs, from nothing to where GELU ends, and
    beyond; a residual, which has the columns of the matrix, too."""
    force(monkeypatch, tier)
    x = torch.arange(-127, 128, 7, dtype=torch.int8)[:, None]
    scales = torch.cat([torch.linspace(1e-4, 0.06, 50), torch.logspace(-6, 3, 13), torch.tensor([float("nan")])])
    residual = torch.randn(len(x), PANEL, generator=torch.Generator().manual_seed(0))
    how: dict = {"out_scale": 0.1, "out_zero_point": 3} if out == "codes" else {"out_dtype": out}

    def columns(count: int) -> torch.Tensor:
        weight = Int8Weight(torch.ones(count, 1, dtype=torch.int8), scales[:count], (count, 1))
        part = residual[:, :count].contiguous()
        return qkernels.int8_linear(
            x, torch.ones(()), qkernels.pack(weight), activation=activation, residual=part, **how
        )

    whole = columns(PANEL)
    assert out == "codes" or torch.isnan(whole[:, -1].float()).all()
    for count in (PANEL - 1, 33, 5):
        part = columns(count)
        same = (part == whole[:, :count]) | (part.isnan() & whole[:, :count].isnan())
        assert same.all(), (count, same.logical_not().nonzero()[:5])
