"""The contract around the numbers: refusals, `out=`, tracing, threads, inference mode, registration."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import qkernels
from qkernels import Int4Weight, Int8Weight

X = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
CODES = torch.ones(3, 40, dtype=torch.int8)
W = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
W8, W4 = Int8Weight.quantize(W), Int4Weight.quantize(W, group=32)
P8, P4 = W8.pack("vnni64"), W4.pack("nibble64")
QKV = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(2))
S = torch.tensor(0.1)
STEPS = torch.full((3,), 0.1, requires_grad=True), torch.full((3,), 0.5, requires_grad=True)  # scales and offsets

REFUSALS = {
    "no tensor": (lambda: qkernels.quantize_per_token([1.0]), TypeError, "x must be a tensor, got list"),
    "dtype": (
        lambda: qkernels.quantize_per_token(X.double()),
        TypeError,
        "x must be float32 or bfloat16 or float16, got float64",
    ),
    "sparse": (lambda: qkernels.quantize_per_token(X.to_sparse()), TypeError, "dense tensor"),
    "no axis": (
        lambda: qkernels.quantize_per_token(torch.tensor(1.0)),
        ValueError,
        r"shape \[\.\.\., K\] with K >= 1, got \(\)",
    ),
    "no channels": (lambda: qkernels.quantize_per_token(torch.zeros(3, 0)), ValueError, "K >= 1"),
    "smooth shape": (
        lambda: qkernels.quantize_per_token(X, torch.ones(39)),
        ValueError,
        r"smooth must have shape \(40,\), got \(39,\)",
    ),
    "smooth dtype": (lambda: qkernels.quantize_per_token(X, torch.ones(40).int()), TypeError, "smooth must be float32"),
    "device": (
        lambda: qkernels.quantize_per_token(X, torch.ones(40, device="meta")),
        ValueError,
        "smooth is on meta but x is on cpu",
    ),
    "static shape": (
        lambda: qkernels.quantize_per_token(X, scale=torch.ones(3)),
        ValueError,
        "scale must be one number",
    ),
    "zero point alone": (lambda: qkernels.quantize_per_token(X, zero_point=3), ValueError, "zero_point is for static"),
    "zero point float": (
        lambda: qkernels.quantize_per_token(X, scale=S, zero_point=0.5),
        TypeError,
        "must be an integer",
    ),
    "images": (lambda: qkernels.quantize_patches(X, 2), ValueError, r"x must have shape \[B, C, H, W\] with C >= 1"),
    "image dtype": (lambda: qkernels.quantize_patches(QKV.double(), 2), TypeError, "x must be float32"),
    "patch": (lambda: qkernels.quantize_patches(QKV, (2, 2.5)), TypeError, r"patch must be one integer or two"),
    "patch size": (
        lambda: qkernels.quantize_patches(QKV, 4),
        ValueError,
        r"a patch of 4 x 4 does not fit into x of shape \(2, 5, 3, 8\)",
    ),
    "patch 0": (lambda: qkernels.quantize_patches(QKV, (1, 0)), ValueError, "a patch of 1 x 0 does not fit"),
    "patch smooth": (
        lambda: qkernels.quantize_patches(QKV, (3, 2), torch.ones(6)),
        ValueError,
        r"smooth must have shape \(30,\)",
    ),
    "eps": (lambda: qkernels.layer_norm_quantize(X, None, None, -1.0), ValueError, "eps must be at least 0"),
    "norm weight": (
        lambda: qkernels.layer_norm_quantize(X, torch.ones(3), None, 1e-5),
        ValueError,
        "weight must have shape",
    ),
    "float codes": (lambda: qkernels.int8_linear(X, S, W8), TypeError, "x must be int8, got float32"),
    "weight kind": (lambda: qkernels.int8_linear(CODES, S, W), TypeError, "weight must be an Int8Weight, got Tensor"),
    "inner size": (lambda: qkernels.int8_linear(CODES[:, :39], S, W8), ValueError, "its last axis must be 40"),
    "causal": (lambda: qkernels.attention(QKV, QKV, QKV, causal=1), TypeError, "causal must be True or False, got 1"),
    "eps kind": (lambda: qkernels.layer_norm_quantize(X, None, None, "1"), TypeError, "eps must be a number, got str"),
    "scale kind": (
        lambda: qkernels.fake_quantize(X, [0.1], None, -8, 7, "ste"),
        TypeError,
        "scale must be a number, got list",
    ),
    "axis kind": (
        lambda: qkernels.fake_quantize(X, S, None, -8, 7, "ste", axis=0.5),
        TypeError,
        "axis must be an integer or None, got 0.5",
    ),
    "sparse weight": (
        lambda: qkernels.int8_linear(CODES, S, replace(W8, scales=W8.scales.to_sparse())),
        TypeError,
        "weight.scales must be a dense tensor",
    ),
    "no weight codes": (
        lambda: qkernels.int8_linear(CODES, S, replace(W8, codes=None)),
        TypeError,
        "weight.codes must be a tensor, got NoneType",
    ),
    "K": (
        lambda: qkernels.int8_linear(
            torch.ones(1, 65537, dtype=torch.int8),
            S,
            Int8Weight(torch.ones(1, 65537, dtype=torch.int8), torch.ones(1), (1, 65537)),
        ),
        ValueError,
        "K = 65537 is over 65536",
    ),
    "x_scale shape": (
        lambda: qkernels.int8_linear(CODES, torch.ones(2), W8),
        ValueError,
        r"x_scale of shape \(2,\) does not fit",
    ),
    "x_scale dtype": (
        lambda: qkernels.int8_linear(CODES, torch.ones(3).half(), W8),
        TypeError,
        "x_scale must be float32",
    ),
    "activation": (
        lambda: qkernels.int8_linear(CODES, S, W8, activation="relu"),
        ValueError,
        "unknown activation 'relu'; known: None, 'gelu'",
    ),
    "bias": (lambda: qkernels.int8_linear(CODES, S, W8, torch.ones(40)), ValueError, r"bias must have shape \(24,\)"),
    "residual": (
        lambda: qkernels.int8_linear(CODES, S, W8, residual=torch.ones(24)),
        ValueError,
        r"residual must have shape \(3, 24\)",
    ),
    "out_scale": (
        lambda: qkernels.int8_linear(CODES, S, W8, out_scale=torch.ones(3)),
        ValueError,
        r"out_scale must have shape \(24,\)",
    ),
    "out_group": (lambda: qkernels.int8_linear(CODES, S, W8, out_group=64), ValueError, "out_group must be 128"),
    "both outs": (
        lambda: qkernels.int8_linear(CODES, S, W8, out_scale=S, out_group=128),
        ValueError,
        "excludes out_scale",
    ),
    "out_dtype": (
        lambda: qkernels.int8_linear(CODES, S, W8, out_dtype=torch.int8),
        TypeError,
        "for int8 give out_scale",
    ),
    "weight device": (
        lambda: qkernels.int8_linear(CODES.to("meta"), S.to("meta"), W8),
        ValueError,
        "weight is on cpu but x is on meta",
    ),
    "weight codes": (
        lambda: qkernels.int8_linear(CODES, S, replace(W8, codes=W8.codes[:8])),
        ValueError,
        r"must have torch.int8 codes of shape \(24, 40\), got torch.int8 of shape \(8, 40\)",
    ),
    "weight buffer": (
        lambda: qkernels.int8_linear(CODES, S, replace(P8, codes=P8.codes[:-1])),
        ValueError,
        r"in layout 'vnni64' must have torch.uint8 codes of shape \(2820,\)",
    ),
    "weight scales": (
        lambda: qkernels.int8_linear(CODES, S, replace(W8, scales=W8.scales.half())),
        ValueError,
        r"must have torch.float32 scales of shape \(24,\)",
    ),
    "weight layout": (
        lambda: qkernels.int8_linear(CODES, S, replace(W8, layout="rows")),
        ValueError,
        "unknown layout 'rows'",
    ),
    "weight parts": (
        lambda: qkernels.int8_linear(CODES, S, replace(W8, scales=W8.scales.to("meta"))),
        ValueError,
        "scales of shape",
    ),
    "int4 buffer": (
        lambda: qkernels.int4_linear(CODES, S, replace(P4, codes=P4.codes[1:])),
        ValueError,
        r"must have torch.uint8 codes of shape \(1280,\)",
    ),
    "int4 zeros": (
        lambda: qkernels.int4_linear(CODES, S, replace(W4, zeros=torch.ones(24, 1).half())),
        ValueError,
        r"must have torch.float16 zeros of shape \(24, 2\)",
    ),
    "int4 group": (
        lambda: qkernels.int4_linear(CODES, S, replace(W4, group=16)),
        ValueError,
        "groups of 16; they must be 32, 64, 128 or K = 40",
    ),
    "int4 kind": (
        lambda: qkernels.int4_linear(CODES, S, W8),
        TypeError,
        "weight must be an Int4Weight, got Int8Weight",
    ),
    "int4 no scale": (lambda: qkernels.int4_linear(CODES, None, W4), ValueError, "int8 x needs x_scale"),
    "int4 float scale": (lambda: qkernels.int4_linear(X, S, W4), ValueError, "float x must come without it"),
    "attention rank": (lambda: qkernels.attention(X, X, X), ValueError, r"q must be \[B, Lq, H, d\]"),
    "attention dtype": (lambda: qkernels.attention(QKV, QKV.half(), QKV), TypeError, "k must be float32, got float16"),
    "attention shape": (lambda: qkernels.attention(QKV, QKV[..., :4], QKV[..., :4]), ValueError, "k, v"),
    "attention batch": (lambda: qkernels.attention(QKV[:1], QKV, QKV), ValueError, "k, v"),
    "attention d": (
        lambda: qkernels.attention(QKV[..., :0], QKV[..., :0], QKV[..., :0]),
        ValueError,
        "heads of width 0",
    ),
    "mask": (
        lambda: qkernels.attention(QKV, QKV, QKV, torch.ones(4, 5)),
        ValueError,
        r"does not broadcast to \[B, H, Lq, Lk\] = \(2, 3, 5, 5\)",
    ),
    "mask dtype": (
        lambda: qkernels.attention(QKV, QKV, QKV, torch.ones(5, 5).int()),
        TypeError,
        "mask must be bool or float32",
    ),
    "mask rank": (
        lambda: qkernels.attention(QKV, QKV, QKV, torch.ones(1, 1, 1, 5, 5)),
        ValueError,
        "does not broadcast",
    ),
    "attention outs": (
        lambda: qkernels.attention(QKV, QKV, QKV, out_scale=S, out_dynamic=True),
        ValueError,
        "give one of them",
    ),
    "attention scale": (
        lambda: qkernels.attention(QKV, QKV, QKV, out_scale=torch.ones(8)),
        ValueError,
        r"one number or \[H, d\]",
    ),
    "running shape": (
        lambda: qkernels.channel_absmax(X, torch.zeros(39)),
        ValueError,
        "running must be contiguous of shape",
    ),
    "running dtype": (lambda: qkernels.channel_absmax(X, torch.zeros(40).half()), TypeError, "running must be float32"),
    "running stride": (
        lambda: qkernels.channel_absmax(X, torch.zeros(80)[::2]),
        ValueError,
        "running must be contiguous",
    ),
    "running and out": (
        lambda: qkernels.channel_absmax(X, torch.zeros(40), out=torch.zeros(40)),
        ValueError,
        "out has no meaning",
    ),
    "strength": (
        lambda: qkernels.smooth_scale(torch.ones(4), torch.ones(4), 1.5),
        ValueError,
        r"strength must lie in \[0, 1\]",
    ),
    "maxima": (
        lambda: qkernels.smooth_scale(torch.ones(4), torch.ones(5), 0.5),
        ValueError,
        "weight_absmax must have shape",
    ),
    "estimator": (
        lambda: qkernels.fake_quantize(X, S, None, -8, 7, "lsq+"),
        ValueError,
        "unknown estimator 'lsq\\+'; known: 'ste', 'lsq', 'lsq_plus'",
    ),
    "bounds": (lambda: qkernels.fake_quantize(X, S, None, 7, -8, "ste"), ValueError, "qmin < qmax"),
    "delta": (lambda: qkernels.fake_quantize(X, S, None, -8, 7, "ste", delta=0.1), ValueError, "delta has no meaning"),
    "negative delta": (
        lambda: qkernels.fake_quantize(X, S, None, -8, 7, "ewgs", delta=-0.1),
        ValueError,
        "delta must be at least 0",
    ),
    "zero point without one": (
        lambda: qkernels.fake_quantize(X, S, 1, 0, 7, "pact"),
        ValueError,
        "'pact' has no zero_point",
    ),
    "zero point that is no integer": (
        lambda: qkernels.fake_quantize(X, S, 0.5, -8, 7, "lsq"),
        TypeError,
        "zero_point must be an integer for estimator 'lsq'",
    ),
    "offset of integers": (
        lambda: qkernels.fake_quantize(X, S, torch.tensor(1), -8, 7, "lsq_plus"),
        TypeError,
        "zero_point must be float32",
    ),
    "offsets": (
        lambda: qkernels.fake_quantize(X, S, torch.ones(3), -8, 7, "ewgs"),
        ValueError,
        "scale's shape",
    ),
    "axis": (
        lambda: qkernels.fake_quantize(X, torch.ones(3), None, -8, 7, "ste", axis=2),
        ValueError,
        "axis 2 is not an axis",
    ),
    "axis scale": (
        lambda: qkernels.fake_quantize(X, torch.ones(3), None, -8, 7, "ste", axis=1),
        ValueError,
        r"must have shape \(40,\)",
    ),
    "which axis": (
        lambda: qkernels.fake_quantize(X, torch.ones(3), None, -8, 7, "ste"),
        ValueError,
        "needs axis or group",
    ),
    "group scale": (
        lambda: qkernels.fake_quantize(X, torch.ones(3, 1), None, -8, 7, "ste", group=32),
        ValueError,
        r"must have shape \(3, 2\)",
    ),
    "group and axis": (
        lambda: qkernels.fake_quantize(X, torch.ones(3), None, -8, 7, "ste", axis=0, group=32),
        ValueError,
        "exclude each other",
    ),
    "group 0": (
        lambda: qkernels.fake_quantize(X, torch.ones(3), None, -8, 7, "ste", group=0),
        ValueError,
        "group must be at least 1",
    ),
    "zero points": (
        lambda: qkernels.fake_quantize(X, S, torch.ones(3).int(), -8, 7, "ste"),
        ValueError,
        "scale's shape",
    ),
    "width": (
        lambda: qkernels.hadamard_transform(torch.zeros(2, 6)),
        ValueError,
        "no Hadamard matrix of width 6 is known",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


OUTS = {
    "one for two": ((torch.empty(3, 40, dtype=torch.int8),), TypeError, "out must be 2 tensors"),
    "not a pair": (torch.empty(3, 40, dtype=torch.int8), TypeError, "out must be 2 tensors, got Tensor"),
    "dtype": ((torch.empty(3, 40), torch.empty(3)), ValueError, r"out must be int8 of shape \(3, 40\)"),
    "shape": ((torch.empty(3, 40, dtype=torch.int8), torch.empty(4)), ValueError, r"float32 of shape \(3,\)"),
    "stride": ((torch.empty(40, 3, dtype=torch.int8).t(), torch.empty(3)), ValueError, "must be contiguous"),
    "device": ((torch.empty(3, 40, dtype=torch.int8, device="meta"), torch.empty(3)), ValueError, "on cpu"),
}


@pytest.mark.parametrize("name", OUTS)
def test_out_is_checked(name):
    out, error, message = OUTS[name]
    with pytest.raises(error, match=message):
        qkernels.quantize_per_token(X, out=out)


BUFFER = torch.zeros(4 * 48)
OVERLAPS = {
    "the same": lambda x: (x, x),
    "by a part": lambda x: (x, BUFFER[8 : 8 + 2 * 48].view(2, 48)),
    "by a value": lambda x: (x, BUFFER[2 * 48 - 1 : 4 * 48 - 1].view(2, 48)),
    "a strided input": lambda x: (BUFFER.view(2, 96)[:, ::2], BUFFER[:96].view(2, 48)),
}


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("raw", [False, True])
def test_out_may_overlap_nothing(backend, name, raw):
    x, out = OVERLAPS[name](BUFFER[: 2 * 48].view(2, 48))
    with pytest.raises(ValueError, match=r"out of shape \(2, 48\) overlaps an argument in memory") as caught:
        if raw:
            torch.ops.qkernels.hadamard_transform_out(x, False, out=[out])
        else:
            qkernels.hadamard_transform(x, out=out)
    assert "\n" not in str(caught.value)
    beside = BUFFER[96:].view(2, 48)  # touches, and does not overlap
    assert qkernels.hadamard_transform(BUFFER[:96].view(2, 48), out=beside) is beside


def test_two_outs_may_not_overlap():
    room = torch.zeros(200, dtype=torch.uint8)
    codes, scales = room[:120].view(torch.int8).view(3, 40), room[116:128].view(torch.float32)
    with pytest.raises(ValueError, match="overlaps the other out"):
        qkernels.quantize_per_token(X, out=(codes, scales))
    with pytest.raises(ValueError, match="running of shape .* overlaps an argument"):
        qkernels.channel_absmax(BUFFER.view(4, 48), BUFFER[:48])
    weight = Int8Weight(W8.codes, W8.scales, W8.shape)
    with pytest.raises(ValueError, match="overlaps an argument"):
        qkernels.int8_linear(CODES[:1], S, weight, out=W8.scales.view(1, 24))


NOTHING = (None, None, None, None, None, None, torch.float32)
RAW = {
    "short codes": (
        lambda o: o.int8_linear(CODES, S, P8.codes[:-1], P8.scales, 24, 40, "vnni64", *NOTHING),
        r"must have torch.uint8 codes of shape \(2820,\)",
    ),
    "short scales": (
        lambda o: o.int8_linear(CODES, S, P8.codes, P8.scales[:8], 24, 40, "vnni64", *NOTHING),
        r"scales of shape \(24,\)",
    ),
    "a larger n": (
        lambda o: o.int8_linear(CODES, S, P8.codes, P8.scales, 2400, 40, "vnni64", *NOTHING),
        "must have torch.uint8 codes",
    ),
    "short bias": (
        lambda o: o.int8_linear(CODES, S, P8.codes, P8.scales, 24, 40, "vnni64", X[0, :3], *NOTHING[1:]),
        r"bias must have shape \(24,\)",
    ),
    "short x_scale": (
        lambda o: o.int8_linear(CODES, torch.ones(2), P8.codes, P8.scales, 24, 40, "vnni64", *NOTHING),
        "x_scale of shape",
    ),
    "another k": (
        lambda o: o.int4_linear(CODES[:, :39], S, P4.codes, P4.scales, None, 24, 40, 32, "nibble64", *NOTHING),
        "its last axis must be 40",
    ),
    "short zeros": (
        lambda o: o.int4_linear(CODES, S, P4.codes, P4.scales, P4.scales[:, :1], 24, 40, 32, "nibble64", *NOTHING),
        "zeros of shape",
    ),
    "short smooth": (lambda o: o.quantize_per_token(X, X[0, :39], None, None), "smooth must have shape"),
    "a large patch": (lambda o: o.quantize_patches(QKV, 400, 2, None, None, None), "does not fit"),
    "no row": (lambda o: o.quantize_per_token(S, None, None, None), r"x must have shape \[\.\.\., K\]"),
    "short norm": (
        lambda o: o.layer_norm_quantize(X, X[0, :3], None, 1e-5, None, None, None),
        "weight must have shape",
    ),
    "short keys": (
        lambda o: o.attention(QKV, QKV[:1], QKV, None, False, 0.1, None, False),
        "attention: q must be",
    ),
    "short mask": (
        lambda o: o.attention(QKV, QKV, QKV, torch.ones(2, 5), False, 0.1, None, False),
        "does not broadcast",
    ),
    "another device": (
        lambda o: o.attention(QKV, QKV.to("meta"), QKV, None, False, 0.1, None, False),
        "attention: tensors are on cpu and on meta",
    ),
    "short maxima": (lambda o: o.channel_absmax_(X, torch.zeros(39)), "running must be contiguous of shape"),
    "short weight maxima": (lambda o: o.smooth_scale(X[0], X[0, :3], 0.5), "weight_absmax must have shape"),
    "short scales of groups": (
        lambda o: o.fake_quantize(X, torch.ones(3, 1), None, -8, 7, "lsq", None, 32, 1.0, 0.0),
        r"scale must have shape \(3, 2\)",
    ),
    "short gradient": (
        lambda o: o.fake_quantize_backward(X[:1], X, S, None, -8, 7, "lsq", None, None, 1.0, 0.0),
        "grad must have x's shape",
    ),
    "an odd width": (lambda o: o.hadamard_transform(X[:, :39], False), "no Hadamard matrix of width 39"),
    "short out": (
        lambda o: o.quantize_per_token_out(X, None, None, None, out=[CODES.clone(), torch.empty(2)]),
        r"out must be float32 of shape \(3,\)",
    ),
    "one out of two": (
        lambda o: o.quantize_per_token_out(X, None, None, None, out=[CODES.clone()]),
        "out must be 2 tensors",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_ops_check_every_size(name):
    """`torch.ops.qkernels` is what traced graphs call, with whatever they are given."""
    call, message = RAW[name]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(torch.ops.qkernels)
    assert "\n" not in str(caught.value)


def test_a_traced_graph_checks_what_it_is_given():
    graph = make_fx(lambda x, codes: qkernels.int8_linear(x, S, replace(P8, codes=codes)))(CODES, P8.codes)
    assert torch.equal(graph(CODES, P8.codes), qkernels.int8_linear(CODES, S, P8))
    with pytest.raises(ValueError, match="codes of shape"):
        graph(CODES, P8.codes[:64])


@pytest.mark.parametrize("zero", [2**23, 2**30, 2**31, 2**40])
def test_zero_points_beyond_every_code_saturate(backend, zero):
    codes, scales = qkernels.quantize_per_token(X)
    weight = W8 if backend == "reference" else P8
    for sign in (1, -1):
        for point in (sign * zero, torch.tensor(sign * zero)):
            found = qkernels.int8_linear(codes, scales, weight, out_scale=0.1, out_zero_point=point)
            assert (found == sign * 127).all()
            assert (qkernels.quantize_per_token(X, scale=0.1, zero_point=point)[0] == sign * 127).all()


def test_out_counts_as_a_change_in_place():
    """Autograd and caches read a tensor's version to see that it was written."""
    codes, scales = torch.empty(3, 40, dtype=torch.int8), torch.empty(3)
    running = torch.zeros(40)
    before = codes._version, scales._version, running._version
    qkernels.quantize_per_token(X, out=(codes, scales))
    qkernels.channel_absmax(X, running)
    assert all(new > old for new, old in zip((codes._version, scales._version, running._version), before, strict=True))


def everything(x, codes8, scales8, codes4, scales4, bias, step, running):
    """Every op in one function; `x` float `[B, L, 48]`."""
    w8 = Int8Weight(codes8, scales8, (48, 48))
    w4 = Int4Weight(codes4, scales4, None, (48, 48), 32)
    patches, patch_scales = qkernels.quantize_patches(x[:, None], (2, 5), scale=step)
    codes, scale = qkernels.layer_norm_quantize(x, bias, bias, 1e-5)
    q, k, v = (qkernels.int8_linear(codes, scale, w8, bias).unflatten(-1, (3, 16)) for _ in range(3))
    codes, scale = qkernels.attention(q, k, v, causal=True, out_dynamic=True)
    y = qkernels.int4_linear(codes.flatten(-2), scale, w4, bias, "gelu", x)
    codes, scale = qkernels.int8_linear(*qkernels.quantize_per_token(y), w8, out_group=128)
    qkernels.channel_absmax(y, running)
    smooth = qkernels.smooth_scale(qkernels.channel_absmax(y), running, 0.5)
    static, rows = qkernels.quantize_per_token(y, 1 / smooth, step, 3)
    z = qkernels.hadamard_transform(qkernels.fake_quantize(y, step, None, -8, 7, "lsq"), transpose=True)
    buffer = torch.empty_like(z)
    qkernels.hadamard_transform(z, out=buffer)
    return codes, scale, static, rows, z, buffer, patches, patch_scales


def arguments(batch=2, length=6):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 48, generator=generator)
    w8, w4 = Int8Weight.quantize(weight), Int4Weight.quantize(weight, group=32)
    x = torch.randn(batch, length, 48, generator=generator)
    return (
        x,
        w8.codes,
        w8.scales,
        w4.codes,
        w4.scales,
        torch.randn(48, generator=generator),
        torch.tensor(0.1),
        torch.zeros(48),
    )


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, monkeypatch):
    monkeypatch.delenv("QKERNELS_STRICT", raising=False)  # canonical weights: the linear ops may fall back here
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch, length in ((2, 6), (3, 9)) if dynamic else ((2, 6),):
            eager, traced = arguments(batch, length), arguments(batch, length)
            assert equal(everything(*eager), compiled(*traced))
            assert torch.equal(eager[-1], traced[-1])  # the running maxima, updated in place


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler needs g++")
def test_compiles_with_inductor():
    def block(x, codes, scales, layer):
        weight = Int8Weight(codes, scales, (48, 48), layer)
        y = qkernels.int8_linear(*qkernels.layer_norm_quantize(x, None, None, 1e-5), weight, activation="gelu")
        out = torch.empty_like(y)
        qkernels.hadamard_transform(y * 2, out=out)
        return out + 1

    x, weight = torch.randn(2, 6, 48), qkernels.pack(Int8Weight.quantize(torch.randn(48, 48)))
    torch._dynamo.reset()
    y = torch.compile(block, fullgraph=True)(x, weight.codes, weight.scales, weight.layout)
    assert torch.allclose(y, block(x, weight.codes, weight.scales, weight.layout), atol=1e-5)


@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus", "ewgs", "pact"])
def test_gradients_through_a_compiled_function(estimator):
    offset, delta = estimator in ("lsq_plus", "ewgs"), 0.2 if estimator == "ewgs" else 0.0

    def loss(x, scale, zero):
        y = qkernels.fake_quantize(x, scale, zero if offset else None, -3, 4, estimator, delta=delta)
        return qkernels.hadamard_transform(y).square().sum()

    torch._dynamo.reset()
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, scale, zero = (
            torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).requires_grad_(),
            torch.tensor(0.3, requires_grad=True),
            torch.tensor(0.1, requires_grad=True),
        )
        run(x, scale, zero).backward()
        grads.append((x.grad, scale.grad, zero.grad) if offset else (x.grad, scale.grad))
    assert equal(*grads) and all((grad != 0).any() for grad in grads[0])


def test_registration():
    """torch's own check of schemas, fake rules and functionalization, with fixed and symbolic sizes."""
    ops, w8, q = torch.ops.qkernels, W8, QKV
    tail = (None, None, None, None, None, None, torch.float32)
    cases = [
        (ops.quantize_per_token.default, (X, None, S, None), {}),
        (ops.quantize_per_token_out.default, (X, None, None, None), {"out": [CODES.clone(), torch.empty(3)]}),
        (ops.quantize_patches.default, (QKV, 2, 3, None, None, None), {}),
        (ops.layer_norm_quantize.default, (X, None, None, 1e-5, None, None, None), {}),
        (ops.int8_linear.default, (CODES, S, w8.codes, w8.scales, 24, 40, "canonical", *tail), {}),
        (
            ops.int8_linear.default,
            (CODES, S, w8.codes, w8.scales, 24, 40, "canonical", *tail[:5], 128, torch.float32),
            {},
        ),
        (ops.int4_linear.default, (X, None, W4.codes, W4.scales, None, 24, 40, 32, "canonical", *tail), {}),
        (ops.attention.default, (q, q, q, None, True, 0.3, None, True), {}),
        (ops.channel_absmax.default, (X,), {}),
        (ops.channel_absmax_.default, (X, torch.zeros(40)), {}),
        (ops.smooth_scale.default, (torch.ones(4), torch.ones(4), 0.5), {}),
        (ops.fake_quantize.default, (X.clone().requires_grad_(), S, None, -8, 7, "lsq", None, None, 1.0, 0.0), {}),
        (ops.fake_quantize.default, (X.clone().requires_grad_(), *STEPS, 0, 15, "ewgs", 0, None, 1.0, 0.1), {}),
        (ops.fake_quantize_backward.default, (X, X, *STEPS, 0, 15, "lsq_plus", 0, None, 1.0, 0.0), {}),
        (ops.fake_quantize_backward.default, (X, X, S, None, 0, 15, "dorefa", None, None, 1.0, 0.0), {}),
        (ops.hadamard_transform.default, (X.clone().requires_grad_(), False), {}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, args, kwargs in cases:
            torch.library.opcheck(
                op, args, kwargs, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            )


def test_meta_tensors_give_shapes():
    x = X.to("meta")
    codes, scales = qkernels.layer_norm_quantize(x, None, None, 1e-5)
    assert codes.is_meta and codes.shape == (3, 40) and scales.shape == (3,)
    w = Int8Weight(W8.codes.to("meta"), W8.scales.to("meta"), W8.shape)
    codes, scales = qkernels.int8_linear(codes, scales, w, out_group=128)
    assert codes.shape == (3, 24) and scales.shape == (3, 1) and scales.is_meta


def test_inference_mode(backend):
    """Tensors made under inference mode work, and what is cached there works outside."""
    with torch.inference_mode():
        inside = (*qkernels.quantize_per_token(X), qkernels.hadamard_transform(X), qkernels.channel_absmax(X))
        running = torch.zeros(40)
        qkernels.channel_absmax(X, running)
    outside = (*qkernels.quantize_per_token(X), qkernels.hadamard_transform(X), qkernels.channel_absmax(X))
    assert equal(inside, outside) and torch.equal(running, outside[-1])
    leaf = X.clone().requires_grad_()
    qkernels.hadamard_transform(leaf).sum().backward()
    assert leaf.grad is not None


def test_codes_do_not_ask_for_gradients():
    leaf = X.clone().requires_grad_()
    codes, _ = qkernels.quantize_per_token(leaf)
    assert not codes.requires_grad


def work(seed):
    """Every native op with a workspace, at sizes that differ by seed."""
    generator = torch.Generator().manual_seed(seed)
    width = (48, 192, 768)[seed % 3]
    x = torch.randn(5 + 7 * (seed % 5), width, generator=generator)
    q = torch.randn(2, 4 + seed % 9, 3, 16, generator=generator)
    leaf, scale = x.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
    qkernels.fake_quantize(leaf, scale, None, -8, 7, "lsq").square().sum().backward()
    codes, steps = qkernels.quantize_per_token(x)
    w = torch.randn(70 + seed, width, generator=generator)
    return (
        qkernels.int8_linear(codes, steps, qkernels.pack(Int8Weight.quantize(w)), activation="gelu"),
        qkernels.int4_linear(codes, steps, qkernels.pack(Int4Weight.quantize(w))),
        qkernels.int4_linear(x, None, qkernels.pack(Int4Weight.quantize(w))),
        *qkernels.layer_norm_quantize(x, None, None, 1e-5),
        *qkernels.attention(q, q, q, out_dynamic=True),
        qkernels.attention(q, q, q),
        qkernels.hadamard_transform(x),
        scale.grad,
    )


def test_several_python_threads_at_once(backend):
    expected = [work(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(work, list(range(12)) * 2), expected * 2, strict=True):
            assert equal(found, wanted)


def test_results_do_not_depend_on_the_number_of_threads(backend):
    generator = torch.Generator().manual_seed(0)
    # An odd share for a thread shifts the pairs in which rows are worked on. Some rows have first guesses of their
    # mean that are off, beside rows where they are not.
    x = torch.randn(303, 768, generator=generator)
    x[::3] += 50.0
    x[::6, [192, 384, 767]] = 500.0
    x[3, 5] = 1e4
    q = torch.randn(3, 33, 4, 32, generator=generator)
    w = torch.randn(200, 768, generator=generator)
    w8, w4 = qkernels.pack(Int8Weight.quantize(w)), qkernels.pack(Int4Weight.quantize(w))
    results, before = [], torch.get_num_threads()
    try:
        for count in range(1, 9):
            torch.set_num_threads(count)
            found = [*qkernels.quantize_per_token(x), *qkernels.layer_norm_quantize(x, None, None, 1e-5)]
            found += qkernels.quantize_patches(x.view(3, 101, 24, 32), (5, 7))
            found += [
                qkernels.channel_absmax(x),
                qkernels.hadamard_transform(x),
                qkernels.fake_quantize(x, 0.1, None, -8, 7, "ste"),
            ]
            if backend != "reference":  # torch's float64 products are not ordered by contract
                found += [qkernels.attention(q, q, q), *qkernels.attention(q, q, q, out_dynamic=True)]
                found += [qkernels.int8_linear(found[0], found[1], w8), qkernels.int4_linear(found[0], found[1], w4)]
                found += [qkernels.int4_linear(x, None, w4)]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    assert all(equal(results[0], found) for found in results[1:])


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_zero_rows_give_zero_rows(backend, lead):
    x, codes, scale = X[:0].expand(*lead, 40), CODES[:0].expand(*lead, 40), torch.ones(lead)
    bias = torch.zeros(24)
    assert [t.shape for t in qkernels.quantize_per_token(x)] == [(*lead, 40), lead]
    assert [t.shape for t in qkernels.layer_norm_quantize(x, None, None, 1e-5)] == [(*lead, 40), lead]
    assert [t.shape for t in qkernels.quantize_patches(QKV[:0], (3, 2))] == [(0, 4, 30), (0, 4)]
    for weight in (W8, P8) if backend == "reference" else (P8,):
        assert qkernels.int8_linear(codes, scale, weight, bias).shape == (*lead, 24)
        assert qkernels.int8_linear(codes, scale, weight, out_scale=0.1).dtype == torch.int8
        assert [t.shape for t in qkernels.int8_linear(codes, scale, weight, out_group=128)] == [(*lead, 24), (*lead, 1)]
    for weight in (W4, P4) if backend == "reference" else (P4,):
        assert qkernels.int4_linear(codes, scale, weight, bias).shape == (*lead, 24)
        assert qkernels.int4_linear(x, None, weight, bias).shape == (*lead, 24)
    q = torch.empty(*lead, 4, 2, 8) if len(lead) == 1 else torch.empty(*lead, 2, 8)
    assert qkernels.attention(q, q, q).shape == q.shape
    assert [t.shape for t in qkernels.attention(q, q, q, out_dynamic=True)] == [q.shape, q.shape[:2]]
    assert torch.equal(qkernels.channel_absmax(x), torch.zeros(40))
    assert qkernels.hadamard_transform(x).shape == x.shape
    assert qkernels.fake_quantize(x, 0.1, None, -8, 7, "ste").shape == x.shape


def test_bounds_of_fake_quantize_are_integers():
    with pytest.raises(ValueError, match="qmin and qmax must be integers"):
        qkernels.fake_quantize(X, 0.1, None, -8.5, 7, "ste")


def test_public_names_are_documented():
    for name in qkernels.__all__:
        assert (getattr(qkernels, name).__doc__ or "").strip(), name
