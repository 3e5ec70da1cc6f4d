"""Quantization grids: which values `bits` bits can stand for. Bounds, scales and rounding of weights are defined here,
once.

A value is `scale * (code - zero)`, with one scale (and zero) per output channel or per `group` consecutive inputs:

===========  ======================  ==================================  ==========================
kind         codes                   min-max scale                       zero
===========  ======================  ==================================  ==========================
sym          -(2^(b-1)-1) .. same    max|w| / (2^(b-1) - 1)              0
symfull      -2^(b-1) .. 2^(b-1)-1   max|w| / (2^(b-1) - 1/2)            0
midrise      0 .. 2^b - 1            max|w| / ((2^b - 1) / 2)            (2^b - 1) / 2
asym         0 .. 2^b - 1            range including 0 / (2^b - 1)       whole number found per scale
floatzero    0 .. 2^b - 1            as asym                             real number found per scale
===========  ======================  ==================================  ==========================

With `symfull` the largest positive value is clipped by half a step at most. A scale of weights may be negative: it
turns an uneven grid around (-7 .. 8 steps instead of -8 .. 7).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import SMALLEST_NORMAL_HALF, TINY

Kind = Literal["sym", "symfull", "midrise", "asym", "floatzero"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OBSERVERS = ("min-max", "mse", "percentile")

RANGES = 80  # shrunk ranges that "mse" tries: 1 - i/100 of the one that clips nothing
PERCENTILES = (99.9, 99.99, 99.999)  # that "percentile" tries
_AT_ONCE = 1 << 16  # values of a chunk of rows, so that the temporaries of a search stay in the cache


@dataclass(frozen=True)
class Grid:
    """`bits` 1..8 (`sym`: 2..8) of `kind`; `group` consecutive inputs share a scale, None = a whole output channel."""

    bits: int = 8
    kind: Kind = "sym"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of grid {self.kind!r}; known: {', '.join(map(repr, KINDS))}")
        least = 2 if self.kind == "sym" else 1
        if not isinstance(self.bits, int) or not least <= self.bits <= 8:
            raise ValueError(f"a grid '{self.kind}' has {least} to 8 bits, got {self.bits}")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"the group of a grid must be a positive number of inputs or None, got {self.group}")

    @property
    def low(self) -> int:
        """The least code."""
        return {"sym": 1 - 2 ** (self.bits - 1), "symfull": -(2 ** (self.bits - 1))}.get(self.kind, 0)

    @property
    def high(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.kind in ("sym", "symfull") else 2**self.bits - 1

    @property
    def zero(self) -> float | None:
        """The zero that the kind fixes; None where one is found for every scale."""
        if self.kind in ("asym", "floatzero"):
            return None
        return (2**self.bits - 1) / 2 if self.kind == "midrise" else 0.0

    @property
    def container(self) -> Literal["Int8Weight", "Int4Weight"]:
        """The weight class whose kernels multiply this grid. Raises ValueError where there is none.

        Groups, zero points and 4 bits go into an Int4Weight (float16 scales and zeros), which has room for up to 4
        bits; everything else into an Int8Weight, which has no zeros: a midrise code c is held as 2c - (2^b - 1), up to
        7 bits.
        """
        if self.group is not None or self.zero is None:
            if self.bits > 4:
                what = "groups" if self.group is not None else "zero points"
                raise ValueError(
                    f"no kernel multiplies {self}: {what} of weights are for up to 4 bits; use kind 'sym' without "
                    "groups, or fewer bits"
                )
            return "Int4Weight"
        if self.kind == "midrise" and self.bits == 8:
            raise ValueError(f"no kernel multiplies {self}: its odd codes fit into int8 up to 7 bits; use kind 'sym'")
        return "Int4Weight" if self.bits == 4 else "Int8Weight"

    def __str__(self) -> str:
        return f"the {self.bits}-bit grid '{self.kind}'" + ("" if self.group is None else f" in groups of {self.group}")

    # -- rounding ----------------------------------------------------------------------------------------------------

    def encode(
        self, x: Tensor, scale: Tensor, zero: Tensor | float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Codes of float32 `x` as whole float32 numbers; `scale` and `zero` broadcast with it (None: the kind's own).

        `clamp(rne(x * (1 / scale) + fraction(zero)) + floor(zero), low, high)`: a whole zero is added after rounding,
        so that it changes no tie.
        """
        codes = torch.mul(x, 1 / scale, out=out)
        zero = self._zero_or(zero)
        if isinstance(zero, float) and zero == 0:
            return codes.round_().clamp_(self.low, self.high)
        whole = zero.floor() if isinstance(zero, Tensor) else float(int(zero))
        return codes.add_(zero - whole).round_().add_(whole).clamp_(self.low, self.high)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | float | None = None) -> Tensor:
        """`scale * (codes - zero)`, float32."""
        zero = self._zero_or(zero)
        return codes * scale if isinstance(zero, float) and zero == 0 else (codes - zero) * scale

    def _zero_or(self, zero: Tensor | float | None) -> Tensor | float:
        zero = self.zero if zero is None else zero
        if zero is None:
            raise ValueError(f"{self} has a zero for every scale; give zeros, as `fit` and `zeros` find them")
        return zero

    # -- scales ------------------------------------------------------------------------------------------------------

    def grouped(self, weight: Tensor) -> Tensor:
        """Float `[N, K]` as float32 `[N, groups, group]`, the last group padded with zeros, which change no scale."""
        k = weight.shape[1]
        group = k if self.group is None else min(self.group, k)
        return F.pad(weight.detach().float(), (0, -k % group)).view(weight.shape[0], -1, group)

    @torch.no_grad()
    def fit(self, weight: Tensor, observer: str = "min-max") -> tuple[Tensor, Tensor | None]:
        """Scales, and zeros where the kind finds them, of float `[N, K]`: float32 `[N, ceil(K / group)]`, as the
        container holds them (float16 numbers where that is an Int4Weight).

        "min-max" covers all values. "mse" tries that and 80 narrower ranges and takes the least squared error, the
        first of the best, so that no group is worse: a large value that is clipped lets the others be rounded more
        finely. For `symfull` it tries negative scales, too. "percentile" takes the best of three percentiles of |w|
        (asym, floatzero: at both ends) by the same error. A group of zeros has scale 1, of midrise, which has no zero,
        the smallest that is held (2^-100, or the least normal float16); a group whose range float16 cannot hold has
        Inf, which `quantize_weight` refuses.
        """
        if observer not in OBSERVERS:
            raise ValueError(f"unknown observer {observer!r}; known: {', '.join(map(repr, OBSERVERS))}")
        grouped = self.grouped(weight)
        padding = grouped.shape[1] * grouped.shape[2] - weight.shape[1]
        rows = max(1, _AT_ONCE // (grouped.shape[1] * grouped.shape[2]))
        found = [
            self._min_max(chunk) if observer == "min-max" else self._least_squares(chunk, padding, observer)
            for chunk in grouped.split(rows)
        ]
        scales, zeros = zip(*found, strict=True)
        return torch.cat(scales), None if self.zero is not None else torch.cat(zeros)

    @torch.no_grad()
    def zeros(self, weight: Tensor, scales: Tensor) -> Tensor | None:
        """The zeros that min-max finds for given scales `[N, groups]`; None where the kind fixes the zero."""
        return None if self.zero is not None else self._zeros(self.grouped(weight), scales)

    def _zeros(self, grouped: Tensor, scales: Tensor, part: float = 1.0) -> Tensor:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        end = torch.where(scales > 0, low, high) * part  # the value of code 0: with a negative scale the largest
        zeros = -end * (1 / scales)
        zeros = (torch.round(zeros) if self.kind == "asym" else zeros).clamp(0, self.high)
        return zeros.half().float() if self._held_as_half() else zeros

    def _held_as_half(self) -> bool:
        try:
            return self.container == "Int4Weight"
        except ValueError:
            return False

    def held(self, scales: Tensor) -> Tensor:
        """Positive float32 scales as the container holds them: rounded to float16, and not below its normal range."""
        return scales.clamp(min=SMALLEST_NORMAL_HALF).half().float() if self._held_as_half() else scales

    def _of_zeros(self, span: Tensor) -> Tensor:
        """Scales of groups that hold nothing but zeros. The codes of midrise nearest to 0 are half a step away, so its
        steps are as small as can be."""
        return self.held(torch.full_like(span, TINY)) if self.kind == "midrise" else torch.ones_like(span)

    def _span(self, grouped: Tensor) -> tuple[Tensor, float]:
        """What the codes cover by min-max, and how many steps that is."""
        if self.zero is None:
            return grouped.amax(2).clamp(min=0) - grouped.amin(2).clamp(max=0), float(self.high)
        steps = self.zero if self.kind == "midrise" else self.high + 0.5 * (self.kind == "symfull")
        return grouped.abs().amax(2), float(steps)

    def _min_max(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        span, steps = self._span(grouped)
        found = span / torch.full_like(span, steps)  # not a number: a GPU would multiply by its reciprocal
        scales = torch.where(span < TINY, self._of_zeros(span), self.held(found))
        return scales, None if self.zero is not None else self._zeros(grouped, scales)

    def _least_squares(self, grouped: Tensor, padding: int, observer: str) -> tuple[Tensor, Tensor | None]:
        """`padding`: values at the end of the last group that are none."""
        span, _ = self._span(grouped)
        whole, best_zeros = self._min_max(grouped)
        best = whole  # which is left where errors are beyond float32
        least = torch.full_like(span, torch.inf)
        codes, off = torch.empty_like(grouped), torch.empty_like(grouped)
        for scale, zeros in self._shrunk(grouped) if observer == "mse" else self._clipped(grouped, padding):
            zero = self._zero_or(None if zeros is None else zeros[:, :, None])
            self.encode(grouped, scale[:, :, None], zero, out=codes)
            if not (isinstance(zero, float) and zero == 0):
                codes.sub_(zero)
            torch.mul(codes, scale[:, :, None], out=off).sub_(grouped)
            off[:, -1, off.shape[2] - padding :] = 0  # not every grid has a zero
            error = off.square_().sum(2)
            better = error < least  # never where it is NaN: a scale of zero, or beyond float16
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
            if best_zeros is not None and zeros is not None:
                best_zeros = torch.where(better, zeros, best_zeros)
        if self._held_as_half():  # what float16 cannot hold without clipping has no scale, as by min-max
            best = torch.where(whole.isinf(), torch.inf, best)
        return torch.where(span < TINY, self._of_zeros(span), best), best_zeros

    def _shrunk(self, grouped: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scales and zeros that "mse" tries, those of min-max first."""
        for scale, part in self._parts(grouped):
            yield scale, None if self.zero is not None else self._zeros(grouped, scale, part)

    def _clipped(self, grouped: Tensor, padding: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scales and zeros that "percentile" tries: those of min-max behind percentiles."""
        whole, last = (grouped, None) if padding == 0 else (grouped[:, :-1], grouped[:, -1:, :-padding])
        parts = [part for part in (whole, last) if part is not None and part.shape[1]]
        ranked = [(part if self.zero is None else part.abs()).sort(2).values for part in parts]
        for percentile in PERCENTILES:
            high = torch.cat([_percentile(each, percentile) for each in ranked], 1)
            low = -high if self.zero is not None else torch.cat([_percentile(e, 100 - percentile) for e in ranked], 1)
            yield self._min_max(grouped.clamp(low[:, :, None], high[:, :, None]))

    def _parts(self, grouped: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Scales of shrunk ranges, and which part of the whole range each covers."""
        span, steps = self._span(grouped)
        # A shrunk range ends on a code: on the largest positive one where the grid is uneven.
        shrunk = max(float(self.high), 0.5) if self.kind == "symfull" else steps
        for sign in (1, -1) if self.kind == "symfull" else (1,):
            yield self.held(span / torch.full_like(span, steps)) * sign, 1.0
            for i in range(RANGES):
                part = 1 - i / 100
                yield self.held(part * span / torch.full_like(span, shrunk)) * sign, part


def _percentile(ranked: Tensor, percentile: float) -> Tensor:
    """Over the last axis of sorted values, with straight lines between them: `[N, groups]`."""
    place = percentile / 100 * (ranked.shape[2] - 1)
    below = min(int(place), max(ranked.shape[2] - 2, 0))
    above = min(below + 1, ranked.shape[2] - 1)
    return torch.lerp(ranked[:, :, below], ranked[:, :, above], place - below)


def dynamic_scales(absmax: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Scales of activations and their inverses, from the largest magnitudes of rows: `absmax / high` and
    `high / absmax`, each one division; 1 and 0 for a row of zeros."""
    small = absmax < TINY
    top = torch.full_like(absmax, high)  # `7 / t` is `t.reciprocal() * 7` in torch: two roundings
    return torch.where(small, 1.0, absmax / top), torch.where(small, 0.0, top / absmax)
