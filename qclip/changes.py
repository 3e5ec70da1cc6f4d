"""How what a trained tensor has beyond its base's is stored, in a file of tensors.

`NAME.difference`, int8, and `NAME.step`, float32, one for each row: codes of the change of a float tensor.
`NAME.factors`, codes of 5 bits of the left factor of that change `[N, R]` and of the right one, transposed `[K, R]`,
and `NAME.steps`, float32 `[2, R]`: where it shall be small.
`NAME.moved`: codes of 4 bits, bit for bit, as what they are more than the base's weight has when it is rounded by the
same scales, modulo 16 and deflated: most did not move. A CRC-32 of the codes is stored before them, since rounding has
to come to the same on another machine.
Everything else as it is.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qkernels import Int4Weight
from qkernels.contract import TINY
from qkernels.layouts import pack_bits, unpack_bits

from .errors import ArtifactError
from .models.values import check_values

CODES, STEP = "difference", "step"
FACTORS, STEPS = "factors", "steps"
MOVED = "moved"
LARGE = 4096  # numbers from which the change of a float matrix is stored in few bytes
LARGE_BESIDE_CODES = 65536  # the same in a model that rounds its inputs, where a small change moves some by a step
SHORT = 64  # numbers from which that of a vector is, where the file shall be small
BITS, MOST = 5, 15  # of factors: codes -15 .. 15


def stored(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: Mapping[str, Tensor], size: int | None = None
) -> dict[str, Tensor]:
    """What is stored of a trained model's `tensors`: what the base's `own` have not. `weights`: those of the base that
    have codes in the trained model. Large float changes become codes of 8 bits; with a `size` products of factors, of
    as low a rank as so many bytes ask for."""
    large_from = LARGE_BESIDE_CODES if any(name.endswith(".codes") for name in tensors) else LARGE
    held: dict[str, Tensor] = {}
    large: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before = own.get(name)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            held |= moved(name, tensor, tensors, weights)
        elif torch.equal(before, tensor):
            continue
        elif tensor.dtype == torch.float32 and tensor.ndim > 1 and tensor.numel() >= large_from:
            large[name] = tensor - before
        elif size is not None and tensor.dtype == torch.float32 and tensor.ndim and tensor.numel() >= SHORT:
            held |= coded(name, tensor - before)
        else:
            held[name] = tensor
    if size is not None:
        return held | factored(large, size)
    for name, change in large.items():
        held |= coded(name, change)
    return held


def moved(name: str, tensor: Tensor, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codes of 4 bits by how they moved, anything else as it is. `tensors`: all of the trained model; `weights`: those
    of the base that have codes there."""
    site, _, kind = name.rpartition(".")
    scales, weight = tensors.get(f"{site}.scales"), weights.get(f"{site}.weight")
    if kind != "codes" or scales is None or weight is None or f"{site}.zeros" in tensors:
        return {name: tensor}
    before = _rounded(weight, scales)
    if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
        return {name: tensor}
    change = _halves(tensor, before, -1)
    data = zlib.compress(_checksum(tensor) + change.numpy().tobytes(), 9)
    if len(data) >= tensor.numel():  # of a weight that was rotated or scaled before it was rounded
        return {name: tensor}
    return {f"{name}.{MOVED}": torch.frombuffer(bytearray(data), dtype=torch.uint8)}


def _rounded(weight: Tensor, scales: Tensor) -> Tensor | None:
    """The base's codes by these scales `[N, groups]`: two in a byte; None where they are of no such layer."""
    width = weight.flatten(1).shape[1] if weight.ndim > 1 else 0
    fitting = [g for g in (width, 128, 64, 32) if g and scales.ndim == 2 and -(-width // g) == scales.shape[1]]
    if not fitting or len(scales) != len(weight) or scales.dtype != torch.float16:
        return None
    try:
        return Int4Weight.quantize(weight.flatten(1), fitting[0], scales=scales.float()).codes
    except ValueError:  # scales that no such layer has
        return None


def _halves(left: Tensor, right: Tensor, sign: int) -> Tensor:
    """`left + sign * right` of both codes in a byte, modulo 16."""
    low, high = ((a.short() + sign * b.short()) & 15 for a, b in ((left & 15, right & 15), (left >> 4, right >> 4)))
    return (low | high << 4).to(torch.uint8)


def _checksum(codes: Tensor) -> bytes:
    return zlib.crc32(codes.numpy().tobytes()).to_bytes(4, "little")


def coded(name: str, change: Tensor) -> dict[str, Tensor]:
    """A float change in codes of 8 bits."""
    step = _rows(change).abs().amax(1) / 127
    codes = torch.round(_rows(change) / step.clamp(min=TINY)[:, None]).view(change.shape)
    return {f"{name}.{CODES}": codes.to(torch.int8), f"{name}.{STEP}": step}


def _rows(tensor: Tensor) -> Tensor:
    """`[N, K]`; a vector is one row."""
    return tensor.reshape(1, -1) if tensor.ndim == 1 else tensor.flatten(1)


def factored(changes: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """As products of factors: of the singular directions of all of them those with the most power per byte."""
    parts = {name: torch.linalg.svd(_rows(change).double(), full_matrices=False) for name, change in changes.items()}
    bytes_each = {name: (len(u) + vh.shape[1]) * BITS / 8 + 8 for name, (u, _, vh) in parts.items()}
    worth = [(float(s) ** 2 / bytes_each[name], name) for name, (_, values, _) in parts.items() for s in values]
    ranks: Counter[str] = Counter()
    spent = 0.0
    for _, name in sorted(worth, reverse=True):
        spent += bytes_each[name]
        if spent > size:
            break
        ranks[name] += 1
    out: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        u, values, vh = parts[name]
        root = values[:rank].sqrt()
        both = [u[:, :rank] * root, vh[:rank].T * root]
        steps = torch.stack([each.abs().amax(0) / MOST for each in both]).float().clamp(min=TINY)
        codes = torch.cat([(each / step).round() + MOST for each, step in zip(both, steps, strict=True)])
        out |= {f"{name}.{FACTORS}": pack_bits(codes.to(torch.uint8), BITS), f"{name}.{STEPS}": steps}
    return out


def whole(
    held: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The tensors that a file holds, in full. `own`: the base's; `weights`: those of the base that have codes here.
    Raises ArtifactError naming the `file` for codes that change nothing of the base."""
    out = {}
    for name, tensor in held.items():
        of, _, kind = name.rpartition(".")
        if kind == MOVED:
            site = of.removesuffix(".codes")
            out[of] = _back(name, tensor, weights.get(f"{site}.weight"), held.get(f"{site}.scales"), file)
        elif kind in (CODES, FACTORS):
            out[of] = _changed(name, held, own.get(of), file)
        elif not ((kind == STEP and f"{of}.{CODES}" in held) or (kind == STEPS and f"{of}.{FACTORS}" in held)):
            out[name] = tensor
    return out


def _changed(name: str, held: Mapping[str, Tensor], before: Tensor | None, file: Path) -> Tensor:
    """A float tensor of the base with its change."""
    of, _, kind = name.rpartition(".")
    wanted, of_steps, change = {
        CODES: (torch.int8, f"{of}.{STEP}", _stepped),
        FACTORS: (torch.uint8, f"{of}.{STEPS}", _multiplied),
    }[kind]
    codes, step = held[name], held.get(of_steps)
    if before is None or before.dtype != torch.float32 or not before.ndim or codes.dtype != wanted:
        raise ArtifactError(f"{name!r} in {str(file)!r} is no change of a tensor of the base")
    if step is None or step.dtype != torch.float32:
        raise ArtifactError(f"{name!r} in {str(file)!r} has no steps")
    check_values(of_steps, step, str(file), ArtifactError)
    return before + change(name, codes, step, before.shape, file)


def _back(name: str, data: Tensor, weight: Tensor | None, scales: Tensor | None, file: Path) -> Tensor:
    before = None if weight is None or scales is None else _rounded(weight, scales)
    if before is None or data.dtype != torch.uint8 or data.ndim != 1:
        raise ArtifactError(f"{name!r} in {str(file)!r} is no change of a weight of the base")
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data.numpy().tobytes(), 4 + before.numel())
    except zlib.error as error:
        raise ArtifactError(f"{name!r} in {str(file)!r} cannot be unpacked ({error})") from None
    if len(found) != 4 + before.numel() or not stream.eof or stream.unused_data:
        raise ArtifactError(f"{name!r} in {str(file)!r} holds another number of codes than the base's weight has")
    codes = _halves(before, torch.frombuffer(bytearray(found[4:]), dtype=torch.uint8).view(before.shape), 1)
    if _checksum(codes) != found[:4]:
        raise ArtifactError(
            f"the codes that {name!r} in {str(file)!r} comes to are not those that were stored: the base's weights are "
            "rounded otherwise here; train it again, or report this with your versions of torch and qclip"
        )
    return codes


def _product(packed: Tensor, steps: Tensor, shape: torch.Size) -> Tensor:
    """Raises ValueError and TypeError where these are no factors of that."""
    rows, rank = shape[0], steps.shape[1]
    columns = shape.numel() // rows
    codes = unpack_bits(packed, BITS, (rows + columns) * rank).view(-1, rank).double() - MOST
    left, right = codes[:rows] * steps[0].double(), codes[rows:] * steps[1].double()
    return (left @ right.T).float().view(shape)


def _stepped(name: str, codes: Tensor, step: Tensor, shape: torch.Size, file: Path) -> Tensor:
    if codes.shape != shape:
        raise ArtifactError(f"{name!r} in {str(file)!r} is no change of a tensor of the base")
    if tuple(step.shape) != (len(_rows(codes)),):
        raise ArtifactError(f"{name!r} in {str(file)!r} has steps {tuple(step.shape)}, not one for each row")
    return (_rows(codes).float() * step[:, None]).view(shape)


def _multiplied(name: str, packed: Tensor, steps: Tensor, shape: torch.Size, file: Path) -> Tensor:
    most = min(shape[0], shape.numel() // shape[0])
    if len(shape) < 2 or steps.ndim != 2 or len(steps) != 2 or not 1 <= steps.shape[1] <= most:
        raise ArtifactError(f"{name!r} in {str(file)!r} has steps {tuple(steps.shape)}, not two for each of its ranks")
    try:
        return _product(packed, steps, shape)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{name!r} in {str(file)!r} holds no two factors ({error})") from None
