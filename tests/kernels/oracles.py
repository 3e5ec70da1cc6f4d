"""What the ops must compute, derived once more in NumPy float64. Float32 steps of the contract are float64 steps
rounded to float32: for one product, sum or quotient of float32 numbers that is the correctly rounded result."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

examples = lambda count: settings(max_examples=count)  # noqa: E731
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(FLOATS)


def f64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def f32(x: Any) -> np.ndarray:
    """Rounded to float32, in float64."""
    with np.errstate(over="ignore"):
        return np.asarray(x, dtype=np.float64).astype(np.float32).astype(np.float64)


def quantize_rows(y: np.ndarray, scale: float | None = None, zero_point: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows of float32 values (held in float64)."""
    codes, scales = np.zeros(y.shape, dtype=np.int64), np.empty(y.shape[:-1])
    for index in np.ndindex(y.shape[:-1]):
        row = y[index]
        if not np.isfinite(row).all():
            scales[index] = np.nan
        elif scale is not None:
            inverse = f32(1.0 / f32(scale))
            scales[index] = f32(scale)
            codes[index] = np.clip(np.rint(f32(row * inverse)) + zero_point, -127, 127)
        elif (largest := np.abs(row).max()) < 2.0**-100:
            scales[index] = 1.0
        else:
            scales[index] = f32(largest / 127)
            codes[index] = np.rint(f32(row * f32(127 / largest)))
    return codes, scales


def layer_norm(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def activate(y: np.ndarray, name: str | None) -> np.ndarray:
    from scipy.special import erf, expit

    if name == "gelu":
        return y * 0.5 * (1 + erf(y / np.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y * expit(1.702 * y) if name == "quick_gelu" else y


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> np.ndarray:
    batch, queries, heads, d = q.shape
    keys = k.shape[1]
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * (d**-0.5 if scale is None else scale)
    allowed = np.ones((batch, heads, queries, keys), dtype=bool)
    if mask is not None and mask.dtype == bool:
        allowed &= mask
    elif mask is not None:
        scores = scores + mask
    if causal:
        allowed &= np.arange(keys)[None, :] <= np.arange(queries)[:, None]
    scores = np.where(allowed, scores, -np.inf)
    y = np.zeros(q.shape)
    for b, h, i in np.ndindex(batch, heads, queries):
        seen = scores[b, h, i] > -np.inf
        if seen.any():
            p = np.exp(scores[b, h, i, seen] - scores[b, h, i, seen].max())
            y[b, i, h] = p @ v[b, seen, h] / p.sum()
    return y


def assert_near_ties(codes: torch.Tensor, v: np.ndarray, error: Any) -> None:
    """Codes are round(clip(v)) of some v within `error` (in steps, as v) of the exact one: for a small error the
    nearest code, or its neighbour where v lies near a tie."""
    v = np.clip(v, -127, 127)
    away = np.abs(codes.numpy().astype(np.int64) - v)
    assert (away <= 0.5 + np.broadcast_to(error, v.shape)).all()


def same(a: torch.Tensor, b: np.ndarray) -> bool:
    """Equal values; NaN equals NaN."""
    return np.array_equal(f64(a), np.asarray(b, dtype=np.float64), equal_nan=True)
