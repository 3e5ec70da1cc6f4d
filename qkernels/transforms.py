"""What torch's transforms make of an op: its gradient, its forward-mode derivative and its vmap.

Each op stands behind a `torch.autograd.Function` of its own. `Derivative` is what the integer ops have: none, said in
one sentence when a derivative is asked for, in eager mode and in a compiled graph. Ops with a derivative give a
subclass with their formulas (`qkernels.derivatives`). `register` in `qkernels.registry` adds the forward half and the
vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NO_GRADIENT = (
    "{op}: integer ops have no gradient; differentiate the float model, or train with qkernels.fake_quantize, "
    "which has gradients"
)
#: Runs the kernels of an op and not its gradient.
below_autograd = torch._C._AutoDispatchBelowAutograd


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def wanted(args: tuple) -> bool:
    """Whether reverse mode wants a gradient of an op with these arguments."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


class Derivative(torch.autograd.Function):
    """None: a derivative of these ops is refused when it is asked for, not when the op runs, so that a quantized model
    works while gradients are on."""

    op = ""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.like = [(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None for value in inputs]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """An op of its own, so that compilers can trace the gradient of what never asks for it."""
        grad = next((g for g in grads if g is not None), None)
        return tuple(
            torch.ops.qkernels.no_gradient(grad, *like, ctx.op) if needed and like and grad is not None else None
            for needed, like in zip(ctx.needs_input_grad, ctx.like, strict=True)
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(NO_GRADIENT.format(op=ctx.op))


def no_gradient(grad: Tensor, shape: list[int], dtype: torch.dtype, op: str) -> Tensor:
    raise RuntimeError(NO_GRADIENT.format(op=op))


def function(
    name: str, derivative: type[Derivative], run: Callable[..., Any], again: Callable[..., Any]
) -> type[Derivative]:
    """The autograd function of an op: `run(*args)` computes it, `again(*args)` calls it from within a transform."""

    def forward(*args: Any) -> Any:
        with below_autograd():
            result = run(*args)
        return tuple(result) if isinstance(result, list) else result

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op = name
        derivative.setup_context(ctx, inputs, output)

    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return each(name, again, info.batch_size, in_dims, args)

    members = {"forward": forward, "setup_context": setup_context, "vmap": vmap}
    return type(name, (derivative,), {key: staticmethod(member) for key, member in members.items()})


def each(name: str, call: Callable[..., Any], size: int, in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    """torch.vmap: the op once per element of the batch, whatever is batched; slower than leading axes, and as exact."""
    if size == 0:
        raise RuntimeError(
            f"{name}: torch.vmap over an axis of size 0 is not supported; give the batch as a leading axis"
        )
    found = []
    for index in range(size):
        result = call(*(a if dim is None else a.select(dim, index) for a, dim in zip(args, in_dims, strict=True)))
        found.append([result] if isinstance(result, Tensor) else list(result))
    stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    return (stacked[0], 0) if isinstance(result, Tensor) else (stacked, (0,) * len(stacked))
