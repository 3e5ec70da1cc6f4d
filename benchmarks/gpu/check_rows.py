"""Checks of the ops on rows of values: quantization, statistics, fake quantization, rotation. Outputs are poisoned."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import qkernels
from qkernels.contract import ESTIMATORS

from . import oracle
from .inputs import FLOATS, Case, Inputs, written
from .oracle import require

ROWS = [(1, 1), (1, 768), (3, 7), (37, 1000), (2, 5, 333), (800, 768), (257, 1024), (129, 4096), (5, 16384)]
TINY_ROWS = [(1, 1), (3, 7), (2, 5, 33), (17, 128)]


def strided(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    x = inputs.randn(6, 40, dtype=dtype)
    return {
        "every other row": x[::2],
        "columns": inputs.randn(33, 6, dtype=dtype).T,
        "shifted": x[:, 3:36],
        "expanded": x[:1].expand(5, 40),
        "three axes": inputs.randn(3, 40, 4, dtype=dtype).transpose(1, 2),
    }


def quantize_per_token(inputs: Inputs) -> Iterator[Case]:
    def check(x: Tensor, smooth: Tensor | None, scale: float | None, zero: int | None) -> None:
        codes, scales = inputs.poison(*x.shape, dtype=torch.int8), inputs.poison(*x.shape[:-1])
        qkernels.quantize_per_token(x, smooth, scale, zero, out=(codes, scales))
        y = x.double() if smooth is None else oracle.rounded(x.double() * smooth.double())
        want, steps = oracle.quantize(y, scale, zero or 0)
        written(codes)
        oracle.equal(codes, want, "codes")
        oracle.equal(scales, steps, "scales")

    for shape in inputs.shapes(ROWS, TINY_ROWS):
        for dtype in FLOATS:
            x, smooth = inputs.randn(*shape, dtype=dtype) * 3, inputs.rand(shape[-1]) + 0.5
            for name, rest in {
                "plain": (None, None, None),
                "smooth": (smooth, None, None),
                "static": (smooth, 0.05, 3),
            }.items():
                yield f"{shape} {dtype} {name}", lambda x=x, rest=rest: check(x, *rest)
    for name, x in strided(inputs, torch.float32).items():
        yield name, lambda x=x: check(x, None, None, None)
    bad = inputs.randn(6, 50)
    bad[1, 7], bad[2, 49], bad[3, 0], bad[4], bad[5] = float("nan"), float("inf"), -float("inf"), 0, 1e-38
    yield "NaN, Inf, zero and tiny rows", lambda: check(bad, None, None, None)
    yield "NaN rows, static", lambda: check(bad, None, 0.1, None)
    yield "no rows", lambda: check(inputs.randn(0, 16), None, None, None)


def quantize_patches(inputs: Inputs) -> Iterator[Case]:
    def check(x: Tensor, patch: tuple[int, int]) -> None:
        want, steps = oracle.quantize(oracle.patches(x.double(), *patch))
        codes, scales = inputs.poison(*want.shape, dtype=torch.int8), inputs.poison(*want.shape[:-1])
        qkernels.quantize_patches(x, patch, out=(codes, scales))
        written(codes)
        oracle.equal(codes, want, "codes")
        oracle.equal(scales, steps, "scales")

    full = [(2, 3, 224, 224, 32, 32), (2, 3, 224, 224, 14, 14), (1, 3, 37, 50, 16, 7), (3, 1, 8, 8, 8, 8)]
    for *shape, height, width in inputs.shapes(full, [(1, 3, 9, 13, 4, 3), (2, 1, 8, 8, 8, 8)]):
        for dtype in FLOATS:
            x = inputs.randn(*shape, dtype=dtype)
            yield f"{tuple(shape)} {height}x{width} {dtype}", lambda x=x, p=(height, width): check(x, p)
            channels_last = x.contiguous(memory_format=torch.channels_last)
            yield f"{tuple(shape)} channels last", lambda x=channels_last, p=(height, width): check(x, p)


def layer_norm_quantize(inputs: Inputs) -> Iterator[Case]:
    def check(x: Tensor, weight: Tensor, bias: Tensor, smooth: Tensor | None, scale: float | None) -> None:
        codes, scales = inputs.poison(*x.shape, dtype=torch.int8), inputs.poison(*x.shape[:-1])
        qkernels.layer_norm_quantize(x, weight, bias, 1e-5, smooth, scale, out=(codes, scales))
        y, terms = oracle.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
        if smooth is not None:
            y, terms = y * smooth.double(), terms * smooth.double().abs()
        steps = y.abs().amax(-1) / 127 if scale is None else torch.full_like(scales, scale).double()
        written(codes)
        require(((scales.double() - steps).abs() <= 1e-5 * steps).all(), "a scale is off by more than 1e-5")
        error = 1e-5 * (terms / steps[..., None]).clamp(min=1)
        oracle.near_codes(codes, y / steps[..., None], error, "codes")

    for shape in inputs.shapes([s for s in ROWS if s[-1] > 1], [s for s in TINY_ROWS if s[-1] > 1]):
        weight, bias, smooth = inputs.rand(shape[-1]) + 0.5, inputs.randn(shape[-1]), inputs.rand(shape[-1]) + 0.5
        for dtype, (s, scale) in zip(FLOATS, [(None, None), (smooth, None), (smooth, 0.03)], strict=True):
            x = inputs.randn(*shape, dtype=dtype) * 2 + 0.5
            yield f"{shape} {dtype}", lambda x=x, w=weight, b=bias, s=s, c=scale: check(x, w, b, s, c)
    for name, x in strided(inputs, torch.float32).items():
        w, b = inputs.rand(x.shape[-1]) + 0.5, inputs.randn(x.shape[-1])
        yield name, lambda x=x, w=w, b=b: check(x, w, b, None, None)

    def bad() -> None:
        x = inputs.randn(4, 40)
        x[1, 3], x[2, 0] = float("nan"), float("inf")
        codes, scales = qkernels.layer_norm_quantize(x, None, None, 1e-5)
        require(scales.isnan().tolist() == [False, True, True, False], "NaN rows must have scale NaN")
        require(not codes[1:3].any(), "NaN rows must have codes 0")

    yield "NaN and Inf rows", bad


def channel_absmax(inputs: Inputs) -> Iterator[Case]:
    def check(x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        want = rows.double().abs().amax(0) if len(rows) else torch.zeros(x.shape[-1], device=x.device)
        out = inputs.poison(x.shape[-1])
        qkernels.channel_absmax(x, out=out)
        oracle.equal(out, want, "maxima")
        running = inputs.rand(x.shape[-1]) * 3
        want = torch.where(want.isnan(), want, torch.maximum(running.double(), want))
        qkernels.channel_absmax(x, running)
        oracle.equal(running, want, "running maxima")

    for shape in inputs.shapes([*ROWS, (50000, 768)], TINY_ROWS):
        for dtype in FLOATS:
            x = inputs.randn(*shape, dtype=dtype)
            yield f"{shape} {dtype}", lambda x=x: check(x)
    for name, x in strided(inputs, torch.bfloat16).items():
        yield name, lambda x=x: check(x)
    bad = inputs.randn(7, 20)
    bad[3, 4], bad[6, 5] = float("nan"), -float("inf")
    yield "NaN wins", lambda: check(bad)
    yield "no rows", lambda: check(inputs.randn(0, 9))


def smooth_scale(inputs: Inputs) -> Iterator[Case]:
    def check(k: int, strength: float) -> None:
        a, w = inputs.rand(k) * 4, inputs.rand(k)
        a[0], w[-1] = 0, 0
        out = inputs.poison(k)
        qkernels.smooth_scale(a, w, strength, out=out)
        want = a.double() ** strength / w.double() ** (1 - strength)
        want[0], want[-1] = 1, 1
        require(((out.double() - want).abs() <= 1e-6 * want).all(), "a factor is off by more than 1e-6")

    for k, strength in itertools.product((2, 768, 4097), (0.0, 0.3, 0.5, 1.0)):
        yield f"{k} {strength}", lambda k=k, s=strength: check(k, s)


def hadamard_transform(inputs: Inputs) -> Iterator[Case]:
    def check(shape: tuple[int, ...], dtype: torch.dtype, transpose: bool) -> None:
        x, out = inputs.randn(*shape, dtype=dtype), inputs.poison(*shape, dtype=dtype)
        qkernels.hadamard_transform(x, transpose, out=out)
        matrix = oracle.hadamard(shape[-1], x.device)
        want = x.double() @ (matrix if transpose else matrix.T)
        bound = 1e-5 * (float(x.abs().max()) if x.numel() else 0.0) + (
            0 if dtype == torch.float32 else oracle.ULP[dtype] * want.abs()
        )
        require(((out.double() - want).abs() <= bound).all(), "a value is off by more than 1e-5 of the largest")

    full = [(37, 64), (5, 768), (3, 3072), (9, 1152), (4, 1280), (1, 1), (257, 1024), (2, 2, 192), (0, 64)]
    for shape in inputs.shapes(full, [(3, 16), (2, 12), (1, 1), (0, 16)]):
        for dtype, transpose in itertools.product(FLOATS, (False, True)):
            yield f"{shape} {dtype} {transpose}", lambda s=shape, d=dtype, t=transpose: check(s, d, t)


def fake_quantize(inputs: Inputs) -> Iterator[Case]:
    """`ste` and `lsq` against formulas; further estimators forward and backward against the reference, which the CPU
    tests compare with finite differences."""

    def check(shape: tuple[int, ...], dtype: torch.dtype, axis: int | None, group: int | None, estimator: str) -> None:
        count = (
            ()
            if axis is None and group is None
            else (shape[axis],)
            if group is None
            else (*shape[:-1], -(-shape[-1] // group))
        )
        x = (inputs.randn(*shape) * 2).to(dtype).requires_grad_()
        scale = (inputs.rand(*count) * 0.3 + 0.05).requires_grad_()
        grad = inputs.randn(*shape).to(dtype)
        if estimator not in ("ste", "lsq"):
            return against_reference(x, scale, grad, axis, group, estimator)
        y = qkernels.fake_quantize(x, scale, None, -8, 7, estimator, axis, group, grad_scale=0.5)
        y.backward(grad)
        spread = per_element(scale.detach().double(), shape, axis, group)
        want, dx, terms = oracle.fake_quantize(x.detach(), spread, torch.zeros_like(spread), -8, 7, grad)
        oracle.equal(y.detach(), want.float().to(dtype), "values")
        oracle.equal(x.grad, dx.to(dtype), "gradient of x")  # type: ignore[arg-type]
        if estimator == "lsq":
            sums, sizes = (per_scale(t, scale, axis, group) for t in (terms, grad.double().abs() * 8))
            error = (scale.grad.double() - 0.5 * sums).abs() - 1e-5 * sizes - 1e-6  # type: ignore[union-attr]
            require((error <= 0).all(), "a scale's gradient is off by more than 1e-5 of its terms")
            again = torch.autograd.grad(
                qkernels.fake_quantize(x, scale, None, -8, 7, "lsq", axis, group, grad_scale=0.5), scale, grad
            )[0]
            require(torch.equal(again, scale.grad), "a scale's gradient differs from run to run")  # type: ignore[arg-type]

    def against_reference(x: Tensor, scale: Tensor, grad: Tensor, axis: Any, group: Any, estimator: str) -> None:
        bounds = (0, 15) if estimator in ("pact", "dorefa") else (-8, 7)
        zero = scale.detach() * 0.3 if estimator in ("lsq_plus", "ewgs") else None
        found = []
        wanted = os.environ["QKERNELS_BACKEND"]
        for backend in (wanted, "reference"):
            os.environ["QKERNELS_BACKEND"] = backend
            try:
                leaves = [t.detach().clone().requires_grad_() for t in (x, scale, *(() if zero is None else (zero,)))]
                y = qkernels.fake_quantize(
                    leaves[0],
                    leaves[1],
                    leaves[2] if zero is not None else None,
                    *bounds,
                    estimator,
                    axis,
                    group,
                    delta=0.01 if estimator == "ewgs" else 0.0,
                )
                found.append([y.detach(), *torch.autograd.grad(y, leaves, grad, allow_unused=True)])
            finally:
                os.environ["QKERNELS_BACKEND"] = wanted
        oracle.equal(found[0][0], found[1][0], "values")
        for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
            if theirs is not None:
                bound = 1e-5 * theirs.double().abs() + 1e-5 * (x.numel() / max(1, theirs.numel()))
                require(
                    ((ours.double() - theirs.double()).abs() <= bound).all(), "a gradient differs from the reference"
                )

    full = [
        ((), None, None),
        ((3, 4097), None, None),
        ((768, 768), 0, None),
        ((64, 50, 768), None, None),
        ((150, 3), 1, None),
        ((2, 5, 9), 1, None),
        ((64, 1000), None, 128),
        ((3, 100), None, 32),
        ((4, 0), None, None),
    ]
    tiny = [((), None, None), ((5, 37), 0, None), ((2, 5, 9), 1, None), ((3, 100), None, 32), ((4, 0), None, None)]
    for number, (shape, axis, group) in enumerate(tiny if inputs.tiny else full):
        ways = list(itertools.product(FLOATS, ESTIMATORS))
        for dtype, estimator in ways if number < 3 else ways[number % 2 :: 2]:
            case = (shape, dtype, axis, group, estimator)
            yield " ".join(map(str, case)), lambda case=case: check(*case)


def per_element(values: Tensor, shape: tuple[int, ...], axis: int | None, group: int | None) -> Tensor:
    if group is not None:
        return values.repeat_interleave(group, -1)[..., : shape[-1]]
    if axis is None:
        return values.expand(shape)
    return values.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def per_scale(terms: Tensor, scale: Tensor, axis: int | None, group: int | None) -> Tensor:
    """Sums of `terms` over what shares a scale."""
    if group is not None:
        missing = -terms.shape[-1] % group
        return torch.nn.functional.pad(terms, (0, missing)).unflatten(-1, (-1, group)).sum(-1).view(scale.shape)
    if axis is None:
        return terms.sum().view(scale.shape)
    return terms.movedim(axis, 0).reshape(terms.shape[axis], -1).sum(1)
