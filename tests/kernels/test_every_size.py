"""Sizes, corners and addresses: every op of a CPU tier beside the reference.

`SIZES` walks M, N and K together through 1..129, each in an order of its own: every size of each appears once, in every
run. Sizes that are drawn (hypothesis) are in the files of the ops.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels
from qkernels import Int4Weight, Int8Weight, reference
from tests.kernels.fresh_memory import guarded
from tests.kernels.test_quantize import check_layer_norm, sample
from tests.kernels.tiers import TIERS, force

pytestmark = pytest.mark.slow  # every size up to 129 on every tier

SIZES = [(1 + i, 1 + (37 * i + 11) % 129, 1 + (50 * i + 64) % 129) for i in range(129)]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, request.param)
    return request.param


def codes(seed: int, *shape: int) -> torch.Tensor:
    """Codes of which one in five is the smallest or the largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    corner = torch.rand(shape, generator=generator)
    return torch.where(corner < 0.1, -127, torch.where(corner > 0.9, 127, x)).to(torch.int8)


def test_the_walk_meets_every_size() -> None:
    assert all(sorted(sizes) == list(range(1, 130)) for sizes in zip(*SIZES, strict=True))


def test_int8_linear(tier: str) -> None:
    for m, n, k in SIZES:
        x, w = codes(m, m, k), codes(n + 1000, n, k)
        y = qkernels.int8_linear(x, torch.ones(()), qkernels.pack(Int8Weight(w, torch.ones(n), (n, k))))
        assert torch.equal(y.long(), x.long() @ w.long().t()), (m, n, k)


def test_int4_linear(tier: str) -> None:
    for m, n, k in SIZES:
        w = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(n)).float()
        group = (32, 64, 128, k)[m % 4]
        weight = qkernels.pack(Int4Weight.quantize(w, group, scales=torch.ones(n, -(-k // group))))
        x = codes(m, m, k)
        want = x.long() @ w.long().t()
        assert torch.equal(qkernels.int4_linear(x, torch.ones(()), weight).long(), want), (m, n, k, group)
        assert torch.equal(qkernels.int4_linear(x.float(), None, weight).long(), want), (m, n, k, group)


def test_quantizers(tier: str) -> None:
    for m, n, k in SIZES:
        x, smooth = sample(n, m, k), torch.rand(k) + 0.5
        for scale in (None, torch.tensor(0.02)):
            found = qkernels.quantize_per_token(x, smooth, scale)
            wanted = reference.quantize_per_token(x, smooth, scale)
            assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(found, wanted, strict=True))
        found, wanted = qkernels.channel_absmax(x), reference.channel_absmax(x)
        assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1)), (m, k)
        for axis, step in ((0, torch.rand(m) + 0.1), (1, smooth), (None, torch.tensor(0.3))):
            found, wanted = (
                f(x, step, None, -8, 7, "ste", axis) for f in (qkernels.fake_quantize, reference.fake_quantize)
            )
            assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1)), (m, k, axis)
        image = sample(n, 1, 2, m, 2 * k + 1)
        found, wanted = qkernels.quantize_patches(image, (1, k)), reference.quantize_patches(image, 1, k)
        assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(found, wanted, strict=True))
        x = torch.randn(m, k) * 3 + n % 3
        weight, bias = torch.randn(k), torch.randn(k)
        check_layer_norm(
            x, weight, bias, smooth, None, None, qkernels.layer_norm_quantize(x, weight, bias, 1e-5, smooth)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(tier: str, dtype: torch.dtype) -> None:
    for queries, keys, d in SIZES:
        generator = torch.Generator().manual_seed(d)
        q, k, v = (torch.randn(1, n, 1, d, generator=generator).to(dtype) for n in (queries, keys, keys))
        causal = bool(queries % 2)
        scores = q[0, :, 0].double() @ k[0, :, 0].double().t() * d**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -float("inf"))
        want = scores.softmax(1) @ v[0, :, 0].double()
        error = qkernels.attention(q, k, v, causal=causal)[0, :, 0].double() - want
        if dtype == torch.float32:
            assert error.abs().max() <= 1e-5, (queries, keys, d)
        else:
            assert error.norm() <= 1e-2 * want.norm(), (queries, keys, d)


@pytest.mark.parametrize("k", [1, 129, 4100])
def test_int4_corners(tier: str, k: int) -> None:
    """Largest by largest in all signs, whole and alternating."""
    x = torch.full((5, k), 127, dtype=torch.int8)
    x[1], x[2], x[3, ::2], x[4, k // 2 :] = -127, -128, -127, -127
    w = torch.full((4, k), 7.0)
    w[1], w[2, ::2], w[3, k // 3 :] = -8, -8, -8
    for group in (min(128, k), k):
        weight = qkernels.pack(Int4Weight.quantize(w, group, scales=torch.ones(4, -(-k // group))))
        assert torch.equal(qkernels.int4_linear(x, torch.ones(()), weight).long(), x.long() @ w.long().t())


def test_results_saturate(tier: str) -> None:
    """Static int8 results far beyond the grid are its ends, by the sign of the value."""
    x, w, one = codes(0, 9, 70), torch.randint(-7, 8, (80, 70)), torch.ones(())
    sign = (x.long() @ w.t()).sign()
    ends = {None: (-127, 127), -100: (-127, 127), 100: (-127, 127)}
    int8 = Int8Weight(w.to(torch.int8), torch.ones(80), (80, 70))
    int4 = Int4Weight.quantize(w.float(), 70, scales=torch.ones(80, 1))
    for weight, op in ((int8, qkernels.int8_linear), (int4, qkernels.int4_linear)):
        packed: Any = qkernels.pack(weight)
        for zero, (low, high) in ends.items():
            y = op(x, one, packed, out_scale=torch.tensor(1e-6), out_zero_point=zero)
            assert torch.equal(y[sign > 0], torch.full_like(y[sign > 0], high)), zero
            assert torch.equal(y[sign < 0], torch.full_like(y[sign < 0], low)), zero
            assert torch.equal(y[sign == 0], torch.full_like(y[sign == 0], zero or 0)), zero
    rows = torch.randn(80, 70)
    normed, _ = qkernels.layer_norm_quantize(rows, None, None, 1e-5, scale=torch.tensor(1e-9))
    assert torch.equal(normed.double(), 127 * (rows.double() - rows.double().mean(1, keepdim=True)).sign())
    q = torch.randn(2, 9, 3, 16)
    attended = qkernels.attention(q, q, q.abs(), out_scale=torch.tensor(1e-9))
    assert (attended == 127).all()
    assert (qkernels.attention(q, q, -q.abs(), out_scale=torch.tensor(1e-9)) == -127).all()


def moved(x: torch.Tensor | None) -> Any:
    """The same values, contiguous, one element further on than memory is aligned."""
    if x is None:
        return None
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def test_unaligned_memory(tier: str) -> None:
    x8, x, scale = codes(0, 13, 70), torch.randn(13, 70), torch.rand(13) + 0.5
    w, bias, residual = torch.randn(90, 70), torch.randn(90), torch.randn(13, 90)
    w8, w4 = qkernels.pack(Int8Weight.quantize(w)), qkernels.pack(Int4Weight.quantize(w, 32))
    q, k, v = torch.randn(3, 2, 21, 3, 20).unbind()
    mask, smooth = torch.randn(21, 21), torch.rand(70) + 0.5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calls: dict[str, tuple[Any, tuple]] = {
            "int8_linear": (
                lambda *a, dtype=dtype: qkernels.int8_linear(a[0], a[1], w8, a[2], "gelu", a[3], out_dtype=dtype),
                (x8, scale, bias, residual.to(dtype)),
            ),
            "int4_linear": (lambda *a: qkernels.int4_linear(a[0], a[1], w4, a[2]), (x8, scale, bias)),
            "int4_linear of floats": (lambda *a: qkernels.int4_linear(a[0], None, w4, a[1]), (x.to(dtype), bias)),
            "quantize_per_token": (qkernels.quantize_per_token, (x.to(dtype), smooth)),
            "layer_norm_quantize": (lambda *a: qkernels.layer_norm_quantize(*a, 1e-5), (x.to(dtype), smooth, x[0])),
            "channel_absmax": (qkernels.channel_absmax, (x.to(dtype),)),
            "attention": (qkernels.attention, (q.to(dtype), k.to(dtype), v.to(dtype), mask)),
            "hadamard_transform": (qkernels.hadamard_transform, (x[:, :48].to(dtype),)),
        }
        for name, (call, arguments) in calls.items():
            wanted, found = call(*arguments), call(*map(moved, arguments))
            pairs = zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]
            assert all(torch.equal(a, b) for a, b in pairs), (name, dtype)
        out = guarded((13, 90), dtype, shift=1)
        qkernels.int8_linear(x8, scale, w8, bias, out_dtype=dtype, out=out)
        assert torch.equal(out, qkernels.int8_linear(x8, scale, w8, bias, out_dtype=dtype))
    out8 = guarded((13, 70), torch.int8, shift=1), guarded((13,), torch.float32, shift=1)
    qkernels.quantize_per_token(x, smooth, out=out8)
    assert all(torch.equal(a, b) for a, b in zip(out8, qkernels.quantize_per_token(x, smooth), strict=True))
