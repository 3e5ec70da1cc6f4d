"""Quantized weights as immutable values: the canonical form that is stored and compared, and packed forms that kernels
want.

A packed layout is a bijection of the canonical form (`qkernels.layouts`): `pack` and `canonical` undo each other bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import layouts
from .contract import MAX_K, SMALLEST_NORMAL_HALF, WEIGHT_GROUPS
from .grids import Grid
from .layouts import pack_bits, unpack_bits

__all__ = [
    "Int4Weight",
    "Int8Weight",
    "Weight",
    "grid_scales",
    "lay_side_by_side",
    "levels",
    "pack_bits",
    "quantize_weight",
    "side_by_side",
    "unpack_bits",
    "weight_from_codes",
    "weight_from_levels",
    "zero_point_bias",
]


def _check_matrix(weight: Tensor) -> Tensor:
    """The weight as contiguous float32 `[N, K]`, or a ValueError that says what is wrong."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight must be a float matrix [N, K], got {weight.dtype} of shape {tuple(weight.shape)}")
    n, k = weight.shape
    if n == 0 or k == 0 or k > MAX_K:
        raise ValueError(f"a weight must have N >= 1 and 1 <= K <= {MAX_K}, got shape {(n, k)}")
    if not torch.isfinite(weight).all():
        row = int((~torch.isfinite(weight)).any(dim=1).nonzero()[0])
        raise ValueError(
            f"the weight of shape {(n, k)} has a NaN or infinite value in row {row}; it cannot be quantized"
        )
    return weight.detach().to(torch.float32).contiguous()


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """Codes -127..127 with one float32 scale per output channel: `value[n, k] = scales[n] * codes[n, k]`.

    `codes` is int8 `[N, K]` in the canonical layout and a one-dimensional uint8 buffer in a packed one.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    layout: str = "canonical"

    @staticmethod
    def quantize(weight: Tensor, scales: Tensor | None = None) -> Int8Weight:
        """Quantize float `[N, K]` on the grid `sym`, per output channel.

        Without `scales` (float32 `[N]`, positive) they are `max|row| / 127`, and 1 for a row of zeros. Codes follow the
        static rule: `clamp(rne(w * (1 / scale)), -127, 127)`. Raises ValueError on NaN, Inf, empty or too large weights
        and on bad scales.
        """
        if scales is not None and (len(scales) != len(weight) or not (scales > 0).all()):
            raise ValueError(f"scales must be {len(weight)} positive finite numbers, got shape {tuple(scales.shape)}")
        quantized = quantize_weight(weight, Grid(8, "sym"), scales)
        assert isinstance(quantized, Int8Weight)
        return quantized

    def pack(self, layout: str) -> Int8Weight:
        """The same weight in `layout`; `qkernels.pack(weight)` takes the one that the backend of its device wants."""
        if layout == self.layout:
            return self
        if layout == "canonical":
            return self.canonical()
        if layout not in ("vnni64", "rows16"):
            raise ValueError(f"unknown layout '{layout}' of an Int8Weight; known: canonical, vnni64, rows16")
        codes = self.canonical().codes
        packed = layouts.to_rows16(codes) if layout == "rows16" else layouts.to_vnni64(codes)
        return replace(self, codes=packed, layout=layout)

    def canonical(self) -> Int8Weight:
        """The same weight in the canonical layout, bit for bit."""
        if self.layout == "canonical":
            return self
        unpack = layouts.from_rows16 if self.layout == "rows16" else layouts.from_vnni64
        return replace(self, codes=unpack(self.codes, *self.shape), layout="canonical")

    def dequantize(self) -> Tensor:
        """Float32 `[N, K]`."""
        weight = self.canonical()
        return weight.codes.to(torch.float32) * weight.scales[:, None]


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """Codes 0..15 with float16 scales (and zeros) per group of `group` input channels: `value = scale * (code - zero)`.

    `codes` is uint8 `[N, ceil(K/2)]` in the canonical layout, even k in the low nibble and an unused nibble 8; `scales`
    and `zeros` are float16 `[N, ceil(K/group)]`; `zeros=None` is symmetric with zero 8. The last group may be short.
    `group` is 32, 64, 128 or K.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group: int
    layout: str = "canonical"

    @staticmethod
    def quantize(
        weight: Tensor,
        group: int = 128,
        symmetric: bool = True,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> Int4Weight:
        """Quantize float `[N, K]` by min-max per group: grid `symfull` (zero 8), or `asym` with `symmetric=False`.

        `scales` and `zeros` (float `[N, ceil(K/group)]`) override the search; `zeros` may be fractional, and a negative
        scale turns the grid around (`symfull`: -7 .. 8 steps). Codes are computed with the float16-rounded values:
        `clamp(rne(w / scale + fraction(zero)) + floor(zero), 0, 15)`, where `w / scale` is a product with `1 / scale`.
        Scales found here are positive and kept at or above the smallest normal float16; given ones of a magnitude below
        it raise ValueError, as do NaN, Inf and wrong shapes.
        """
        w = _check_matrix(weight)
        grid = Grid(4, "symfull" if symmetric else "asym", min(group, w.shape[1]))
        if zeros is not None:  # with the scales of the range that was asked for
            scales, grid = grid.fit(w)[0] if scales is None else scales, replace(grid, kind="floatzero")
        quantized = quantize_weight(w, grid, scales, zeros)
        assert isinstance(quantized, Int4Weight)
        return quantized

    def pack(self, layout: str) -> Int4Weight:
        """The same weight in `layout`; `qkernels.pack(weight)` takes the one that the backend of its device wants."""
        if layout == self.layout:
            return self
        if layout == "canonical":
            return self.canonical()
        if layout not in ("nibble64", "halves128"):
            raise ValueError(f"unknown layout '{layout}' of an Int4Weight; known: canonical, nibble64, halves128")
        weight, k = self.canonical(), self.shape[1]
        if layout == "halves128":
            return replace(weight, codes=layouts.to_halves128(weight.codes, k), layout=layout)
        zeros = None if weight.zeros is None else layouts.groups_to_panels(weight.zeros, 8.0)
        scales = layouts.groups_to_panels(weight.scales, 0.0)
        return replace(weight, codes=layouts.to_nibble64(weight.codes, k), scales=scales, zeros=zeros, layout=layout)

    def canonical(self) -> Int4Weight:
        """The same weight in the canonical layout, bit for bit."""
        if self.layout == "canonical":
            return self
        n, k = self.shape
        if self.layout == "halves128":
            return replace(self, codes=layouts.from_halves128(self.codes, n, k), layout="canonical")
        scales = layouts.groups_from_panels(self.scales, n)
        zeros = None if self.zeros is None else layouts.groups_from_panels(self.zeros, n)
        codes = layouts.from_nibble64(self.codes, n, k)
        return replace(self, codes=codes, scales=scales, zeros=zeros, layout="canonical")

    def unpacked_codes(self) -> Tensor:
        """The codes, one per byte: uint8 `[N, K]`."""
        return layouts.from_nibbles(self.canonical().codes, self.shape[1])

    def dequantize(self) -> Tensor:
        """Float32 `[N, K]`: `scale * (code - zero)`."""
        weight = self.canonical()
        k = self.shape[1]
        scales = weight.scales.float().repeat_interleave(self.group, dim=1)[:, :k]
        if weight.zeros is None:
            return scales * (weight.unpacked_codes().float() - 8)
        return scales * (
            weight.unpacked_codes().float() - weight.zeros.float().repeat_interleave(self.group, dim=1)[:, :k]
        )


def lay_side_by_side(tensors: list[Tensor]) -> list[Tensor]:
    """The same rows, now one behind the other in one storage, which `side_by_side` can see as one tensor."""
    return list(torch.cat(tensors).split([len(tensor) for tensor in tensors]))


def side_by_side(tensors: list[Tensor]) -> Tensor | None:
    """All rows of contiguous tensors as one tensor, without a copy; None where they do not lie in memory like that."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.shape[1:] != first.shape[1:]
            or not tensor.is_contiguous()
            or tensor.storage_offset() != end
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        end += tensor.numel()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride(), first.storage_offset())


Weight = Int8Weight | Int4Weight


def quantize_weight(weight: Tensor, grid: Grid, scales: Tensor | None = None, zeros: Tensor | None = None) -> Weight:
    """Round float `[N, K]` to the nearest codes of `grid`, in the container whose kernels multiply it.

    Without `scales` (float `[N, groups]`, or `[N]` for one group) they and the zeros are those of `grid.fit(weight)`;
    without `zeros`, where the grid has them, those of `grid.zeros`. Codes are computed with the numbers that are
    stored, so with scales and zeros rounded to float16 in an Int4Weight. Raises ValueError on NaN, Inf, empty or too
    large weights, on scales that the container cannot hold, and on grids without a container.
    """
    w = _check_matrix(weight)
    if scales is None:
        scales, found = grid.fit(w)
        zeros = found if zeros is None else zeros
    scales, zeros = _check_scales(w, grid, scales, zeros)
    zeros = grid.zeros(w, scales) if zeros is None else zeros
    grouped = grid.grouped(w)
    codes = grid.encode(grouped, scales[:, :, None], None if zeros is None else zeros[:, :, None])
    return _contain(codes.flatten(1)[:, : w.shape[1]], grid, scales, zeros)


def weight_from_codes(codes: Tensor, grid: Grid, scales: Tensor, zeros: Tensor | None = None) -> Weight:
    """The weight of codes `[N, K]` that were found elsewhere: whole numbers `grid.low .. grid.high` of any dtype.

    `scales`, and `zeros` where the grid has them: float `[N, groups]`, or `[N]` for one group. Raises ValueError on
    codes outside the grid and, as `quantize_weight` does, on scales, zeros and grids.
    """
    if codes.dim() != 2 or codes.shape[0] == 0 or not 1 <= codes.shape[1] <= MAX_K:
        raise ValueError(f"codes must be [N, K] with N >= 1 and 1 <= K <= {MAX_K}, got shape {tuple(codes.shape)}")
    whole = codes.to(torch.float32)
    if not ((whole >= grid.low) & (whole <= grid.high) & (whole == whole.round())).all():
        raise ValueError(f"codes of {grid} must be whole numbers {grid.low} .. {grid.high}")
    scales, zeros = _check_scales(codes, grid, scales, zeros)
    if grid.zero is None and zeros is None:
        raise ValueError(f"{grid} has a zero for every scale; give zeros with the codes")
    return _contain(whole, grid, scales, zeros)


def _check_scales(weight: Tensor, grid: Grid, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Float32 `[N, groups]`, with the values that the container of `grid` holds."""
    kind, n, k = grid.container, *weight.shape
    group = k if grid.group is None else min(grid.group, k)
    if kind == "Int4Weight" and group not in (*WEIGHT_GROUPS, k):
        raise ValueError(f"group must be 32, 64, 128 or K={k}, got {group}")
    wanted = (n, -(-k // group))
    scales = scales.detach().to(device=weight.device, dtype=torch.float32)
    scales = scales[:, None] if scales.dim() == 1 else scales
    if kind == "Int8Weight":
        if scales.shape != wanted or not (scales.isfinite() & (1 / scales).isfinite()).all():
            raise ValueError(
                f"scales of an Int8Weight must be {n} finite numbers with finite reciprocals, "
                f"got shape {tuple(scales.shape)}"
            )
    else:
        scales = scales.half().float()
        if scales.shape != wanted:
            raise ValueError(f"scales must have shape {wanted}, got {tuple(scales.shape)}")
        if not (torch.isfinite(scales) & (scales.abs() >= SMALLEST_NORMAL_HALF)).all():
            raise ValueError(
                f"scales of an Int4Weight are float16: without sign they must lie between {SMALLEST_NORMAL_HALF:.3g} "
                "and 65504; rescale the weight"
            )
    if zeros is None:
        return scales, None
    if grid.zero is not None:
        raise ValueError(f"{grid} has the zero {grid.zero:g}; leave zeros out, or use kind 'asym' or 'floatzero'")
    zeros = zeros.detach().to(device=weight.device, dtype=torch.float32).half().float()
    zeros = zeros[:, None] if zeros.dim() == 1 else zeros
    if zeros.shape != wanted or not torch.isfinite(zeros).all():
        raise ValueError(f"zeros must be finite and of shape {wanted}, got shape {tuple(zeros.shape)}")
    return scales, zeros


def _contain(codes: Tensor, grid: Grid, scales: Tensor, zeros: Tensor | None) -> Weight:
    """Checked codes `[N, K]`, scales and zeros `[N, groups]` in the container of `grid`."""
    n, k = codes.shape
    if grid.container == "Int8Weight":
        if grid.kind == "midrise":  # t * (c - (2^b - 1) / 2) = t / 2 * (2c - (2^b - 1))
            return Int8Weight((2 * codes - grid.high).to(torch.int8), scales[:, 0] / 2, (n, k))
        return Int8Weight(codes.to(torch.int8), scales[:, 0].contiguous(), (n, k))
    if grid.kind == "midrise":
        zeros = torch.full_like(scales, float(grid.high) / 2)
    nibbles = (codes if zeros is not None else codes + 8).to(torch.uint8)
    group = k if grid.group is None else min(grid.group, k)
    return Int4Weight(
        layouts.to_nibbles(nibbles), scales.half(), None if zeros is None else zeros.half(), (n, k), group
    )


def levels(weight: Weight, grid: Grid) -> Tensor:
    """The codes of a weight that was made on `grid` as uint8 `[N, K]`, 0 .. 2^bits - 1 (`sym`: one less): what
    `pack_bits` packs. Raises ValueError where the weight has other codes or another container."""
    if type(weight).__name__ != grid.container:
        raise ValueError(f"{grid} is held in an {grid.container}, not in an {type(weight).__name__}")
    if isinstance(weight, Int4Weight):
        if (weight.zeros is None) != (grid.zero == 0):
            raise ValueError(f"this weight was not made on {grid}: it has {'no ' * (weight.zeros is None)}zeros")
        found = weight.unpacked_codes().short() - (0 if weight.zeros is not None else 8 + grid.low)
    else:
        found = weight.canonical().codes.short()
        if grid.kind == "midrise":
            found = found + grid.high
            if (found & 1).any():
                raise ValueError(f"this weight was not made on {grid}: it has even codes")
            found = found // 2
        else:
            found = found - grid.low
    if ((found < 0) | (found > grid.high - grid.low)).any():
        raise ValueError(f"this weight was not made on {grid}: it has codes outside it")
    return found.to(torch.uint8)


def grid_scales(weight: Weight, grid: Grid) -> Tensor:
    """The scales of a weight that was made on `grid`, as `grid.fit` gives them: float32 `[N, groups]`."""
    scales = weight.canonical().scales.float()
    if isinstance(weight, Int4Weight):
        return scales
    return scales[:, None] * (2 if grid.kind == "midrise" else 1)  # whose codes are held as odd ones of half a step


def weight_from_levels(levels: Tensor, grid: Grid, scales: Tensor, zeros: Tensor | None = None) -> Weight:
    """The weight whose `levels(weight, grid)` are given; `scales` and `zeros` as that weight holds them. Bit for bit.
    Raises ValueError on levels outside the grid."""
    if levels.dtype != torch.uint8 or levels.dim() != 2 or (levels > grid.high - grid.low).any():
        raise ValueError(f"levels of {grid} must be uint8 [N, K] up to {grid.high - grid.low}")
    codes = levels.to(torch.int16) + grid.low
    if grid.container == "Int4Weight":
        nibbles = (codes if zeros is not None else codes + 8).to(torch.uint8)
        n, k = levels.shape
        return Int4Weight(
            layouts.to_nibbles(nibbles), scales, zeros, (n, k), k if grid.group is None else min(grid.group, k)
        )
    codes = 2 * codes - grid.high if grid.kind == "midrise" else codes
    return Int8Weight(codes.to(torch.int8), scales, (levels.shape[0], levels.shape[1]))


def zero_point_bias(
    weight: Weight, x_scale: Tensor | float, zero_point: Tensor | int, bias: Tensor | None = None
) -> Tensor:
    """The bias, float32 `[N]`, with which a linear op takes codes that have a static zero point.

    `quantize_per_token(x, scale=s, zero_point=z)` writes `codes = x / s + z`, and the linear ops multiply codes as they
    are, so `- s * z * sum_k weight[n, k]` goes into the bias once: `int8_linear(codes, scales, weight,
    zero_point_bias(weight, s, z, bias))`. Summed in float64. Keep it in float32: it can be much larger than the result.
    """
    canonical = weight.canonical()
    if isinstance(canonical, Int8Weight):
        sums = canonical.codes.sum(1, dtype=torch.int64).double() * canonical.scales.double()
    else:
        sums = canonical.dequantize().double().sum(1)
    scale = torch.as_tensor(x_scale, dtype=torch.float32, device=sums.device).double().reshape(())
    shift = torch.as_tensor(zero_point, device=sums.device).double().reshape(())
    correction = -scale * shift * sums
    return (correction if bias is None else bias.detach().double() + correction).float()
