"""Registration with torch: one line an op makes `torch.ops.qkernels.NAME` and `NAME_out`, with shape rules for tracing.

Both are opaque to compilers and run `execute`, which asks `dispatch` for the backend. Outputs are always allocated
here, by the same rule that tracing uses, and backends fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch

Specs = list[tuple[Sequence[int], torch.dtype]]

library = torch.library.Library("qkernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_shape_rules: dict[str, Callable[..., Specs]] = {}
_functional: dict[str, Any] = {}
_out: dict[str, Any] = {}
#: What torch runs under "qkernels::NAME" and "qkernels::NAME_out", for whoever records the calls below it.
implementations: dict[str, Callable[..., Any]] = {}


def register(
    name: str,
    arguments: str,
    returns: str,
    shapes: Callable[..., Specs],
    backend_arguments: Callable[..., tuple] = lambda *args: args,
) -> None:
    """Define `qkernels::name(arguments) -> returns` and its `out` form.

    `returns` is "Tensor", "(Tensor, Tensor)" or "Tensor[]". `shapes(*args)` gives shape and dtype of every result, on
    the device of the first argument. `backend_arguments(*args)` turns the schema's arguments into those of the
    backends' functions, which take tensors of any strides.
    """

    def allocate(*args: Any) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device=args[0].device) for shape, dtype in shapes(*args)]

    def package(results: list[Tensor]) -> Any:
        return results[0] if returns == "Tensor" else tuple(results) if returns.startswith("(") else results

    def execute(args: tuple, results: list[Tensor]) -> None:
        final = backend_arguments(*args)
        function = dispatch.select(name, args[0].device, *final)
        function(*final, out=results[0] if len(results) == 1 else tuple(results))

    def run(*args: Any) -> Any:
        results = allocate(*args)
        execute(args, results)
        return package(results)

    def run_out(*args: Any, out: list[Tensor]) -> None:
        execute(args, out)
        torch.autograd.graph.increment_version(out)

    library.define(f"{name}({arguments}) -> {returns}", tags=_TAGS)
    library.define(f"{name}_out({arguments}, *, Tensor(a!)[] out) -> ()", tags=_TAGS)
    library.impl(name, run, "CompositeExplicitAutograd")
    library.impl(f"{name}_out", run_out, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkernels::{name}", lambda *args: package(allocate(*args)), lib=library)
    torch.library.register_fake(f"qkernels::{name}_out", lambda *args, out: None, lib=library)
    implementations[name], implementations[f"{name}_out"] = run, run_out
    _shape_rules[name] = shapes
    _functional[name] = getattr(torch.ops.qkernels, name).default
    _out[name] = getattr(torch.ops.qkernels, f"{name}_out").default


def call(name: str, out: Any, *args: Any) -> Any:
    """Run an op after its arguments were checked; with `out`, into it. Returns what the backends return."""
    if out is None:
        return _functional[name](*args)
    _out[name](*args, out=checks.outputs(name, out, _shape_rules[name](*args), args[0].device))
    return out
