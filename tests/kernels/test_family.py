"""A function traced at small sizes: its programs for all others give the function's bits, over the same constants."""

import gc

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import cpu
from qkernels.recording import Family, UnrecordableError, Workspace, check, ledger

from .test_recording import Block, linear, tier, weight, without_gradients  # noqa: F401  (fixtures)

KEPT = [torch.ones(3), torch.ones(3)]

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")


@pytest.mark.parametrize("bits", [8, 4])
def test_one_trace_serves_all_batches(tier: str, bits: int) -> None:  # noqa: F811
    blocks = [Block(64, bits) for _ in range(2)]

    def tower(x: Tensor) -> tuple[Tensor, Tensor]:
        for block in blocks:
            x = block(x)
        return x.mean(1), x[:, 0]

    family, workspace = Family(tower, (torch.randn(4, 5, 64),), (0,)), Workspace()
    programs = {n: family.program(torch.randn(n, 5, 64), workspace=workspace) for n in (1, 2, 3, 7, 64, 20)}
    for n, program in programs.items():  # after the workspace has moved
        for scale in (1, 3):
            x = torch.randn(n, 5, 64) * scale
            for was, now in zip(tower(x), program(x), strict=True):
                assert torch.equal(was, now), n


def test_batch_and_length_are_free_together() -> None:
    table, places, block = torch.randn(50, 64), torch.randn(16, 64), Block(64)

    def text(tokens: Tensor) -> Tensor:
        x = block(table[tokens] + places[: tokens.shape[1]])
        return x[torch.arange(len(tokens)), tokens.argmax(-1)]

    family = Family(text, (torch.randint(50, (1, 3)),), (0, 1))
    for batch, length in ((1, 1), (1, 9), (5, 4), (3, 16), (40, 11)):
        program = family.program(torch.randint(50, (batch, length)))
        tokens = torch.randint(50, (batch, length))
        assert torch.equal(program(tokens), text(tokens))
        assert program.own_bytes > 8 * batch, "arange of its own"


def test_programs_share_constants_and_one_workspace() -> None:
    w, scale = weight(64, 64), torch.rand(64).double()

    def function(x: Tensor) -> Tensor:
        for _ in range(3):
            x = linear(*qkernels.quantize_per_token(x, smooth=(1 / scale).float()), w)
        return x

    gc.collect()
    before, workspace = ledger.bytes, Workspace()
    family = Family(function, (torch.randn(4, 64),), (0,))
    programs = [family.program(torch.randn(n, 64), workspace=workspace) for n in (1, 30, 90, 10)]
    assert len({tuple(sorted(s.data_ptr() for s in p._held)) for p in programs}) == 1
    largest = max(p.workspace_bytes for p in programs)
    assert largest < workspace.bytes < largest + 100
    assert ledger.bytes == before + workspace.bytes + sum(p.own_bytes for p in programs)
    assert all(p._buffer.data_ptr() == programs[0]._buffer.data_ptr() for p in programs)
    del programs[1:3]
    gc.collect()
    assert workspace.fit() and workspace.bytes < largest / 2, "it shrinks to what is left"
    x = torch.randn(10, 64)
    assert torch.equal(programs[1](x), function(x))
    del programs, workspace
    gc.collect()
    assert ledger.bytes == before


def test_an_input_that_lies_elsewhere() -> None:
    w = weight(24, 24)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(*qkernels.quantize_per_token(x), w), x[1:]

    long = torch.randn(40, 24)
    program = Family(function, (long[3:7],), (0,)).program(long[7:12])
    for was, now in zip(function(long[20:25]), program(long[20:25]), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * 2 if len(x) == 2 else x * 2 + 1, "other steps"),
        (lambda x: x.flip(0) if len(x) == 2 else x.exp(), "other ops of torch"),
        (lambda x: x + (1 / len(x)), "no integer"),
        (lambda x: x + torch.rand(3), "random"),
        (lambda x: x[:2].view(2, 3) if len(x) == 2 else x.view(5, 5), "does not run with other"),
        (lambda x: x + KEPT[len(x) - 2], "other constants"),
    ],
)
def test_what_differs_in_more_than_integers_is_refused(function, why: str) -> None:
    with pytest.raises(UnrecordableError, match=why):
        Family(function, (torch.randn(5, 3),), (0,))


def test_a_function_that_goes_another_way_at_large_sizes_is_caught() -> None:
    def function(x: Tensor) -> Tensor:
        return x * 2 if len(x) < 8 else x * 3

    family = Family(function, (torch.randn(5, 3),), (0,))
    for n, same in ((4, True), (9, False)):
        x = torch.randn(n, 3)
        program = family.program(x)
        if same:
            check(program, (x,), function(x))
        else:
            with pytest.raises(UnrecordableError, match="other numbers"):
                check(program, (x,), function(x))
