"""attention against NumPy float64, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels
from tests.kernels import oracles
from tests.kernels.oracles import dtypes, examples, f64, seeds

MASKS = ("none", "float", "bool", "rows", "keys", "heads", "scalar")


def case(seed, dtype=torch.float32, batch=None, queries=None, keys=None, heads=None, d=None):
    rng = np.random.default_rng(seed)
    batch, heads = batch or int(rng.integers(1, 4)), heads or int(rng.integers(1, 4))
    queries, keys = (
        queries or int(rng.choice([1, 5, 6, 7, 16, 19])),
        keys or int(rng.choice([1, 4, 15, 16, 17, 20, 21, 33, 50, 64, 66, 97])),
    )
    d = d or int(rng.choice([1, 8, 15, 16, 20, 64, 80]))
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, n, heads, d, generator=generator).to(dtype) for n in (queries, keys, keys))


def make_mask(kind, seed, q, k):
    generator = torch.Generator().manual_seed(seed + 1)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    shape = {
        "float": full,
        "bool": full[2:],
        "rows": (1, 1, full[2], 1),
        "keys": (full[0], 1, 1, full[3]),
        "heads": full[1:],
        "scalar": (1,),
    }
    if kind == "none":
        return None
    values = torch.randn(shape[kind], generator=generator)
    return values > 0 if kind in ("bool", "rows", "keys") else values * 2


def compare(y, expected, dtype):
    if dtype == torch.float32:
        assert np.abs(f64(y) - expected).max(initial=0) <= 1e-5
    else:
        assert np.linalg.norm(f64(y) - expected) <= 1e-2 * np.linalg.norm(expected) + 1e-6


def numpy_mask(mask):
    return None if mask is None else mask.numpy() if mask.dtype == torch.bool else f64(mask)


@examples(60)
@given(seeds, dtypes, st.sampled_from(MASKS), st.booleans(), st.sampled_from([None, 0.3, -0.7]))
def test_attention(backend, seed, dtype, kind, causal, scale):
    q, k, v = case(seed, dtype)
    mask = make_mask(kind, seed, q, k)
    out = torch.full(q.shape, 123.0, dtype=dtype)
    assert qkernels.attention(q, k, v, mask, causal, scale, out=out) is out
    compare(out, oracles.attention(f64(q), f64(k), f64(v), numpy_mask(mask), causal, scale), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "queries,keys,d,causal",
    [
        (50, 50, 64, False),
        (77, 77, 64, True),
        (3, 257, 88, False),
        (9, 197, 32, False),
        (7, 577, 64, False),
        (5, 729, 72, False),
        (577, 577, 64, False),
    ],
)
def test_shapes_of_clip(backend, queries, keys, d, causal, dtype):
    q, k, v = case(3, dtype, batch=1, queries=queries, keys=keys, heads=2, d=d)
    compare(qkernels.attention(q, k, v, causal=causal), oracles.attention(f64(q), f64(k), f64(v), None, causal), dtype)


@examples(25)
@given(seeds, dtypes, st.sampled_from(["packed", "heads first", "stepped", "sliced channels", "transposed channels"]))
def test_strided_views(backend, seed, dtype, kind):
    generator = torch.Generator().manual_seed(seed)
    b, n, h, d = 2, 9, 3, 16
    if kind == "packed":  # one projection makes q, k and v
        q, k, v = torch.randn(b, n, 3 * h * d, generator=generator).to(dtype).unflatten(-1, (3, h, d)).unbind(2)
    elif kind == "heads first":
        q, k, v = (torch.randn(b, h, n, d, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    elif kind == "stepped":
        q, k, v = (torch.randn(b, 2 * n, h, d, generator=generator).to(dtype)[:, ::2] for _ in range(3))
    elif kind == "sliced channels":
        q, k, v = (torch.randn(b, n, h, d + 5, generator=generator).to(dtype)[..., 2 : d + 2] for _ in range(3))
    else:
        q, k, v = (torch.randn(b, n, d, h, generator=generator).to(dtype).transpose(2, 3) for _ in range(3))
    compare(qkernels.attention(q, k, v), oracles.attention(f64(q), f64(k), f64(v)), dtype)


@examples(30)
@given(seeds, dtypes, st.sampled_from(["static", "channels", "dynamic"]), st.booleans())
def test_int8_results(backend, seed, dtype, kind, causal):
    q, k, v = case(seed, dtype)
    expected = oracles.attention(f64(q), f64(k), f64(v), None, causal)
    codes = torch.full(q.shape, 99, dtype=torch.int8)
    # Within 1e-5; with bfloat16 input besides what rounding probabilities to it may do above and below the line.
    error = np.full(q.shape, 1e-5)
    if dtype == torch.bfloat16:
        error += 2.0**-8 * oracles.attention(f64(q), f64(k), np.abs(f64(v)), None, causal)
    if kind == "dynamic":
        scales = torch.full(q.shape[:2], -1.0)
        qkernels.attention(q, k, v, causal=causal, out_dynamic=True, out=(codes, scales))
        steps = np.abs(expected).max((2, 3)) / 127
        largest = error.max((2, 3))
        assert (np.abs(f64(scales) - steps) <= largest / 127).all()
        margin = (error + 1.5 * largest[:, :, None, None]) / steps[:, :, None, None]
        oracles.assert_near_ties(codes, expected / steps[:, :, None, None], margin)
        return
    step = torch.rand(q.shape[2:], generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001
    step = step if kind == "channels" else step[0, 0]
    assert qkernels.attention(q, k, v, causal=causal, out_scale=step, out=codes) is codes
    oracles.assert_near_ties(codes, expected / f64(step), error / f64(step) + 1e-4)


def test_a_query_that_may_attend_nothing_gets_zeros(backend):
    q, k, v = case(0, batch=2, queries=7, keys=20, heads=2, d=16)
    mask = torch.ones(7, 20, dtype=torch.bool)
    mask[3] = False
    y = qkernels.attention(q, k, v, mask)
    assert (y[:, 3] == 0).all() and (y[:, [0, 1, 2, 4, 5, 6]] != 0).all()
    added = torch.zeros(7, 20).masked_fill(~mask, -float("inf"))
    assert torch.equal(qkernels.attention(q, k, v, added), y)
    codes, scales = qkernels.attention(q, k, v, added, out_dynamic=True)
    assert (scales[:, 3] == 1).all() and (codes[:, 3] == 0).all()
    assert (qkernels.attention(q, k[:, :0], v[:, :0]) == 0).all()


def test_causal_sees_only_the_past(backend):
    q, k, v = case(1, batch=1, queries=30, keys=30, heads=2, d=16)
    before = qkernels.attention(q, k, v, causal=True)
    k[:, 20:], v[:, 20:] = 1e3, -1e3
    after = qkernels.attention(q, k, v, causal=True)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("scale", [0.25, -0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(backend, dtype, scale):
    q, k, v = case(2, dtype, batch=1, queries=6, keys=40, heads=1, d=16)
    y = qkernels.attention(q * 200, k * 200, v, scale=scale)  # thousands: the largest takes all
    expected = oracles.attention(f64(q * 200), f64(k * 200), f64(v), scale=scale)
    assert np.abs(f64(y) - expected).max() < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_stay_in_their_row_and_head(backend, dtype):
    q, k, v = case(5, dtype, batch=2, queries=8, keys=19, heads=2, d=16)
    q[0, 2, 1, 3] = float("nan")
    v[1, 4, 0] = float("inf")
    y = qkernels.attention(q, k, v)
    assert y[0, 2, 1].isnan().all() and (~y[1, :, 0].isfinite()).all()
    y[0, 2, 1], y[1, :, 0] = 0, 0
    assert y.isfinite().all()
    codes, scales = qkernels.attention(q, k, v, out_dynamic=True)
    assert scales[0, 2].isnan() and codes[0, 2].abs().sum() == 0 and scales[1].isnan().all()
    assert scales[0, [0, 1, 3, 4, 5, 6, 7]].isfinite().all()
    codes = qkernels.attention(q, k, v, out_scale=0.01)
    assert codes[0, 2, 1].abs().sum() == 0 and codes[1, :, 0].abs().sum() == 0 and codes[0, 2, 0].abs().sum() > 0


@pytest.mark.parametrize("batch,queries", [(0, 3), (2, 0)])
def test_nothing_to_do(backend, batch, queries):
    q, k = torch.empty(batch, queries, 2, 8), torch.empty(batch, 5, 2, 8)
    assert qkernels.attention(q, k, k).shape == q.shape
    codes, scales = qkernels.attention(q, k, k, out_dynamic=True)
    assert codes.shape == q.shape and scales.shape == (batch, queries)


@pytest.mark.parametrize("d", [64, 20])
def test_queries_are_multiplied_where_they_lie_as_from_a_copy(backend, d) -> None:
    """A negative scale turns the queries, which takes a copy of them; the turned ones with the positive scale lie in
    rows of q, k and v together. The numbers that meet are the same, so the bits are."""
    joined = torch.randn(2, 19, 4, 3, d, generator=torch.Generator().manual_seed(0))
    joined[:, :, 1] = float("nan")  # what lies between the queries takes no part
    q, _, k, v = joined.unbind(2)
    y = qkernels.attention(q, k, v, scale=0.3)
    assert torch.isfinite(y).all() and torch.equal(y, qkernels.attention(-q, k, v, scale=-0.3))
