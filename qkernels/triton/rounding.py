"""The number rules of the contract as Triton functions that every kernel shares (`qkernels.ops` states them).

Kernels whose codes must be bit-exact are launched with `enable_fp_fusion=False` (`EXACT`): otherwise `y * inverse` and
the constant of the rounding become one fused multiply-add, which rounds once where the rule rounds twice. Maxima are
taken over the bits of magnitudes as integers, where NaN is largest and infinity next: they propagate without a
comparison that says so, and the order of a reduction does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels.contract import TINY

#: Launch options of kernels whose roundings must be those of the reference.
EXACT = {"enable_fp_fusion": False}

_TINY: tl.constexpr = tl.constexpr(TINY)
# NaN is written out where it is used: as a global it would not equal itself when Triton checks that it has not changed.
_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_SHIFT: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # here float32 has steps of 1


@triton.jit
def round_small(v):
    """Round half to even, for float32 of magnitude below 2^22."""
    return (v + _SHIFT) - _SHIFT


@triton.jit
def round_half_even(v):
    """Round half to even, for any float32; infinities and NaN stay."""
    step = tl.where(v < 0, -8388608.0, 8388608.0)  # 2^23: from there on every float32 is whole
    return tl.where(tl.abs(v) < 8388608.0, (v + step) - step, v)


@triton.jit
def magnitude_bits(y):
    """The bits of |y| as int32, ordered as |y| is, with infinity and then NaN on top."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_absmax(y, axis: tl.constexpr):
    """The largest magnitude along an axis of float32 values; NaN where there is one."""
    return tl.max(magnitude_bits(y), axis).to(tl.float32, bitcast=True)


@triton.jit
def largest(a, b):
    """The larger of two float32 values, NaN where one is: one instruction."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_finite(v):
    return tl.abs(v) < _INFINITY


@triton.jit
def dynamic_scale(absmax):
    """Largest magnitudes -> (scale, inverse, good) by the dynamic rule: scale 1 and inverse 0 for a row of zeros, scale
    NaN and good = False for a row that is not finite."""
    small, good = absmax < _TINY, is_finite(absmax)
    scale = tl.where(small, 1.0, tl.div_rn(absmax, 127.0))
    inverse = tl.where(small, 0.0, tl.div_rn(127.0, absmax))
    return tl.where(good, scale, float("nan")), inverse, good


@triton.jit
def static_scale(scale):
    """A given scale (any shape) -> (inverse, good): good where the reciprocal is positive and finite."""
    inverse = tl.div_rn(1.0, scale)
    return inverse, (inverse > 0) & is_finite(inverse)


@triton.jit
def small_codes(v, good):
    """`rne(v)` as int8 for |v| < 128, 0 where not good (broadcasts). With the shift added, the code is the low byte: no
    conversion, which GPUs do at a quarter of the rate."""
    return tl.where(good, v + _SHIFT, _SHIFT).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def dynamic_codes(y, inverse, good):
    """`rne(y * inverse)` as int8, 0 where not good (broadcasts). No clamp: |y| <= absmax, and absmax times the rounded
    127 / absmax is below 127.5."""
    return small_codes(y * inverse, good)


@triton.jit
def static_codes(y, inverse, zero_point, good):
    """`clamp(rne(y * inverse) + zero_point, -127, 127)` as int8, 0 where not good (broadcasts). Without a zero point
    (None) the clamp comes first, which is the same: its bounds are whole."""
    v = y * inverse
    if zero_point is None:
        return small_codes(tl.minimum(tl.maximum(v, -127.0), 127.0), good)
    else:
        moved = round_half_even(v) + zero_point
        return small_codes(tl.minimum(tl.maximum(moved, -127.0), 127.0), good)


@triton.jit
def quantize_rows(y, scale, zero_point, STATIC: tl.constexpr):
    """Float32 `[R, K]`, 0 where there is no input, -> int8 `[R, K]` and float32 scales `[R]`.

    `scale` and `zero_point` (0.0 for none) are numbers that only the static rule reads.
    """
    absmax = row_absmax(y, 1)
    if STATIC:
        inverse, usable = static_scale(scale)
        # Not `&`: the interpreter broadcasts a scalar comparison of floats as floats.
        good = is_finite(tl.where(usable, absmax, float("nan")))
        codes = static_codes(y, inverse, zero_point, good[:, None])
        return codes, tl.where(good, scale, float("nan"))
    else:
        scales, inverse, good = dynamic_scale(absmax)
        return dynamic_codes(y, inverse[:, None], good[:, None]), scales
