"""Takes the inputs of a tower's blocks from one block to the next, so that each block runs once per step.

Where a block's output is the next block's input as it is, it is handed over. Where the tower does something in between
(ConvNeXt's downsampling, the norm before an attention pool, a second pool that reads what the first one read), the
tower runs again up to that block while the blocks before it are skipped: the last block of each such *chain* gives what
it gave, the others pass their input on, since nobody but the next block of the chain reads their output.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import calibration
from ..models import Encoders
from ..models.tower import Block, Tower


@dataclasses.dataclass
class Call:
    """What a block is called with on one batch; `positions` bool `[B, S]` is what counts of it (None: everything)."""

    args: tuple
    kwargs: dict
    positions: Tensor | None = None

    def run(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


def first(output: Any) -> Any:
    """The tensor that goes on to the next block; Hugging Face's blocks of version 4 give it in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def walk(tower: Tower, encoders: Encoders, samples: calibration.Samples) -> Iterator[tuple[Block, list[Call]]]:
    """The blocks that the samples reach, in the order in which they do, each with its calls, one per batch.

    When the next block is asked for, the calls are run on the block as it stands then: what was written into it
    meanwhile, float or quantized, makes the next inputs. Holds the inputs of one block, and the outputs of the last
    block of each chain before it.
    """
    batches = list(calibration.batches(encoders, samples, tower.name))
    steps = _order(tower, batches[0].one()) if batches else []
    given: list[dict[nn.Module, Any]] = [{} for _ in batches]  # by batch: what the last blocks of chains gave
    calls: list[Call] = []
    for at, step in enumerate(steps):
        if not step.handed_over:
            calls = [_reach(step, batch, steps[:at], kept) for batch, kept in zip(batches, given, strict=True)]
        yield step.block, calls
        if at + 1 == len(steps):
            return
        outputs = [call.run(step.block.module) for call in calls]
        if steps[at + 1].handed_over:
            calls = [
                Call((first(output), *call.args[1:]), call.kwargs, call.positions)
                for call, output in zip(calls, outputs, strict=True)
            ]
        else:
            for kept, output in zip(given, outputs, strict=True):
                kept[step.block.module] = output


@dataclasses.dataclass
class _Step:
    block: Block
    handed_over: bool  # its call is that of the block before, with that block's output as input
    in_tuple: bool = False  # what it returns


def _order(tower: Tower, batch: calibration.Batch) -> list[_Step]:
    """One run of the tower: which blocks come after which, and how."""
    steps: list[_Step] = []
    before: tuple[tuple, dict, Any] | None = None  # the last block's call and what it gave
    by_module = {block.module: block for block in tower.blocks}

    def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
        over = before is not None and bool(args) and args[0] is first(before[2])
        over = over and _same((args[1:], kwargs), (before[0][1:], before[1]))  # type: ignore[index]
        steps.append(_Step(by_module[module], over))

    def leaves(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal before
        before = args, kwargs, output
        steps[-1].in_tuple = isinstance(output, tuple)

    with contextlib.ExitStack() as hooks:
        for module in by_module:
            for handle in (
                module.register_forward_pre_hook(enters, with_kwargs=True),
                module.register_forward_hook(leaves, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        batch.run()
    return steps


def _same(a: Any, b: Any) -> bool:
    """Whether two blocks are told the same besides their input: the same tensors, equal settings."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (not isinstance(a, Tensor) and a == b)


class _ReachedError(Exception):
    def __init__(self, args: tuple, kwargs: dict) -> None:
        super().__init__()
        self.call = args, kwargs


def _reach(step: _Step, batch: calibration.Batch, skipped: list[_Step], given: dict[nn.Module, Any]) -> Call:
    """The call of a block: the tower runs up to it."""

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _ReachedError(args, kwargs)

    with contextlib.ExitStack() as undo:
        for earlier in skipped:
            undo.enter_context(_skipping(earlier, given))
        undo.callback(step.block.module.register_forward_pre_hook(stop, with_kwargs=True).remove)
        try:
            batch.run()
        except _ReachedError as reached:
            return Call(*reached.call, batch.positions)
    raise AssertionError(f"the tower ran without {step.block.name}, which it ran a moment ago")


@contextlib.contextmanager
def _skipping(step: _Step, given: dict[nn.Module, Any]) -> Iterator[None]:
    """Inside, the block computes nothing."""
    module = step.block.module

    def forward(x: Tensor, *_: object, **__: object) -> Any:
        if module in given:
            return given[module]
        return (x,) if step.in_tuple else x

    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
