"""Tensors of more than 2^31 elements: the emulated kernels on the first and the last blocks of one. What no block
touches takes no memory."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from qkernels import Int4Weight, Int8Weight, cuda
from qkernels.contract import Epilogue
from tests.kernels.cuda.test_int8_linear import Emulated

FAR = 2**31


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """None here: what no tile touches is to take no memory."""


@pytest.fixture
def ends(emulated: Any, emulated_library: Any) -> Any:
    """`qkernels.cuda`, of whose grids the ends run."""
    only = ctypes.c_bool.in_dll(emulated_library, "_ZN8emulated9ends_onlyE")
    only.value = True
    yield emulated
    only.value = False


def sparse(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, width]` of which the last two rows hold something, and those rows."""
    x = torch.empty(rows, width, dtype=dtype)
    x[-2:] = (20 * torch.randn(2, width, generator=torch.Generator().manual_seed(0))).clamp(-127, 127).to(dtype)
    return x, x[-2:].clone()


def check(whole: Any, part: Any) -> None:
    """The end of the last row of every result of all rows is that of the last rows alone."""
    for got, want in zip(*((y if isinstance(y, tuple) else (y,)) for y in (whole, part)), strict=True):
        end = max(1, want[-1].numel() // 256)
        assert torch.equal(got[-1].view(-1)[-end:], want[-1].view(-1)[-end:])


@pytest.mark.parametrize("width", [768, 4096, 24_000])
def test_rows_to_codes(width: int, ends: Any) -> None:
    x, last = sparse(FAR // width + 3, width, torch.float16)
    check(ends.quantize_per_token(x), ends.quantize_per_token(last))
    check(ends.layer_norm_quantize(x, None, None, 1e-5), ends.layer_norm_quantize(last, None, None, 1e-5))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_fake_quantize_and_its_gradient(axis: int | None, ends: Any) -> None:
    width = 4096
    x, last = sparse(FAR // width + 3, width, torch.float16)
    scales = [torch.full(() if axis is None else (rows.shape[axis],), 0.5) for rows in (x, last)]
    whole, part = (
        ends.fake_quantize(rows, scale, None, -8, 7, "lsq", axis) for rows, scale in zip((x, last), scales, strict=True)
    )
    check(whole, part)
    whole, part = (
        ends.fake_quantize_backward(rows, rows, scale, None, -8, 7, "lsq", axis)
        for rows, scale in zip((x, last), scales, strict=True)
    )
    check(whole[0], part[0])
    if axis == 0:
        assert torch.equal(whole[1][-1:], part[1][-1:])


OUTS = {"float": {"out_dtype": torch.float16}, "group": {"out_group": 128}, "tensor": {"out_scale": torch.tensor(3.0)}}


def linear(op: Any, weight: Any, out: str, **options: Any) -> None:
    x, last = sparse(FAR // weight.shape[0] + 3, weight.shape[1], torch.int8)
    scale = torch.tensor(0.01)
    residuals: tuple = (None, None)
    if out == "float":
        residuals = sparse(len(x), weight.shape[0], torch.float16)
    whole, part = (
        op(rows, scale, weight, Epilogue(residual=residual, **OUTS[out]), **options)
        for rows, residual in zip((x, last), residuals, strict=True)
    )
    check(whole, part)


@pytest.mark.parametrize("out", OUTS)
def test_results_of_int4_linear(out: str, ends: Any) -> None:
    w = torch.randn(16_384, 144, generator=torch.Generator().manual_seed(1))
    linear(ends.int4_linear, Int4Weight.quantize(w, group=128).pack("halves128"), out)


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("out", OUTS)
def test_results_of_int8_linear(out: str, chip: int, emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = Emulated(emulator, monkeypatch)
    emulated.chip, emulated.processors = chip, 2**30
    w = torch.randn(16_384, 144, generator=torch.Generator().manual_seed(1))
    emulator.emulator_ends_only(1)
    try:
        linear(cuda.int8_linear, Int8Weight.quantize(w).pack("rows16"), out, configuration=1)
    finally:
        emulator.emulator_ends_only(0)


def test_what_does_not_fit_is_refused_in_words() -> None:
    limits = cuda._limits
    one = torch.zeros(1, 1)
    many = "split the batch"
    assert many in str(limits["quantize_per_token"](one.expand(FAR, 1)))
    assert many in str(limits["layer_norm_quantize"](one.expand(FAR, 1), None, None, 1e-5))
    assert limits["quantize_per_token"](one.expand(2**20, 2**12)) is None
    codes = torch.zeros(1, 1, dtype=torch.int8)
    wide8 = Int8Weight(codes.expand(FAR, 16), one[0].expand(FAR), (FAR, 1), "rows16")
    assert "takes at most 2147483392 outputs" in str(limits["int8_linear"](codes, one, wide8))
    four = torch.zeros(1, 1, dtype=torch.uint8)
    wide4 = Int4Weight(four.expand(2**23, 64), one.half().expand(2**23, 1), None, (2**23, 1), 1, "halves128")
    assert "takes at most 8388480 outputs" in str(limits["int4_linear"](codes, one, wide4))
    for op, first in (("fake_quantize", ()), ("fake_quantize_backward", (one,))):
        columns = one.expand(4, 2**24)
        assert "columns" in str(limits[op](*first, columns, columns[0], None, -8, 7, "ste", 1))
        assert limits[op](*first, columns, columns[0], None, -8, 7, "ste", 0) is None
