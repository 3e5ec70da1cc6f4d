"""Registration with torch: one call per op makes `torch.ops.qkernels.NAME` and `NAME_out`, with shapes for tracing.

Both are opaque to compilers and run the backend that `dispatch` selects. Outputs are always allocated here, by the same
rule that tracing uses, and backends fill them. Derivatives and vmap are those of `transforms`.

Kernels trust sizes, so nothing unchecked may reach them. `call` is for arguments that were checked; the op itself sees
whether it got these very arguments, and checks whatever else comes (a traced graph, a caller of `torch.ops.qkernels`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from . import checks, dispatch, transforms
from .transforms import Derivative, below_autograd

Function = TypeVar("Function", bound=Callable[..., Any])
Specs = list[tuple[Sequence[int], torch.dtype]]

library = torch.library.Library("qkernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_shape_rules: dict[str, Callable[..., Specs]] = {}
_functional: dict[str, Any] = {}
_out: dict[str, Any] = {}
_functions: dict[str, type[Derivative]] = {}
#: What torch runs under "qkernels::NAME" and "qkernels::NAME_out", for whoever records the calls below it.
implementations: dict[str, Callable[..., Any]] = {}


class _Checked(threading.local):
    """The arguments of the call that is under way on this thread, which were checked."""

    args: tuple = ()


_checked = _Checked()


def _were_checked(args: tuple) -> bool:
    """Whether these are the checked arguments: the same tensors, and equal numbers."""
    checked = _checked.args
    if len(args) != len(checked):
        return False
    for value, known in zip(args, checked, strict=True):
        if value is not known and (isinstance(known, Tensor) or isinstance(value, Tensor) or value != known):
            return False
    return True


def untraced(function: Function) -> Function:
    """Decorates a function that torch.compile must not trace, nor what it calls: where the compiler gives up a frame it
    goes on with the frames below, and would take the addresses that kernels get for constants."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def register(
    name: str,
    arguments: str,
    returns: str,
    shapes: Callable[..., Specs],
    check: Callable[..., tuple],
    backend_arguments: Callable[..., tuple] = lambda *args: args,
    derivative: type[Derivative] = Derivative,
) -> None:
    """Define `qkernels::name(arguments) -> returns` and its `out` form.

    `returns` is "Tensor", "(Tensor, Tensor)" or "Tensor[]". `shapes(*args)` gives shape and dtype of every result, on
    the device of the first argument. `backend_arguments(*args)` turns the schema's arguments into those of the
    backends' functions, which take tensors of any strides, and `check` takes these and gives them back in the form that
    backends trust, or raises. `derivative` has the formulas of an op that has a gradient.
    """

    def allocate(*args: Any) -> list[Tensor]:
        device = args[0].device
        # torch reads a plain tuple in less time than a Size
        return [torch.empty(tuple(shape), dtype=dtype, device=device) for shape, dtype in shapes(*args)]

    def package(results: Sequence[Tensor]) -> Any:
        return results[0] if returns == "Tensor" else tuple(results) if returns.startswith("(") else list(results)

    def trace(*args: Any) -> Any:
        _check_device(name, args)
        return package(allocate(*args))

    def trace_out(*args: Any, out: list[Tensor]) -> None:
        _check_device(name, (*args, *out))

    def execute(final: tuple, results: Sequence[Tensor]) -> None:
        function = dispatch.select(name, final[0].device, *final)
        function(*final, out=results[0] if len(results) == 1 else tuple(results))

    def run(*args: Any) -> Any:
        final = backend_arguments(*args)
        if not _were_checked(args):
            final = check(*final)
        results = allocate(*args)
        execute(final, results)
        return package(results)

    def run_out(*args: Any, out: list[Tensor]) -> None:
        final = backend_arguments(*args)
        if not _were_checked((*args, *out)):
            final = check(*final)
            checks.outputs(name, out, shapes(*args), args[0].device)
        checks.apart(name, out, args)
        execute(final, out)
        torch.autograd.graph.increment_version(out)

    def differentiate(*args: Any) -> Any:
        if transforms.transformed() or transforms.wanted(args):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"{name}: torch.ops.qkernels.{name} has no derivative under torch.func; call qkernels.{name}"
                )
            result = _functions[name].apply(*args)
            return result if returns == "Tensor" else package(result)
        with below_autograd():
            return _functional[name](*args)

    def differentiate_out(*args: Any, out: list[Tensor]) -> None:
        _refuse_out(name, (*args, *out))
        with below_autograd():
            _out[name](*args, out=out)

    def batched(info: Any, in_dims: tuple, *args: Any) -> Any:
        results, dims = transforms.each(name, _functional[name], info.batch_size, in_dims, args)
        return (results, dims) if returns == "Tensor" else (package(results), package(dims))

    library.define(f"{name}({arguments}) -> {returns}", tags=_TAGS)
    library.define(f"{name}_out({arguments}, *, Tensor(a!)[] out) -> ()", tags=_TAGS)
    for key, function, function_out in (
        ("CompositeExplicitAutograd", run, run_out),
        ("Autograd", differentiate, differentiate_out),
    ):
        library.impl(name, untraced(function), key)
        library.impl(f"{name}_out", untraced(function_out), key)
    torch.library.register_fake(f"qkernels::{name}", trace, lib=library)
    torch.library.register_fake(f"qkernels::{name}_out", trace_out, lib=library)
    torch.library.register_vmap(f"qkernels::{name}", untraced(batched), lib=library)
    implementations[name], implementations[f"{name}_out"] = run, run_out
    _shape_rules[name] = shapes
    _functional[name] = getattr(torch.ops.qkernels, name).default
    _out[name] = getattr(torch.ops.qkernels, f"{name}_out").default
    _functions[name] = transforms.function(name, derivative, _functional[name], lambda *args: call(name, None, *args))


def _check_device(name: str, args: tuple) -> None:
    """torch takes an op for one on the meta device, which computes nothing, if any of its tensors is there."""
    for value in args:
        if isinstance(value, Tensor) and value.device != args[0].device:
            raise ValueError(f"{name}: tensors are on {args[0].device} and on {value.device}; move one of them")


def _refuse_out(name: str, args: tuple) -> None:
    if transforms.transformed() or transforms.wanted(args):
        raise RuntimeError(f"{name}: out= carries no derivative, and one is asked for here; leave out= away or detach")


def call(name: str, out: Any, *args: Any) -> Any:
    """Run an op after its arguments were checked; with `out`, into it. Returns what the backends return."""
    if out is not None:
        targets = checks.outputs(name, out, _shape_rules[name](*args), args[0].device)
        if torch.compiler.is_compiling():
            _out[name](*args, out=targets)
            return out
        _refuse_out(name, (*args, *targets))
        _checked.args = (*args, *targets)
        try:
            with below_autograd():
                _out[name](*args, out=targets)
        finally:
            _checked.args = ()
        return out
    if torch.compiler.is_compiling():
        return _functional[name](*args)
    _checked.args = args
    try:
        if transforms.transformed() or transforms.wanted(args):
            return _functions[name].apply(*args)
        if torch.is_inference_mode_enabled():  # it leaves autograd out by itself
            return _functional[name](*args)
        with below_autograd():
            return _functional[name](*args)
    finally:
        _checked.args = ()


library.define("no_gradient(Tensor grad, SymInt[] shape, ScalarType dtype, str op) -> Tensor", tags=_TAGS)
library.impl("no_gradient", transforms.no_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "qkernels::no_gradient", lambda grad, shape, dtype, op: grad.new_empty(shape, dtype=dtype), lib=library
)
