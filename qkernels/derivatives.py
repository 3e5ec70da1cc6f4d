"""The formulas of the ops that have a derivative: reverse mode, forward mode and the second derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .granularity import learned
from .registry import call
from .transforms import Derivative


class FakeQuantize(Derivative):
    """Reverse mode by the estimator, forward mode its transpose."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, ctx.rest = inputs[:3], inputs[3:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        dx, *others = call("fake_quantize_backward", None, grads[0], x, scale, zero_point, *ctx.rest)
        has = learned(zero_point, ctx.rest[2])
        return dx, *(found if there else None for found, there in zip(others, has, strict=True)), *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _check_linear("forward-mode", ctx.rest)
        x, scale, offset = tangents[:3]
        return reference.fake_quantize_tangent(x, scale, offset, *ctx.saved_tensors, *ctx.rest)


class FakeQuantizeBackward(Derivative):
    """Derivatives of the gradients, which are linear in the incoming gradient (not so for "ewgs"). Those by x, scale
    and offset are 0: rounding and clipping are held as they are, as in the first derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, ctx.rest = inputs[1:4], inputs[4:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _check_linear("double backward", ctx.rest)
        tensors = x, scale, zero_point = ctx.saved_tensors
        of_scale, of_offset = learned(zero_point, ctx.rest[2])
        steps = grads[0], grads[1] if of_scale else None, grads[2] if of_offset else None
        constant = (
            torch.zeros_like(t) if needed else None
            for t, needed in zip(tensors, ctx.needs_input_grad[1:4], strict=True)
        )
        by_grad = reference.fake_quantize_tangent(steps[0], steps[1], steps[2], *tensors, *ctx.rest)
        return by_grad, *constant, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _check_linear("forward-mode", ctx.rest)
        x, scale, zero_point = ctx.saved_tensors
        grad = torch.zeros_like(x) if tangents[0] is None else tangents[0]
        return call("fake_quantize_backward", None, grad, x, scale, zero_point, *ctx.rest)


def _check_linear(mode: str, rest: tuple) -> None:
    estimator, delta = rest[2], rest[6]
    if estimator == "ewgs" and delta:
        raise RuntimeError(
            f"fake_quantize: 'ewgs' has no {mode} derivative, because its gradient depends on the sign of the incoming "
            "one; take another estimator, or delta=0"
        )


class Hadamard(Derivative):
    """A linear map: in forward mode its derivative is the map itself, in reverse its transpose; so in every order."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.transpose = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return call("hadamard_transform", None, grads[0], not ctx.transpose), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return call("hadamard_transform", None, tangents[0], ctx.transpose)
