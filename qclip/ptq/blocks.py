"""Takes the inputs of a tower's blocks from one block to the next, so that each block runs once per step.

Where a block's output is the next block's input as it is, it is handed over. Where the tower does something in between
(ConvNeXt's downsampling, the norm before an attention pool, a second pool that reads what the first one read), the
tower runs again up to that block while the blocks before it are skipped: the last block of each such *chain* gives what
it gave, the others pass their input on, since nobody but the next block of the chain reads their output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import calibration
from ..models import Encoders
from ..models.tower import Block, Tower


@dataclasses.dataclass
class Call:
    """What a block is called with on one batch; `positions` bool `[B, S]` is what counts of it (None: everything), and
    `read` what counts of its output, where that is less: of a tower's last block often the pooled row alone. `name`:
    that of the input, which goes from block to block; None: it is the first argument by position."""

    args: tuple
    kwargs: dict
    positions: Tensor | None = None
    read: Tensor | None = None
    name: str | None = None

    @classmethod
    def of(cls, module: nn.Module, args: tuple, kwargs: dict, positions: Tensor | None = None) -> Call:
        """As `module`, a block, is called; its first parameter is the input, whatever the order of keywords."""
        name = None
        if not args:
            parameters = inspect.signature(type(module).forward.__get__(module)).parameters
            name = next(key for key in (*parameters, *kwargs) if key in kwargs)
        return cls(args, kwargs, positions, name=name)

    @property
    def x(self) -> Any:
        return self.args[0] if self.name is None else self.kwargs[self.name]

    def having(self, x: Any) -> Call:
        """The same call with another input."""
        if self.name is None:
            return dataclasses.replace(self, args=(x, *self.args[1:]))
        return dataclasses.replace(self, kwargs=self.kwargs | {self.name: x})

    def run(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


@dataclasses.dataclass
class Ending(Call):
    """What a tower does behind its last block, as a call: of no module, since there is none."""

    tail: Callable[[], Any] = lambda: None

    def run(self, module: nn.Module) -> Any:
        return self.tail()


def first(output: Any) -> Any:
    """The tensor that goes on to the next block; Hugging Face's blocks of version 4 give it in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def walk(
    tower: Tower, encoders: Encoders, samples: calibration.Samples, ending: Block | None = None
) -> Iterator[tuple[Block, list[Call]]]:
    """The blocks that the samples reach, in the order in which they do, each with its calls, one per batch; then
    `ending`, if given, with the calls of what the tower does behind its last block: they give embeddings.

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
        last = at + 1 == len(steps)
        if last and encoders.pools:
            _note_what_is_read(calls, batches, steps, encoders)
        yield step.block, calls
        if last and ending is None:
            return
        outputs = [call.run(step.block.module) for call in calls]
        if not last and steps[at + 1].handed_over:
            calls = [call.having(first(output)) for call, output in zip(calls, outputs, strict=True)]
        else:
            for kept, output in zip(given, outputs, strict=True):
                kept[step.block.module] = output
    if ending is not None and steps:
        tails = [functools.partial(_behind, batch, steps, kept) for batch, kept in zip(batches, given, strict=True)]
        yield (
            ending,
            [Ending((), {}, batch.positions, tail=tail) for batch, tail in zip(batches, tails, strict=True)],
        )


@dataclasses.dataclass
class _Step:
    block: Block
    handed_over: bool  # its call is that of the block before, with that block's output as input
    in_tuple: bool = False  # what it returns
    keeps_shape: bool = False  # of its input: an attention pool does not


def _order(tower: Tower, batch: calibration.Batch) -> list[_Step]:
    """One run of the tower: which blocks come after which, and how."""
    steps: list[_Step] = []
    before: tuple[Call, Any] | None = None  # the last block's call and what it gave
    by_module = {block.module: block for block in tower.blocks}

    def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = Call.of(module, args, kwargs)
        over = before is not None and call.x is first(before[1]) and _same_besides(call, before[0])
        steps.append(_Step(by_module[module], over))

    def leaves(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal before
        before = Call.of(module, args, kwargs), output
        steps[-1].in_tuple = isinstance(output, tuple)
        steps[-1].keeps_shape = before[0].x.shape == first(output).shape

    with contextlib.ExitStack() as hooks:
        for module in by_module:
            for handle in (
                module.register_forward_pre_hook(enters, with_kwargs=True),
                module.register_forward_hook(leaves, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        batch.run()
    return steps


def _same_besides(call: Call, before: Call) -> bool:
    """Whether two blocks are told the same besides their input."""
    one, other = call.having(None), before.having(None)
    return _same((one.args, one.kwargs), (other.args, other.kwargs))


def _same(a: Any, b: Any) -> bool:
    """Whether arguments are the same tensors, equal settings."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (not isinstance(a, Tensor) and a == b)


class _ReachedError(Exception):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def _reach(step: _Step, batch: calibration.Batch, skipped: list[_Step], given: dict[nn.Module, Any]) -> Call:
    """The call of a block: the tower runs up to it."""

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _ReachedError(Call.of(module, args, kwargs, batch.positions))

    with contextlib.ExitStack() as undo:
        for earlier in skipped:
            undo.enter_context(_skipping(earlier, given))
        undo.callback(step.block.module.register_forward_pre_hook(stop, with_kwargs=True).remove)
        try:
            batch.run()
        except _ReachedError as reached:
            return reached.call
    raise AssertionError(f"the tower ran without {step.block.name}, which it ran a moment ago")


def _behind(batch: calibration.Batch, steps: list[_Step], given: dict[nn.Module, Any]) -> Any:
    """What the batch's embeddings are when blocks give what is `given`: only what surrounds them is computed."""
    with contextlib.ExitStack() as undo:
        for step in steps:
            undo.enter_context(_skipping(step, given))
        return batch.encode(batch.inputs)


def _note_what_is_read(
    calls: list[Call], batches: list[calibration.Batch], steps: list[_Step], encoders: Encoders
) -> None:
    """Of the last block; once for all batches of a length: what is read depends on where a caption ends, on no pixel.
    Of an attention pool, whose output is no sequence like its input, nothing is noted."""
    if not steps[-1].keeps_shape:
        return
    known: dict[tuple, Tensor | None] = {}
    for call, batch in zip(calls, batches, strict=True):
        tokens = batch.samples if isinstance(batch.samples, Tensor) and batch.samples.ndim == 2 else None
        ends = None if tokens is None else int(encoders.text_ends(tokens[:1]))
        key = (*call.x.shape[1:2], ends)
        if key not in known:
            known[key] = _read(call, batch, steps)
        if (read := known[key]) is not None:
            call.read = read.expand(len(batch), -1) if call.positions is None else read & call.positions


def _read(call: Call, batch: calibration.Batch, steps: list[_Step]) -> Tensor | None:
    """Which positions of the last block's output reach the embeddings, bool `[1, S]`; None: all that count.

    Found by trying: copies of one sample, each with NaN at another position, and a look at whose embedding is NaN. It
    stands for the batch, whose captions end at one position (`Samples.token_batches`).
    """
    x = call.x
    if x.ndim != 3 or x.shape[0] != len(batch):
        return None
    length, found = x.shape[1], []
    for part in torch.arange(length, device=x.device).split(32):
        spoilt = torch.zeros(len(part), *x.shape[1:], dtype=x.dtype, device=x.device)
        spoilt[torch.arange(len(part)), part] = torch.nan
        copies = dataclasses.replace(batch, samples=batch.one().inputs.repeat_interleave(len(part), 0))
        output = (spoilt,) if steps[-1].in_tuple else spoilt
        found.append(_behind(copies, steps, {steps[-1].block.module: output}).isnan().flatten(1).any(1))
    read = torch.cat(found)[None]
    return None if bool(read.all()) or not bool(read.any()) else read


@contextlib.contextmanager
def _skipping(step: _Step, given: dict[nn.Module, Any]) -> Iterator[None]:
    """Inside, the block computes nothing."""
    module = step.block.module

    def forward(*args: Any, **kwargs: Any) -> Any:
        if module in given:
            return given[module]
        x = Call.of(module, args, kwargs).x
        return (x,) if step.in_tuple else x

    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
