"""Programs played tile by tile: the same bits as step by step, whatever the tiles and the threads."""

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import cpu
from qkernels.recording import Program, record, tape, tiling
from qkernels.recording.limits import UnrecordableError
from qkernels.recording.tape import _Tiled

from .test_recording import Block, linear, weight

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(tiling, "ROWS", 4)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def tiled(program: Program) -> list[_Tiled]:
    return [part for part in program._parts if isinstance(part, _Tiled)]


def segments(program: Program) -> int:
    return sum(part.end - part.begin for part in tiled(program))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("batch,length", [(5, 7), (11, 3), (21, 1), (7, 5)])
@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_give_the_same_bits(bits: int, batch: int, length: int, threads: int) -> None:
    blocks = [Block(64, bits) for _ in range(3)]

    def tower(x: Tensor) -> Tensor:
        x = x * 1.5
        for block in blocks:
            x = block(x)
        return x

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    program = record(tower, torch.randn(batch, length, 64))
    assert segments(program) == 6, "attention and the rest of each block"
    assert program._arena_bytes > 0
    for _ in range(3):
        x = torch.randn(batch, length, 64) * 3
        assert torch.equal(program(x), tower(x))


def test_tiles_keep_to_their_rows_with_masks_and_scales_of_their_own() -> None:
    w, mask = weight(64, 64), torch.randn(4, 1, 5, 5)

    def function(x: Tensor, mask: Tensor) -> Tensor:
        codes, scale = qkernels.quantize_per_token(x)
        q, k, v = (linear(codes, scale, w).unflatten(-1, (2, -1)) for _ in range(3))
        y, y_scale = qkernels.attention(q, k, v, mask=mask, out_dynamic=True)
        hidden = linear(y.flatten(-2), y_scale, w, out_group=128)
        return linear(*hidden, w)

    torch.set_num_threads(2)
    program = record(function, torch.randn(4, 5, 64), mask)
    assert segments(program) >= 1
    x, other = torch.randn(4, 5, 64), torch.randn(4, 1, 5, 5)
    assert torch.equal(program(x, other), function(x, other))


def test_pixels_are_cut_image_by_image() -> None:
    w = weight(24, 3 * 16)

    def function(x: Tensor) -> Tensor:
        return linear(*qkernels.quantize_patches(x, 4), w)

    torch.set_num_threads(1)
    program = record(function, torch.randn(5, 3, 12, 8))
    assert segments(program) == 1
    x = torch.randn(5, 3, 12, 8)
    assert torch.equal(program(x), function(x))
    moved = torch.randn(7, 3, 12, 8)[2:]
    assert torch.equal(program(moved), function(moved))


@pytest.mark.parametrize("made_within", [False, True])
def test_a_residual_that_lives_in_a_tile_gives_its_place_to_nobody(made_within: bool) -> None:
    """A block of NLLB's encoder from fc2 on, behind a ReLU of torch: the stream ends within the region, and a mask, or
    what else crosses the middle of it, leaves it one segment."""
    w, norm = weight(64, 64), torch.ones(64)

    def function(x: Tensor, mask: Tensor) -> Tensor:
        hidden, kept = torch.relu(x * 2), mask * 1.0
        codes = qkernels.quantize_per_token(hidden)
        stream = linear(*codes, w, residual=x)
        y = qkernels.layer_norm_quantize(stream, norm, norm, 1e-5)
        q, k, v = (linear(*y, w).unflatten(-1, (2, -1)) for _ in range(3))
        seen = qkernels.attention(q, k, v, mask=kept, out_dynamic=True)
        stream = linear(seen[0].flatten(-2), seen[1], w, residual=stream)
        if made_within:  # `codes` cross
            stream = linear(*codes, w, residual=stream)
        return linear(*qkernels.layer_norm_quantize(stream, norm, norm, 1e-5), w, residual=stream)

    torch.set_num_threads(2)
    draw = torch.Generator().manual_seed(0)
    x, mask = torch.randn(8, 5, 64, generator=draw), torch.randn(8, 1, 1, 5, generator=draw)
    program = record(function, x, mask)
    assert tiled(program)
    for _ in range(3):
        x, mask = torch.randn(8, 5, 64, generator=draw), torch.randn(8, 1, 1, 5, generator=draw)
        assert torch.equal(program(x, mask), function(x, mask))


def test_a_program_whose_temporaries_have_no_room_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    w, place = weight(64, 64), tape.place

    def shrunk(*args: object) -> int:
        return place(*args) - 64

    monkeypatch.setattr(tape, "place", shrunk)
    with pytest.raises(UnrecordableError, match="a temporary ends at byte"):
        record(lambda x: linear(*qkernels.quantize_per_token(x * 2), w) * 2, torch.randn(40, 64))


def test_a_residual_that_is_needed_later_keeps_its_place() -> None:
    w = weight(64, 64)

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = x * 2
        b = a + linear(*qkernels.quantize_per_token(a), w)
        c = b + linear(*qkernels.quantize_per_token(b), w)
        return b, c, a + linear(*qkernels.quantize_per_token(c), w)

    torch.set_num_threads(2)
    program = record(function, torch.randn(40, 64))
    assert segments(program) >= 1
    x = torch.randn(40, 64)
    for was, now in zip(function(x), program(x), strict=True):
        assert torch.equal(was, now)


def test_the_residual_stream_stays_in_one_place() -> None:
    blocks = [Block(64) for _ in range(6)]

    def tower(x: Tensor) -> Tensor:
        x = x * 2
        for block in blocks:
            x = block(x)
        return x * 2

    torch.set_num_threads(1)
    x = torch.randn(16, 8, 64)
    stream = 4 * x.numel()
    program = record(tower, x)
    assert program.workspace_bytes - program._arena_bytes <= 3 * stream, "before, within and after the region"


def test_matrices_between_segments_live_as_long_as_the_region() -> None:
    """Another thread may still be at the segment before: no place is given to a second matrix."""
    w, x = weight(64, 64), torch.randn(40, 64)

    def chain(x: Tensor) -> Tensor:
        x = x * 2
        for _ in range(5):
            x = linear(*qkernels.quantize_per_token(x), w)
        return x * 2

    torch.set_num_threads(2)
    program = record(chain, x)
    assert segments(program) == 5 and torch.equal(program(-x), chain(-x))
    assert program.workspace_bytes - 2 * program._arena_bytes >= 6 * 4 * x.numel()


def test_what_does_not_go_row_by_row_ends_a_region() -> None:
    w = weight(64, 64)

    def function(x: Tensor) -> Tensor:
        codes, scale = qkernels.quantize_per_token(x)
        y = linear(codes, scale, w)
        z = linear(*qkernels.quantize_per_token(y.flip(0)), w)  # rows of other tiles
        return linear(*qkernels.quantize_per_token(z[:20]), w)

    program = record(function, torch.randn(40, 64))
    x = torch.randn(40, 64)
    assert torch.equal(program(x), function(x))


def test_too_few_rows_are_not_worth_it() -> None:
    w = weight(64, 64)
    torch.set_num_threads(4)
    program = record(lambda x: linear(*qkernels.quantize_per_token(x), w), torch.randn(12, 64))
    assert not tiled(program)


def test_windows_of_sizes_that_do_not_divide_each_other() -> None:
    w = weight(64, 64)

    def windows(x: Tensor, rows: int) -> Tensor:
        x = x.view(-1, rows, 2, 32)
        return qkernels.attention(x, x, x).view(-1, 64)

    def function(x: Tensor) -> Tensor:
        y = linear(*qkernels.quantize_per_token(x), w)
        return linear(*qkernels.quantize_per_token(windows(windows(y, 6), 4)), w, residual=y)

    torch.set_num_threads(2)
    program = record(function, torch.randn(120, 64))
    assert segments(program) >= 1
    x = torch.randn(120, 64)
    assert torch.equal(program(x), function(x))


def test_a_row_that_all_tiles_read_is_there_before_them() -> None:
    """The rows of a matrix as rows, and one of them as a bias, or as the query of all images."""
    w, qkv = weight(64, 64), weight(192, 64)

    def as_bias(x: Tensor) -> Tensor:
        y = linear(*qkernels.quantize_per_token(x.flatten(0, 1)), w)
        return linear(*qkernels.quantize_per_token(y), w, bias=y[39], residual=y)

    def as_query(x: Tensor) -> Tensor:
        q, k, v = linear(*qkernels.quantize_per_token(x), qkv).unflatten(-1, (3, 2, 32)).unbind(2)
        y = qkernels.attention(q[9:].expand_as(k), k, v)
        return linear(*qkernels.quantize_per_token(y.flatten(-2)), w)

    torch.set_num_threads(2)
    for function in (as_bias, as_query):
        program = record(function, torch.randn(10, 4, 64))
        x = torch.randn(10, 4, 64)
        assert torch.equal(program(x), function(x))
