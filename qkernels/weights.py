"""Quantized weights as immutable values: the canonical form that is stored and compared, and packed forms that kernels
want.

A packed layout is a bijection of the canonical form: `pack` and `canonical` undo each other bit for bit, also where N
and K are not multiples of a tile.

Layouts of the CPU backend (64 output channels make a panel; N is padded to 64):

- `vnni64` (Int8Weight): one uint8 buffer of codes `[N/64, K/4, 64, 4]` (K padded to 4 with 0), then `-128 * sum_k
  codes` as int32 `[N]`, the start value of an accumulator whose activations are shifted by 128 to unsigned.
- `nibble64` (Int4Weight): one uint8 buffer `[N/64, K/8, 64, 4]` (K padded to 8 with code 8); byte j of a step
  holds k = j in the low and k = 4 + j in the high nibble. Scales and zeros are float16
  `[N/64, groups, 64]`, padded with scale 0 and zero 8.

Layouts of the GPU backends (rows of K, as tensor cores read them; scales and zeros as in the canonical form):

- `rows16` (Int8Weight): int8 `[N, K]`, K padded to 16 with 0, so that every row starts at 16 bytes.
- `halves128` (Int4Weight): uint8 `[N, K/2]`, K padded to 128 with code 8. Byte `64 * b + j` holds k = 128 b + j in the
  low and k = 128 b + 64 + j in the high nibble, so that a block of bytes unpacks into two runs of k. Nibbles are
  `code ^ 8`, the two's complement of code - 8: `byte << 4` and `byte & 0xF0` are 16 times the values as int8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 64
MAX_K = 65536
TINY = 2.0**-100  # below this the largest magnitude counts as zero
SMALLEST_NORMAL_HALF = 2.0**-14


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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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
        w = _check_matrix(weight)
        if scales is None:
            absmax = w.abs().amax(dim=1)
            scales = torch.where(absmax < TINY, torch.ones_like(absmax), absmax / 127)
        else:
            scales = scales.detach().to(device=w.device, dtype=torch.float32).contiguous()
            if scales.shape != (w.shape[0],) or not (torch.isfinite(scales) & (scales > 0)).all():
                raise ValueError(
                    f"scales must be {w.shape[0]} positive finite numbers, got shape {tuple(scales.shape)}"
                )
        inverse = 1.0 / scales
        codes = torch.round(w * inverse[:, None]).clamp_(-127, 127).to(torch.int8)
        return Int8Weight(codes, scales, (w.shape[0], w.shape[1]))

    def pack(self, layout: str | None = None) -> Int8Weight:
        """The same weight in `layout`; without one, in the layout that the backend of the tensor's device wants."""
        if layout is None:
            layout = _wanted_layout(self)
        if layout == self.layout:
            return self
        if layout == "canonical":
            return self.canonical()
        if layout not in ("vnni64", "rows16"):
            raise ValueError(f"unknown layout '{layout}' of an Int8Weight; known: canonical, vnni64, rows16")
        weight = self.canonical()
        n, k = self.shape
        if layout == "rows16":
            # Where nothing is padded this is the canonical tensor itself.
            return replace(weight, codes=F.pad(weight.codes, (0, -k % 16)) if k % 16 else weight.codes, layout=layout)
        padded_n, padded_k = _round_up(n, PANEL), _round_up(k, 4)
        codes = weight.codes
        if (padded_n, padded_k) != (n, k):
            codes = F.pad(codes, (0, padded_k - k, 0, padded_n - n))
        packed = torch.empty(padded_n * (padded_k + 4), dtype=torch.uint8, device=codes.device)
        words = packed.view(torch.int32)  # four codes move as one
        panels, start = words[: padded_n * padded_k // 4].view(-1, padded_k // 4, PANEL), words[-padded_n:]
        panels.copy_(_bytes_as(codes, torch.int32).view(-1, PANEL, padded_k // 4).transpose(1, 2))
        # A panel at a time: a sum of int8 in int32 makes a copy four times the size of what it sums.
        for rows, sums in zip(codes.split(PANEL), start.split(PANEL), strict=True):
            sums.copy_(rows.sum(dim=1, dtype=torch.int32)).mul_(-128)
        return replace(weight, codes=packed, layout=layout)

    def canonical(self) -> Int8Weight:
        """The same weight in the canonical layout, bit for bit."""
        if self.layout == "canonical":
            return self
        n, k = self.shape
        if self.layout == "rows16":
            return replace(self, codes=self.codes[:, :k].contiguous(), layout="canonical")
        padded_n, padded_k = _round_up(n, PANEL), _round_up(k, 4)
        panels = _bytes_as(self.codes[: padded_n * padded_k], torch.int32).view(padded_n // PANEL, padded_k // 4, PANEL)
        rows = _bytes_as(panels.transpose(1, 2), torch.int8).view(padded_n, padded_k)
        return replace(self, codes=rows[:n, :k].contiguous(), layout="canonical")

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
        n, k = w.shape
        if group >= k:
            group = k
        elif group not in (32, 64, 128):
            raise ValueError(f"group must be 32, 64, 128 or K={k}, got {group}")
        groups = -(-k // group)
        grouped = F.pad(w, (0, groups * group - k)).view(n, groups, group)
        if scales is None:
            # Padding is 0, which changes no maximum of magnitudes, and both bounds of `asym` include 0.
            if symmetric:
                span = grouped.abs().amax(dim=2) / 7.5
            else:
                span = (grouped.amax(dim=2).clamp(min=0) - grouped.amin(dim=2).clamp(max=0)) / 15
            found = span.clamp(min=SMALLEST_NORMAL_HALF).to(torch.float16)
            half_scales = torch.where(span < TINY, torch.ones_like(found), found)
        else:
            half_scales = scales.detach().to(device=w.device, dtype=torch.float16).contiguous()
        if half_scales.shape != (n, groups):
            raise ValueError(f"scales must have shape {(n, groups)}, got {tuple(half_scales.shape)}")
        if not (torch.isfinite(half_scales) & (half_scales.abs() >= SMALLEST_NORMAL_HALF)).all():
            raise ValueError(
                f"scales of an Int4Weight are float16: without sign they must lie between {SMALLEST_NORMAL_HALF:.3g} "
                "and 65504; rescale the weight"
            )
        inverse = (1.0 / half_scales.float())[:, :, None]
        if zeros is not None:
            half_zeros = zeros.detach().to(device=w.device, dtype=torch.float16).contiguous()
            if half_zeros.shape != (n, groups) or not torch.isfinite(half_zeros).all():
                raise ValueError(
                    f"zeros must be finite and of shape {(n, groups)}, got shape {tuple(half_zeros.shape)}"
                )
        elif symmetric:
            half_zeros = None
        else:
            # The value of code 0: the least one, or with a negative scale the greatest.
            lowest = torch.where(half_scales > 0, grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0))
            half_zeros = torch.round(-lowest * inverse[:, :, 0]).clamp(0, 15).to(torch.float16)
        if half_zeros is None:
            codes = torch.round(grouped * inverse) + 8
        else:
            zero = half_zeros.float()[:, :, None]
            whole = zero.floor()
            codes = torch.round(grouped * inverse + (zero - whole)) + whole
        flat = codes.clamp_(0, 15).to(torch.uint8).view(n, groups * group)[:, :k]
        return Int4Weight(_pack_nibbles(flat), half_scales, half_zeros, (n, k), group)

    def pack(self, layout: str | None = None) -> Int4Weight:
        """The same weight in `layout`; without one, in the layout that the backend of the tensor's device wants."""
        if layout is None:
            layout = _wanted_layout(self)
        if layout == self.layout:
            return self
        if layout == "canonical":
            return self.canonical()
        if layout not in ("nibble64", "halves128"):
            raise ValueError(f"unknown layout '{layout}' of an Int4Weight; known: canonical, nibble64, halves128")
        weight = self.canonical()
        n, k = self.shape
        if layout == "halves128":
            width = _round_up(k, 128) // 2
            halves = torch.empty(n, width, dtype=torch.uint8, device=weight.codes.device)
            for rows, packed_rows in zip(weight.codes.split(PANEL), halves.split(PANEL), strict=True):
                codes = F.pad(_unpack_nibbles(rows, k), (0, 2 * width - k), value=8) ^ 8
                blocks = codes.view(len(rows), -1, 2, 64)
                packed_rows.copy_((blocks[:, :, 0] | (blocks[:, :, 1] << 4)).flatten(1))
            return replace(weight, codes=halves, layout=layout)
        padded_n, padded_k = _round_up(n, PANEL), _round_up(k, 8)
        packed = torch.empty(padded_n // PANEL, padded_k // 8, PANEL, 4, dtype=torch.uint8, device=weight.codes.device)
        # A panel at a time, so that codes a byte each never exist for all of the weight.
        for rows, panel in zip(weight.codes.split(PANEL), packed, strict=True):
            codes = F.pad(_unpack_nibbles(rows, k), (0, padded_k - k, 0, PANEL - len(rows)), value=8)
            steps = codes.view(PANEL, padded_k // 8, 2, 4)
            panel.copy_((steps[:, :, 0] | (steps[:, :, 1] << 4)).transpose(0, 1))
        zeros = None if weight.zeros is None else _pack_groups(weight.zeros, padded_n, 8.0)
        scales = _pack_groups(weight.scales, padded_n, 0.0)
        return replace(weight, codes=packed.flatten(), scales=scales, zeros=zeros, layout=layout)

    def canonical(self) -> Int4Weight:
        """The same weight in the canonical layout, bit for bit."""
        if self.layout == "canonical":
            return self
        n, k = self.shape
        if self.layout == "halves128":
            blocks = self.codes.view(n, -1, 64) ^ 0x88
            codes = torch.stack([blocks & 15, blocks >> 4], dim=2).view(n, -1)[:, :k]
            return replace(self, codes=_pack_nibbles(codes), layout="canonical")
        padded_n, padded_k = _round_up(n, PANEL), _round_up(k, 8)
        steps = self.codes.view(padded_n // PANEL, padded_k // 8, PANEL, 4).transpose(1, 2)
        codes = torch.stack([steps & 15, steps >> 4], dim=3).reshape(padded_n, padded_k)[:n, :k]
        zeros = None if self.zeros is None else _unpack_groups(self.zeros, n)
        return replace(
            self, codes=_pack_nibbles(codes), scales=_unpack_groups(self.scales, n), zeros=zeros, layout="canonical"
        )

    def unpacked_codes(self) -> Tensor:
        """The codes one a byte: uint8 `[N, K]`."""
        return _unpack_nibbles(self.canonical().codes, self.shape[1])

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


def _bytes_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor's elements in order, as one dimension of another dtype with the same bytes."""
    flat = tensor.flatten()
    if not flat.is_contiguous() or flat.storage_offset() * flat.element_size() % dtype.itemsize:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(dtype)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 `[N, K]` of 0..15 -> uint8 `[N, ceil(K/2)]`."""
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1), value=8)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def _unpack_nibbles(packed: Tensor, k: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)[:, :k]


def _pack_groups(values: Tensor, padded_n: int, fill: float) -> Tensor:
    n, groups = values.shape
    return (
        F.pad(values, (0, 0, 0, padded_n - n), value=fill)
        .view(padded_n // PANEL, PANEL, groups)
        .transpose(1, 2)
        .contiguous()
    )


def _unpack_groups(values: Tensor, n: int) -> Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:n].contiguous()


def _wanted_layout(weight: Int8Weight | Int4Weight) -> str:
    from qkernels import dispatch

    return dispatch.layout_for(weight)
