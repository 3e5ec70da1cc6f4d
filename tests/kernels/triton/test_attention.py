"""attention on the Triton kernels, by the interpreter, against NumPy float64.

The interpreter's float32 products are exact to float32: that three tf32 products are close enough on a GPU is shown by
`test_three_tf32_products_are_within_the_contract`, which does their arithmetic in torch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qkernels
from qkernels import reference
from qkernels.triton import attention as file
from qkernels.triton import launch
from tests.kernels import oracles
from tests.kernels.oracles import f64
from tests.kernels.test_attention import case, compare, make_mask, numpy_mask

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

CASES = [  # dtype, batch, queries, keys, heads, width, mask, causal, scale
    (F32, 1, 50, 50, 2, 64, "none", False, None),
    (F32, 2, 77, 77, 1, 64, "none", True, None),
    (F32, 1, 3, 17, 2, 96, "float", False, 0.3),
    (F32, 1, 64, 65, 1, 20, "bool", True, -0.7),
    (F32, 1, 63, 1, 3, 1, "scalar", False, None),
    (F32, 2, 1, 50, 2, 64, "none", False, None),
    (F32, 1, 97, 15, 1, 72, "keys", True, None),
    (F16, 1, 1, 197, 2, 80, "none", False, None),
    (F16, 3, 65, 64, 1, 32, "none", False, None),
    (F16, 1, 50, 50, 2, 64, "none", False, None),
    (F16, 1, 129, 77, 2, 64, "heads", False, 0.2),
    (F16, 1, 17, 16, 1, 256, "rows", False, None),
    (BF16, 1, 257, 257, 1, 64, "none", False, None),
    (BF16, 3, 128, 127, 1, 80, "none", True, None),
    (BF16, 1, 16, 33, 2, 64, "float", True, None),
    (BF16, 2, 50, 50, 1, 96, "bool", False, None),
    (BF16, 1, 31, 63, 1, 128, "none", False, None),
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_against_float64(index):
    dtype, batch, queries, keys, heads, width, kind, causal, scale = CASES[index]
    q, k, v = case(index, dtype, batch, queries, keys, heads, width)
    mask = make_mask(kind, index, q, k)
    out = torch.full(q.shape, 123.0, dtype=dtype)
    assert qkernels.attention(q, k, v, mask, causal, scale, out=out) is out
    compare(out, oracles.attention(f64(q), f64(k), f64(v), numpy_mask(mask), causal, scale), dtype)


def test_the_cases_meet_every_configuration():
    """Each tile that a launch can choose is run above, and each has tails of queries and keys."""
    wanted = {file.configuration(v, chip) for v, chip in _variants()}
    met = set()
    for dtype, batch, queries, _, heads, width, kind, _, _ in CASES:
        tall = queries > 64 and batch * heads * -(-queries // 128) >= launch.INTERPRETER.multiprocessors
        mask = file.NO_MASK if kind == "none" else file.FLOAT_MASK
        met.add(file.configuration(file.Variant(dtype, width, tall, queries <= 16, mask), launch.INTERPRETER))
    assert wanted - met <= {file.Configuration(64, 32, 8)}  # of sm_80 alone: tile and code are those of 4 warps


def _variants():
    for chip in (launch.SM80, launch.SM90):
        for dtype in (F32, BF16):
            for width in (16, 32, 64, 128, 256):
                for tall, few in ((False, False), (True, False), (False, True)):
                    for mask in (file.NO_MASK, file.BOOL_MASK, file.FLOAT_MASK):
                        for aligned in (True, False):
                            if width <= file.WIDEST[dtype.itemsize]:
                                v = file.Variant(dtype, width, tall, few, mask, aligned=aligned)
                                yield v, chip


def test_every_configuration_is_legal_and_compiled_ahead_of_time():
    """For each chip, and for addresses that are multiples of 16 bytes as for others."""

    compiled = set()
    for c in file.aot_cases():
        itemsize = 4 if c.signature["q_ptr"] == "*fp32" else 2
        compiled.add(
            (
                c.capabilities[0],
                itemsize,
                c.constexprs["ALIGN"] > 1,
                c.constexprs["ROWS"],
                c.constexprs["KEYS"],
                c.options["num_warps"],
            )
        )
    for v, chip in _variants():
        chosen = file.configuration(v, chip)
        assert chosen.legal(max(16, v.width), v.dtype.itemsize, chip)
        assert (chip.capability, v.dtype.itemsize, v.aligned, chosen.rows, chosen.keys, chosen.warps) in compiled


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "kind", ["packed", "heads first", "stepped", "odd", "transposed channels", "expanded", "unlike"]
)
def test_strided_views(kind, dtype):
    generator = torch.Generator().manual_seed(5)
    b, n, h, d = 2, 19, 3, 16
    if kind == "packed":  # one projection makes q, k and v
        q, k, v = torch.randn(b, n, 3 * h * d, generator=generator).to(dtype).unflatten(-1, (3, h, d)).unbind(2)
    elif kind == "heads first":
        q, k, v = (torch.randn(b, h, n, d, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    elif kind == "stepped":
        q, k, v = (torch.randn(b, 2 * n, h, d, generator=generator).to(dtype)[:, ::2] for _ in range(3))
    elif kind == "odd":
        q, k, v = (torch.randn(b, n, h, d + 5, generator=generator).to(dtype)[..., 3 : d + 3] for _ in range(3))
    elif kind == "unlike":  # every stride of the three its own
        q = torch.randn(b, n, h, d, generator=generator).to(dtype)
        k = torch.randn(b, h, n, d, generator=generator).to(dtype).transpose(1, 2)
        v = torch.randn(b, 2 * n, h, 2 * d, generator=generator).to(dtype)[:, ::2, :, d:]
    elif kind == "transposed channels":
        q, k, v = (torch.randn(b, n, d, h, generator=generator).to(dtype).transpose(2, 3) for _ in range(3))
    else:
        q, k, v = (torch.randn(1, n, 1, d, generator=generator).to(dtype).expand(b, n, h, d) for _ in range(3))
    compare(qkernels.attention(q, k, v), oracles.attention(f64(q), f64(k), f64(v)), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", ["static", "channels", "dynamic"])
def test_int8_results(kind, dtype):
    q, k, v = case(7, dtype, batch=1, queries=33, keys=50, heads=3, d=72)
    expected = oracles.attention(f64(q), f64(k), f64(v), None, True)
    codes = torch.full(q.shape, 99, dtype=torch.int8)
    # Weights are rounded to the input's dtype (half a unit in the last place, eps/2) while their sum is not, and the
    # dynamic rule reads results rounded to it once more: eps of the sum of magnitudes.
    magnitudes = oracles.attention(f64(q), f64(k), np.abs(f64(v)), None, True)
    error = np.full(q.shape, 1e-5) + (0 if dtype == F32 else torch.finfo(dtype).eps * magnitudes)
    if kind == "dynamic":
        scales = torch.full(q.shape[:2], -1.0)
        result = qkernels.attention(q, k, v, causal=True, out_dynamic=True, out=(codes, scales))
        assert result[0] is codes and result[1] is scales
        steps = np.abs(expected).max((2, 3)) / 127
        largest = error.max((2, 3))
        assert (np.abs(f64(scales) - steps) <= largest / 127).all()
        margin = (error + 1.5 * largest[:, :, None, None]) / steps[:, :, None, None]
        oracles.assert_near_ties(codes, expected / steps[:, :, None, None], margin)
        return
    step = torch.rand(q.shape[2:], generator=torch.Generator().manual_seed(1)) * 0.02 + 0.001
    step = step if kind == "channels" else step[0, 0]
    assert qkernels.attention(q, k, v, causal=True, out_scale=step, out=codes) is codes
    oracles.assert_near_ties(codes, expected / f64(step), error / f64(step) + 1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_query_that_may_attend_nothing_gets_zeros(dtype):
    q, k, v = case(0, dtype, batch=2, queries=7, keys=70, heads=2, d=16)
    mask = torch.ones(7, 70, dtype=torch.bool)
    mask[3], mask[4, :64] = False, False  # nothing at all; nothing in the first tiles
    y = qkernels.attention(q, k, v, mask)
    assert (y[:, 3] == 0).all() and (y[:, [0, 1, 2, 4, 5, 6]] != 0).all()
    added = torch.zeros(7, 70).masked_fill(~mask, -float("inf"))
    z = qkernels.attention(q, k, v, added)
    assert (z[:, 3] == 0).all()
    compare(z, f64(y), dtype)
    codes, scales = qkernels.attention(q, k, v, added, out_dynamic=True)
    assert (scales[:, 3] == 1).all() and (codes[:, 3] == 0).all()
    assert (qkernels.attention(q, k[:, :0], v[:, :0]) == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_masks_of_the_lowest_number_instead_of_infinity(dtype):
    """As transformers makes them: a query that may attend nothing then attends everything alike."""
    q, k, v = case(4, F32, batch=1, queries=5, keys=40, heads=1, d=16)
    mask = torch.zeros(5, 40).masked_fill(torch.rand(5, 40) > 0.6, torch.finfo(dtype).min)
    mask[2] = torch.finfo(dtype).min
    y = qkernels.attention(q, k, v, mask.to(dtype))
    compare(y[:, [0, 1, 3, 4]], oracles.attention(f64(q), f64(k), f64(v), f64(mask))[:, [0, 1, 3, 4]], F32)
    if dtype != F16:  # at 2^128 scores vanish in float32's steps; at -65504 they do not
        compare(y[:, 2], f64(v.mean(1)), F32)


def test_causal_sees_only_the_past():
    q, k, v = case(1, batch=1, queries=90, keys=90, heads=3, d=16)
    before = qkernels.attention(q, k, v, causal=True)
    k[:, 70:], v[:, 70:] = 1e3, -1e3
    after = qkernels.attention(q, k, v, causal=True)
    assert torch.equal(before[:, :70], after[:, :70]) and not torch.equal(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize("scale", [0.25, -0.25])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_scores_do_not_overflow(dtype, scale):
    q, k, v = case(2, dtype, batch=1, queries=6, keys=40, heads=1, d=16)
    y = qkernels.attention(q * 200, k * 200, v, scale=scale)  # thousands: the largest takes all
    expected = oracles.attention(f64(q * 200), f64(k * 200), f64(v), scale=scale)
    assert np.abs(f64(y) - expected).max() < (1e-3 if dtype == F32 else 2e-2)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_faults_stay_in_their_row_and_head(dtype):
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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_score_that_is_not_a_number_in_any_tile_reaches_its_row():
    q, k, v = case(6, batch=1, queries=4, keys=40, heads=1, d=16)
    for fault in (float("nan"), float("inf")):
        for key in (0, 17, 39):
            mask = torch.zeros(4, 40)
            mask[1, key] = fault
            y = qkernels.attention(q, k, v, mask)
            assert y[0, 1].isnan().all() and y[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_nothing_to_do(batch, queries):
    q, k = torch.empty(batch, queries, 2, 8), torch.empty(batch, 5, 2, 8)
    assert qkernels.attention(q, k, k).shape == q.shape
    codes, scales = qkernels.attention(q, k, k, out_dynamic=True)
    assert codes.shape == q.shape and scales.shape == (batch, queries)


def test_heads_too_wide_are_refused_with_the_reason():
    q = torch.randn(1, 2, 1, 129)
    assert file.attention_limits(q, q, q) == "takes torch.float32 heads of width 128 at most, not 129"
    assert file.attention_limits(*[q.half()] * 3) is None
    with pytest.raises(qkernels.FallbackError, match="width 128 at most"):
        qkernels.attention(q, q, q)


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded toward zero to the 10 bits that a tensor core reads: the worse of what chips do."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def _three_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b as the kernel's "tf32x3" does it."""
    a_high, b_high = _tf32(a), _tf32(b)
    a_low, b_low = _tf32(a - a_high), _tf32(b - b_high)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


@pytest.mark.parametrize("length", [50, 257, 729])
def test_three_tf32_products_are_within_the_contract(length):
    q, k, v = (t[0, :, 0] for t in case(length, F32, 1, length, length, 1, 64))
    weights = torch.softmax(_three_products(q, k.t()) * 64**-0.5, -1)
    y = _three_products(weights, v)[None, :, None]
    compare(y, f64(reference.attention(*(t[None, :, None] for t in (q, k, v)))), F32)
    one = (torch.softmax(_tf32(q) @ _tf32(k).t() * 64**-0.5, -1) @ v)[None, :, None]
    with pytest.raises(AssertionError):  # one product is not
        compare(one, f64(reference.attention(*(t[None, :, None] for t in (q, k, v)))), F32)
