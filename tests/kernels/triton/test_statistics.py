"""channel_absmax, bit by bit, and smooth_scale, to 1e-6, by the interpreter against the reference."""

from __future__ import annotations

import math

import pytest
import torch

import qkernels
from qkernels import reference
from qkernels.triton import statistics
from tests.kernels.fresh_memory import guarded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (64, 128), (65, 129), (200, 257), (700, 5), (2, 9, 33), (40,), (0, 12)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_absmax(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = shape[-1]
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1, k)
    for index, value in enumerate((math.nan, math.inf, -math.inf, -1e4)):
        if len(flat) and k > 4:
            flat[index * 37 % len(flat), index] = value
    if len(flat) > 1 and k > 4:
        flat[:, 4], flat[-1, 4] = 1.0, math.nan  # a NaN that comes after numbers
        flat[1, 0] = 3e4  # and one before them
    x = x.to(dtype)
    out = guarded((k,), torch.float32)
    assert qkernels.channel_absmax(x, out=out) is out
    same(out, reference.channel_absmax(x))
    running = torch.rand(k, generator=generator) * 3
    running[k // 2], running[k // 3], running[0] = -math.nan, math.inf, -2.0
    wanted = torch.maximum(running, reference.channel_absmax(x))
    assert qkernels.channel_absmax(x, running) is None
    same(running, wanted)


def test_parts_are_used_and_do_not_overlap() -> None:
    """Every row decides one channel; 64 rows a part on the interpreter's chip."""
    x = torch.eye(300) * torch.arange(1, 301)
    assert statistics.channel_tile(300, 300, x.dtype, 3).part == 64
    same(qkernels.channel_absmax(x), torch.arange(1.0, 301))
    same(qkernels.channel_absmax(-x), torch.arange(1.0, 301))


def test_strides() -> None:
    x = torch.randn(30, 40, 6)
    for view in (x.transpose(0, 2), x[:, 1], x[..., ::2], x[:1, :1].expand(9, 40, 6)):
        same(qkernels.channel_absmax(view), reference.channel_absmax(view))


@pytest.mark.parametrize("strength", [0.0, 0.15, 0.5, 0.85, 1.0])
def test_smooth_scale(strength: float) -> None:
    generator = torch.Generator().manual_seed(1)
    act, weight = (torch.exp(8 * torch.randn(300, generator=generator)) for _ in range(2))
    act[:6] = torch.tensor([0.0, 0.0, 1.0, 3e38, 1e-38, math.nan])
    weight[:6] = torch.tensor([0.0, 2.0, 0.0, 1e-38, 3e38, 1.0])
    act[6], weight[7] = math.inf, math.inf
    out = guarded((300,), torch.float32)
    assert qkernels.smooth_scale(act, weight, strength, out=out) is out
    torch.testing.assert_close(out, reference.smooth_scale(act, weight, strength), rtol=1e-6, atol=0, equal_nan=True)
    assert qkernels.smooth_scale(act[:0], weight[:0], strength).shape == (0,)
