"""What the tests of the ops rely on: poison in fresh memory, and guard bands that notice."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import fresh_memory
from tests.kernels.fresh_memory import guarded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32]


def memory(output: torch.Tensor) -> torch.Tensor:
    """All of the buffer around an output."""
    return output.as_strided((output.untyped_storage().nbytes() // output.itemsize,), (1,), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_memory_is_poison(dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    for fresh in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)):
        assert fresh.isnan().all() if dtype.is_floating_point else (fresh == torch.iinfo(dtype).max).all()
    assert guarded((2, 3), dtype).isnan().all() == dtype.is_floating_point
    fresh_memory.forget()


def test_it_ends_with_the_test() -> None:
    torch.use_deterministic_algorithms(False)
    with fresh_memory.poisoned():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (0, 4)])
def test_writing_all_of_it_and_nothing_else_is_right(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for gap, shift in ((0, 0), (3, 1)):
        guarded(shape, dtype, gap, shift).fill_(1)
    fresh_memory.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("at", "gap"), [(-1, 0), (6, 0), (3, 2)], ids=["before", "behind", "between rows"])
def test_a_stray_write_is_a_fault(at: int, gap: int, dtype: torch.dtype) -> None:
    output = guarded((2, 3), dtype, gap)
    output.fill_(1)
    memory(output)[output.storage_offset() + at] = 0
    with pytest.raises(AssertionError, match=rf"1 elements beside .* were written, the first {at} from its start"):
        fresh_memory.check()


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t.is_floating_point], ids=str)
def test_a_row_left_out_is_a_fault_even_where_nan_is_right(dtype: torch.dtype) -> None:
    output = guarded((4, 3), dtype)
    output[:3] = torch.nan
    with pytest.raises(AssertionError, match=r"3 elements of an output \[4, 3\] of .* were never written"):
        fresh_memory.check()
