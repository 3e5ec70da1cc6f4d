"""Rewrites of a recording that save memory traffic and change no bit."""

from __future__ import annotations

from typing import Any

import torch

from qkernels import cpu
from qkernels.abi import TYPES

from .steps import Memory, NativeStep, Pointer, Step, TorchStep, View, touching

LINE = 64  # bytes of a cache line
SHIFTABLE = {
    "quantize_per_token": "codes",
    "layer_norm_quantize": "codes",
    "quantize_patches": "codes",
    "attention": "out",
}
LINEAR = ("int8_linear", "int4_linear")


def rewrite(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """All of them, as far as the tier that runs now has use for them."""
    if cpu.native.tier().endswith("vnni"):
        hand_over_shifted(steps, outputs)
    return add_residuals_in_place(steps, outputs)


def hand_over_shifted(steps: list[Step], outputs: list[Any]) -> None:
    """Codes that only VNNI linear ops read are written in the form that these multiply: plus 128, and with every row
    on cache lines of its own."""
    touched = touching(steps, outputs)
    for number, step in enumerate(steps):
        if not isinstance(step, NativeStep) or step.name not in SHIFTABLE:
            continue
        codes = step.arguments[SHIFTABLE[step.name]]
        if codes is None or (step.name == "attention" and step.arguments["out_type"] != TYPES[torch.int8]):
            continue
        readers = [steps[n] for n, _ in touched[id(codes.memory)] if n not in (number, len(steps))]
        seen = len(touched[id(codes.memory)]) - 1
        if len(readers) != seen or not all(_reads_rows(r, codes.memory) for r in readers) or codes.offset:
            continue
        sizes = {(r.arguments["m"], r.arguments["k"]) for r in readers}  # type: ignore[union-attr, call-overload]
        if len(sizes) != 1:
            continue
        rows, width = sizes.pop()
        stride = -(-width // LINE) * LINE
        stride += LINE * (stride % 4096 == 0)  # rows must not share one set of the first cache
        codes.memory.size = rows * stride
        step.arguments["out_stride" if step.name == "attention" else "codes_stride"] = stride
        step.arguments["shift"] = 1
        for reader in readers:
            reader.arguments.update(x_stride=stride, x_shifted=1)  # type: ignore[union-attr]


def _reads_rows(step: Step, memory: Memory) -> bool:
    """Whether a linear op takes all of `memory` as its int8 rows, and nothing else of it."""
    if not isinstance(step, NativeStep) or step.name not in LINEAR:
        return False
    if step.name == "int4_linear" and step.arguments["x_type"] != TYPES[torch.int8]:
        return False
    x = step.arguments["x"]
    return (
        x.memory is memory
        and x.offset == 0
        and step.arguments["m"] * step.arguments["k"] == memory.size
        and sum(m is memory for m, _ in step.touched()) == 1
    )


def add_residuals_in_place(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """y = linear(...); x + y -> the linear op adds x itself. In float32 that rounds the same way."""
    touched = touching(steps, outputs)
    gone = set()
    for number, step in enumerate(steps):
        if not _is_plain_sum(step):
            continue
        assert isinstance(step, TorchStep)
        for y, x in (step.arguments[:2], step.arguments[1::-1]):
            users = touched[id(y.memory)]
            source = steps[users[0][0]]
            if (
                y.memory.kind != "temporary"
                or not y.whole()
                or y.memory is x.memory
                or len(users) != 2
                or not isinstance(source, NativeStep)
                or source.name not in LINEAR
            ):
                continue
            out, held = source.arguments["out"], touched.get(id(x.memory), [])
            if (
                out.memory is not y.memory
                or out.offset
                or source.arguments["residual"] is not None
                or source.arguments["out_type"] != TYPES[torch.float32]
                or any(written and users[0][0] <= n < number for n, written in held)
            ):
                continue
            source.arguments.update(
                residual=Pointer(x.memory, x.offset * 4),
                residual_type=TYPES[torch.float32],
                out=Pointer(step.results[0].memory, 0),
            )
            gone.add(number)
            break
    return [step for number, step in enumerate(steps) if number not in gone]


def _is_plain_sum(step: Step) -> bool:
    if not isinstance(step, TorchStep) or step.function != torch.ops.aten.add.Tensor or len(step.arguments) != 2:
        return False
    a, b = step.arguments
    if not (isinstance(a, View) and isinstance(b, View)):
        return False
    return (
        a.size == b.size
        and a.dtype == b.dtype == torch.float32
        and a.stride == b.stride == step.results[0].stride
        and step.results[0].whole()
        and b.memory.kind != "input"
        and a.memory.kind != "input"
    )
