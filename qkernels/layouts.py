"""How codes lie in memory, as the kernels of a backend read them, and on disk.

Every function has its inverse, bit for bit, also where N and K are not multiples of a tile. `codes` are int8 `[N, K]`
for 8 bits, and for 4 bits *nibbles*, the canonical form: uint8 `[N, ceil(K/2)]`, even k in the low nibble, an unused
one 8.

Layouts of the CPU backend (64 output channels make a panel; N is padded to 64):

- `vnni64` (8 bits): one uint8 buffer of codes `[N/64, K/4, 64, 4]` (K padded to 4 with 0), then `-128 * sum_k codes` as
  int32 `[N]`, the start value of an accumulator whose activations are shifted by 128 to unsigned, then the largest
  magnitude of a code as int32: where it is at most 64, AVX2 multiplies by instructions that would else saturate.
- `nibble64` (4 bits): one uint8 buffer `[N/64, K/8, 64, 4]` (K padded to 8 with code 8); byte j of a step holds k = j
  in the low and k = 4 + j in the high nibble. Scales and zeros are float16 `[N/64, groups, 64]`, padded with scale 0
  and zero 8.

Layouts of the GPU backends (rows of K, as tensor cores read them; scales and zeros as in the canonical form):

- `rows16` (8 bits): int8 `[N, K]`, K padded to 16 with 0, so that every row starts at 16 bytes.
- `halves128` (4 bits): uint8 `[N, K/2]`, K padded to 128 with code 8. Byte `64 * b + j` holds k = 128 b + j in the low
  and k = 128 b + 64 + j in the high nibble, so that a block of bytes unpacks into two runs of k. Nibbles are
  `code ^ 8`, the two's complement of code - 8: `byte << 4` and `byte & 0xF0` are 16 times the values as int8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 64


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# -- 8 bits ----------------------------------------------------------------------------------------------------------


def to_rows16(codes: Tensor) -> Tensor:
    """Where nothing is padded this is the canonical tensor itself."""
    k = codes.shape[1]
    return F.pad(codes, (0, -k % 16)) if k % 16 else codes


def from_rows16(rows: Tensor, n: int, k: int) -> Tensor:
    return rows[:, :k].contiguous()


def vnni64_bytes(n: int, k: int) -> int:
    return _round_up(n, PANEL) * (_round_up(k, 4) + 4) + 4


def to_vnni64(codes: Tensor) -> Tensor:
    n, k = codes.shape
    padded_n, padded_k = _round_up(n, PANEL), _round_up(k, 4)
    if (padded_n, padded_k) != (n, k):
        codes = F.pad(codes, (0, padded_k - k, 0, padded_n - n))
    packed = torch.empty(vnni64_bytes(n, k), dtype=torch.uint8, device=codes.device)
    words = packed.view(torch.int32)  # four codes move as one
    panels, start = words[: padded_n * padded_k // 4].view(-1, padded_k // 4, PANEL), words[-padded_n - 1 : -1]
    panels.copy_(_bytes_as(codes, torch.int32).view(-1, PANEL, padded_k // 4).transpose(1, 2))
    # A panel at a time: a sum of int8 in int32 makes a copy four times the size of what it sums.
    for rows, sums in zip(codes.split(PANEL), start.split(PANEL), strict=True):
        sums.copy_(rows.sum(dim=1, dtype=torch.int32)).mul_(-128)
    low, high = torch.aminmax(codes)
    words[-1] = torch.maximum(-low.int(), high.int())
    return packed


def from_vnni64(packed: Tensor, n: int, k: int) -> Tensor:
    padded_n, padded_k = _round_up(n, PANEL), _round_up(k, 4)
    panels = _bytes_as(packed[: padded_n * padded_k], torch.int32).view(padded_n // PANEL, padded_k // 4, PANEL)
    rows = _bytes_as(panels.transpose(1, 2), torch.int8).view(padded_n, padded_k)
    return rows[:n, :k].contiguous()


def _bytes_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor's elements in order, as one dimension of another dtype with the same bytes."""
    flat = tensor.flatten()
    if not flat.is_contiguous() or flat.storage_offset() * flat.element_size() % dtype.itemsize:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(dtype)


# -- 4 bits ----------------------------------------------------------------------------------------------------------


def to_nibbles(codes: Tensor) -> Tensor:
    """uint8 `[N, K]` of 0..15 -> uint8 `[N, ceil(K/2)]`."""
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1), value=8)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def from_nibbles(nibbles: Tensor, k: int) -> Tensor:
    return torch.stack([nibbles & 15, nibbles >> 4], dim=2).view(nibbles.shape[0], -1)[:, :k]


def to_nibble64(nibbles: Tensor, k: int) -> Tensor:
    padded_n, padded_k = _round_up(len(nibbles), PANEL), _round_up(k, 8)
    packed = torch.empty(padded_n // PANEL, padded_k // 8, PANEL, 4, dtype=torch.uint8, device=nibbles.device)
    # A panel at a time, so that codes of one byte each never exist for all of the weight.
    for rows, panel in zip(nibbles.split(PANEL), packed, strict=True):
        codes = F.pad(from_nibbles(rows, k), (0, padded_k - k, 0, PANEL - len(rows)), value=8)
        steps = codes.view(PANEL, padded_k // 8, 2, 4)
        panel.copy_((steps[:, :, 0] | (steps[:, :, 1] << 4)).transpose(0, 1))
    return packed.flatten()


def from_nibble64(packed: Tensor, n: int, k: int) -> Tensor:
    padded_n, padded_k = _round_up(n, PANEL), _round_up(k, 8)
    steps = packed.view(padded_n // PANEL, padded_k // 8, PANEL, 4).transpose(1, 2)
    return to_nibbles(torch.stack([steps & 15, steps >> 4], dim=3).reshape(padded_n, padded_k)[:n, :k])


def to_halves128(nibbles: Tensor, k: int) -> Tensor:
    width = _round_up(k, 128) // 2
    halves = torch.empty(len(nibbles), width, dtype=torch.uint8, device=nibbles.device)
    for rows, packed_rows in zip(nibbles.split(PANEL), halves.split(PANEL), strict=True):
        codes = F.pad(from_nibbles(rows, k), (0, 2 * width - k), value=8) ^ 8
        blocks = codes.view(len(rows), -1, 2, 64)
        packed_rows.copy_((blocks[:, :, 0] | (blocks[:, :, 1] << 4)).flatten(1))
    return halves


def from_halves128(halves: Tensor, n: int, k: int) -> Tensor:
    blocks = halves.view(n, -1, 64) ^ 0x88
    return to_nibbles(torch.stack([blocks & 15, blocks >> 4], dim=2).view(n, -1)[:, :k])


def groups_to_panels(values: Tensor, fill: float) -> Tensor:
    """Scales or zeros `[N, groups]` -> `[N/64, groups, 64]`, padded with `fill`."""
    n, groups = values.shape
    padded = F.pad(values, (0, 0, 0, -n % PANEL), value=fill)
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def groups_from_panels(values: Tensor, n: int) -> Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:n].contiguous()


# -- codes in few bits -----------------------------------------------------------------------------------------------


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape, uint8 0 .. 2^bits - 1, in `bits` bits each: uint8 `[ceil(count * bits / 8)]`.

    Code i takes bits `i * bits` and above, the lowest first; byte j holds bits 8j .. 8j + 7, and what is left of the
    last byte is 0. Raises ValueError where a code has more bits. 8 codes make `bits` bytes.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes to pack must be uint8, got {codes.dtype}; subtract the grid's least code first")
    flat = codes.flatten()
    if bits < 8 and flat.numel() and int(flat.max()) >= 2**bits:
        raise ValueError(f"a code of {int(flat.max())} does not fit into {bits} bits")
    eights = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    packed = torch.zeros(len(eights), bits, dtype=torch.uint8, device=flat.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[:, byte] |= eights[:, i] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= eights[:, i] >> (8 - shift)
    return packed.flatten()[: _bytes(len(flat), bits)].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes that `pack_bits` packed: uint8 `[count]`. Raises ValueError where `packed` is no result of it:
    too short or too long, or with bits set behind the last code."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise TypeError(
            f"packed codes must be one-dimensional uint8, got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"the number of packed codes must be at least 0, got {count}")
    if len(packed) != _bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {_bytes(count, bits)} bytes, got {len(packed)}")
    if count * bits % 8 and int(packed[-1]) >> (count * bits % 8):
        raise ValueError(f"packed codes have bits set behind the last of {count} codes of {bits} bits")
    rows = F.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    codes = torch.empty(len(rows), 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = rows[:, byte] >> shift
        if shift + bits > 8:
            code = code | (rows[:, byte + 1] << (8 - shift))
        codes[:, i] = code & (2**bits - 1)
    return codes.flatten()[:count].clone()


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, got {bits}")


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
