"""quantize_per_token and quantize_patches by the interpreter, bit by bit against the reference."""

from __future__ import annotations

import math

import pytest
import torch

import qkernels
from qkernels import reference
from qkernels.triton import rows
from tests.kernels.fresh_memory import guarded_codes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: One warp a row, two, four, eight, none (the loop); whole chunks, parts of one; vectors of 8, 4, 2 and 1.
WIDTHS = [1, 2, 31, 77, 300, 768, 1026, 2048, 3000, 8192, 10_248]
RULES = [(None, None), (0.013, None), (0.02, -3), (1e-30, 100), (7e-39, None)]


def sample(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of which, where there are enough, some are zero, tiny, huge, NaN or infinite; the last holds ties."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed + k))
    specials = [0.0, -0.0, 2.0**-101, 2.0**-100, math.nan, math.inf, -math.inf]
    for row, value in enumerate(specials[: m - 1]):
        if abs(value) < 1:
            x[row] = value
        else:
            x[row, (seed + 5 * row) % k] = value
    x[-1] = torch.arange(k) % 254 / 2 - 63.5
    x[-1, k // 2] = 127
    return x.to(dtype)


def check(found: tuple, wanted: tuple) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def static(scale: float | None, zero_point: int | None) -> list[torch.Tensor | None]:
    return [None if value is None else torch.tensor(float(value)) for value in (scale, zero_point)]


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(k: int, dtype: torch.dtype) -> None:
    x = sample(9, k, dtype)
    for number, (scale, zero_point) in enumerate(RULES if k == 300 else RULES[:: 1 + k % 4]):
        smooth = torch.rand(k, generator=torch.Generator().manual_seed(k)) + 0.5 if number % 2 == k % 2 else None
        out = guarded_codes(9, k)
        assert qkernels.quantize_per_token(x, smooth, scale, zero_point, out=out) is out
        check(out, reference.quantize_per_token(x, smooth, *static(scale, zero_point)))


def test_the_widths_reach_every_tile() -> None:
    tiles = {rows.row_tile(k, dtype) for k in WIDTHS for dtype in DTYPES}
    assert {tile.looped for tile in tiles} == {False, True}
    assert {tile.rows for tile in tiles if not tile.looped} == {1, 2, 4} and {tile.warps for tile in tiles} == {4, 8}


@pytest.mark.parametrize("shape", [(5,), (1, 40), (3, 1, 40), (0, 40), (2, 0, 7)])
def test_leading_axes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    out = guarded_codes(*shape)
    qkernels.quantize_per_token(x, out=out)
    check(out, reference.quantize_per_token(x))
    check(qkernels.quantize_per_token(x), out)


def test_strides() -> None:
    x = torch.randn(12, 40)
    tokens = torch.randn(3, 5, 32)
    views = [x.t(), x[:, 3:30], x[::2, ::3], x[:, :1].expand(12, 20), x[:1].expand(7, 40), x[5:6, 1:], tokens[:, 0]]
    for view in [*views, tokens.transpose(0, 1), tokens[:, :, :1]]:
        check(qkernels.quantize_per_token(view), reference.quantize_per_token(view))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-45])
def test_a_bad_static_scale_makes_rows_nan(scale: float) -> None:
    codes, scales = qkernels.quantize_per_token(torch.ones(2, 5), scale=torch.tensor(scale))
    assert not codes.any() and scales.isnan().all()


def test_saturation() -> None:
    x = torch.tensor([[1e30, -1e30, 127.4, -127.6, 3.4e38, -3.4e38, 126.5, 127.5]])
    for rule in ((1.0, None), (1e-30, -100), (1.0, 2**22), (1.0, -(2**22))):
        check(qkernels.quantize_per_token(x, None, *rule), reference.quantize_per_token(x, None, *static(*rule)))
    check(qkernels.quantize_per_token(x), reference.quantize_per_token(x))
    overflow = torch.full((2, 3), 1e30), torch.tensor([1.0, 1e30, 1.0])
    check(qkernels.quantize_per_token(*overflow), reference.quantize_per_token(*overflow))


@pytest.mark.parametrize("layout", ["dense", "channels last", "cropped", "expanded"])
@pytest.mark.parametrize(
    ("shape", "patch"),
    [((2, 3, 9, 35), (4, 7)), ((1, 3, 29, 28), (14, 14)), ((3, 1, 8, 8), (8, 8)), ((0, 3, 8, 8), (4, 4))],
)
def test_patches(shape: tuple[int, ...], patch: tuple[int, int], layout: str) -> None:
    b, c, h, w = shape
    x = torch.randn(b, c + 1, h + 3, w + 5)[:, 1:, 2:-1, 1:-4]
    if b:
        x[0, 0, 1, 1], x[-1, -1, -1] = math.nan, 0.0
    x = x if layout == "cropped" else x[:, :1].expand(shape) if layout == "expanded" else x.contiguous()
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
    k, count = c * patch[0] * patch[1], h // patch[0] * (w // patch[1])
    for dtype, smooth, rule in (
        (torch.float32, None, (None, None)),
        (torch.bfloat16, torch.rand(k) + 0.5, (0.02, None)),
        (torch.float16, torch.rand(k) + 0.5, (None, None)),
    ):
        out = guarded_codes(b, count, k)
        assert qkernels.quantize_patches(x.to(dtype), patch, smooth, *rule, out=out) is out
        check(out, reference.quantize_patches(x.to(dtype), *patch, smooth, *static(*rule)))


def test_patches_wider_than_registers_hold() -> None:
    x = torch.randn(1, 3, 60, 125)
    check(qkernels.quantize_patches(x, 60), reference.quantize_patches(x, 60, 60))
