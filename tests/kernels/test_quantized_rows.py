"""How the native quantizers write codes: rows apart by a stride, and codes that leave shifted to unsigned."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels
from qkernels import cpu
from qkernels.abi import TYPES
from tests.kernels.fresh_memory import guarded
from tests.kernels.tiers import TIERS, force

few = settings(max_examples=30)
gaps = st.sampled_from([0, 1, 3, 64])


def native() -> Any:
    cpu.use_tier(os.environ["QKERNELS_CPU_TIER"])  # what `force` asked for
    return cpu.native


def written(rows: int, k: int, gap: int, dynamic: bool = True) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """Codes in rows `k + gap` bytes apart from an odd address on, scales where they are dynamic, and where both lie as
    shifted rows."""
    codes = guarded((rows, k), torch.uint8, gap, shift=1)
    scales = guarded((rows,), torch.float32) if dynamic else torch.empty(0)
    return codes, scales, (codes.data_ptr(), k + gap, 1, scales.data_ptr())


def check(shifted: torch.Tensor, codes: torch.Tensor) -> None:
    assert torch.equal(shifted, codes.reshape(shifted.shape).view(torch.uint8) ^ 128)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0).reshape(a.shape))


def special_rows(m: int, k: int, seed: int) -> torch.Tensor:
    """Rows of which some are 0, tiny, NaN or Inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    for row, value in enumerate((0.0, float("nan"), 2.0**-102, float("inf"))):
        if row < m - 1:
            x[row] = value
    return x


@pytest.mark.parametrize("tier", TIERS)
@few
@given(
    m=st.integers(1, 9),
    k=st.integers(1, 200),
    gap=gaps,
    seed=st.integers(0, 999),
    rule=st.sampled_from(["dynamic", "static", "zero point"]),
    norm=st.booleans(),
)
def test_quantizers(
    tier: str, m: int, k: int, gap: int, seed: int, rule: str, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, tier)
    x, smooth = special_rows(m, k, seed), torch.rand(k) + 0.5 if seed % 2 else None
    scale = None if rule == "dynamic" else torch.tensor(0.02)
    zero = torch.tensor(-7.0) if rule == "zero point" else None
    buffer, scales, out = written(m, k, gap)
    end = (*(0 if t is None else t.data_ptr() for t in (smooth, scale, zero)), *out, torch.get_num_threads())
    rows = (x.data_ptr(), 0, m, k)
    integer = None if zero is None else -7
    if norm:
        native().layer_norm_quantize(*rows, 0, 0, 1e-5, *end)
        codes, wanted = qkernels.layer_norm_quantize(x, None, None, 1e-5, smooth, scale, integer)
    else:
        native().quantize_per_token(*rows, *end)
        codes, wanted = qkernels.quantize_per_token(x, smooth, scale, integer)
    check(buffer, codes)
    assert same(scales, wanted)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("gap", [0, 3])
def test_patches(tier: str, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    x = torch.randn(2, 3, 10, 23)
    x[0, 0, 0, 0], x[1, :, 4:8, :7] = float("inf"), 0.0
    codes, wanted = qkernels.quantize_patches(x, (4, 7))
    buffer, scales, out = written(12, 84, gap)
    native().quantize_patches(
        x.data_ptr(), 0, 2, 3, 2, 3, 4, 7, *x.stride()[:3], 0, 0, 0, *out, torch.get_num_threads()
    )
    check(buffer, codes)
    assert same(scales, wanted)


@pytest.mark.parametrize("tier", TIERS)
@few
@given(
    d=st.sampled_from([1, 8, 20, 64, 80]),
    heads=st.integers(1, 3),
    gap=gaps,
    seed=st.integers(0, 999),
    rule=st.sampled_from(["dynamic", "static", "channels"]),
)
def test_attention(
    tier: str, d: int, heads: int, gap: int, seed: int, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 9, heads, d, generator=generator).unbind()
    q[1, 3, 0, 0], v[0, 2, heads - 1] = float("nan"), float("inf")
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[5] = False
    step = torch.full((heads, d), 0.02) if rule == "channels" else torch.tensor(0.02)
    static = rule != "dynamic"
    result = qkernels.attention(q, k, v, mask, out_scale=step if static else None, out_dynamic=not static)
    codes, wanted = (result, None) if static else result
    buffer, scales, (out, stride, shift, at) = written(18, heads * d, gap, not static)
    native().attention(
        *(t for x in (q, k, v) for t in (x.data_ptr(), *x.stride()[:3])),
        *(0, 2, 9, 9, heads, d, mask.data_ptr(), 1, 0, 0, 9, 0, d**-0.5, out, stride, shift, TYPES[torch.int8]),
        *((step.data_ptr(), int(rule == "channels"), 0) if static else (0, 0, at)),
        torch.get_num_threads(),
    )
    check(buffer, codes)
    assert static or same(scales, wanted)
