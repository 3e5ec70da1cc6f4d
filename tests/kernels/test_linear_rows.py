"""How the native linear ops read x: rows apart by a stride, and codes that come shifted to unsigned."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels
from qkernels import Int4Weight, Int8Weight, cpu
from qkernels.abi import TYPES
from tests.kernels.fresh_memory import guarded
from tests.kernels.tiers import TIERS, force

SIZES = st.integers(1, 129)
SHIFTED = ["avxvnni", "avx512vnni"]  # tiers whose int8 products want x + 128
few = settings(max_examples=40)


def native_linear(
    x: torch.Tensor, k: int, stride: int, shifted: bool, x_scale: torch.Tensor | None, weight: Int8Weight | Int4Weight
) -> torch.Tensor:
    """x [M, K] . w^T as float32 by the native function, x given by its first row and the bytes between two rows."""
    kind = 0 if x_scale is None else x_scale.dim()
    out = guarded((len(x), weight.shape[0]), torch.float32)
    rows = (len(x), k, stride, int(shifted), 0 if x_scale is None else x_scale.data_ptr(), kind)
    end = (0, 0, 0, 0, out.data_ptr(), 0, 0, 0, 0, 0, 0, torch.get_num_threads())
    codes, scales, n = weight.codes.data_ptr(), weight.scales.data_ptr(), weight.shape[0]
    native: Any = cpu.native
    cpu.use_tier(os.environ["QKERNELS_CPU_TIER"])  # what `force` asked for
    if isinstance(weight, Int8Weight):
        native.int8_linear(x.data_ptr(), *rows, codes, scales, n, *end)
    else:
        zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
        native.int4_linear(x.data_ptr(), TYPES.get(x.dtype, 3), *rows, codes, scales, zeros, n, weight.group, *end)
    return out


def spread(x: torch.Tensor, gap: int) -> torch.Tensor:
    """A view [M, K] of the same values whose rows have `gap` elements of noise between them."""
    m, k = x.shape
    if x.is_floating_point():
        buffer = torch.full((m, k + gap), float("nan"), dtype=x.dtype)
    else:
        buffer = torch.randint(0, 256, (m, k + gap), dtype=torch.uint8).view(x.dtype)
    buffer[:, :k] = x
    return buffer[:, :k]


def weight_and_product(x: torch.Tensor, scale: torch.Tensor, n: int, four: bool) -> tuple[Any, torch.Tensor]:
    """A packed weight [n, K] of 4 or 8 bits, and what the op gives for codes x."""
    w = torch.randn(n, x.shape[1])
    if four:
        four_bits = Int4Weight.quantize(w, 64, symmetric=False).pack("nibble64")
        return four_bits, qkernels.int4_linear(x, scale, four_bits)
    eight_bits = Int8Weight.quantize(w).pack("vnni64")
    return eight_bits, qkernels.int8_linear(x, scale, eight_bits)


@pytest.mark.parametrize("tier", TIERS)
@few
@given(m=SIZES, n=SIZES, k=SIZES, gap=st.integers(0, 9), kind=st.integers(0, 2), four=st.booleans())
def test_rows_with_a_stride(
    tier: str, m: int, n: int, k: int, gap: int, kind: int, four: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, tier)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    scale = torch.rand([(), (m,), (m, -(-k // 128))][kind]) + 0.5
    weight, want = weight_and_product(x, scale, n, four)
    assert torch.equal(native_linear(spread(x, gap), k, k + gap, False, scale, weight), want)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_rows_with_a_stride(tier: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    weight = Int4Weight.quantize(torch.randn(70, 130)).pack("nibble64")
    x = torch.randn(9, 130).to(dtype)
    got = native_linear(spread(x, 5), 130, 135 * x.element_size(), False, None, weight)
    assert torch.equal(got, qkernels.int4_linear(x, None, weight))


@pytest.mark.parametrize("tier", SHIFTED)
@few
@given(m=SIZES, n=SIZES, k=SIZES, gap=st.integers(0, 9), kind=st.integers(0, 2), four=st.booleans())
def test_shifted_rows(
    tier: str, m: int, n: int, k: int, gap: int, kind: int, four: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands between the rows, the bytes up to the next multiple of 4 too, does not count."""
    force(monkeypatch, tier)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    x[torch.rand(x.shape) < 0.2] = -127
    x[torch.rand(x.shape) < 0.2] = 127
    scale = torch.rand([(), (m,), (m, -(-k // 128))][kind]) + 0.5
    shifted = spread((x.view(torch.uint8) ^ 128), gap + -k % 4)
    weight, want = weight_and_product(x, scale, n, four)
    assert torch.equal(native_linear(shifted, k, shifted.stride(0), True, scale, weight), want)


@pytest.mark.parametrize("tier", SHIFTED)
@pytest.mark.parametrize("k", [4100, 8202])
def test_deep_shifted_rows_do_not_saturate(tier: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    x = torch.tensor([[127], [-127], [-128]], dtype=torch.int8).repeat(3, k)
    w = torch.tensor([[127], [-127]], dtype=torch.int8).repeat(33, k)
    weight = Int8Weight(w, torch.ones(66), (66, k)).pack("vnni64")
    shifted = spread(x.view(torch.uint8) ^ 128, 64 + -k % 4)
    got = native_linear(shifted, k, shifted.stride(0), True, torch.ones(()), weight)
    assert torch.equal(got, (x.long() @ w.long().t()).float())
