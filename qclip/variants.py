"""A trained model as its difference to the float model that it was trained from: what the base has is not stored again.

A folder like an artifact's: `qclip.json` describes the whole model, `difference.safetensors` holds the tensors that the
base does not have, bit for bit. Lookups of tokens are rounded again from the base's. Large float tensors may be stored
as codes of their change: `NAME.difference`, int8, and `NAME.step`, float32, one for each row; or as two factors of it:
`NAME.factors`, codes of 5 bits of the left one `[N, R]` and of the right one, transposed `[K, R]`, and `NAME.steps`,
float32 `[2, R]`.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qkernels.contract import TINY
from qkernels.layouts import pack_bits, unpack_bits

from . import artifact, description, models, ptq, rewrite
from .errors import ArtifactError, ModelError
from .files import whole_folder
from .models.values import check_values
from .recipes import FLOAT, Recipe, Treatment
from .untrusted import TensorFile, open_regular
from .untrusted.tensors import TensorFacts

FILE = "difference.safetensors"
CODES, STEP = "difference", "step"
CODED = 4096  # numbers from which the change of a float tensor is stored in codes
FACTORS, STEPS = "factors", "steps"
BITS, MOST = 5, 15  # of factors: codes -15 .. 15
SHORT = 64  # numbers from which that of a vector is, where the file shall be small
NAMES = {dtype: name for name, dtype in artifact.TYPES.items()}


def save(
    source: str | Path, base: nn.Module, path: str | Path, card: dict[str, Any], readme: str, size: int | None = None
) -> Path:
    """Write what the artifact `source` has and `base` has not, with a card. Changes of large float tensors become codes
    of 8 bits, so that a float model comes back nearly as it was; codes and scales of layers come back bit for bit.
    `size`: bytes that these may take; they then become products of two factors, of as low a rank as that asks for, and
    the model is the less like the one that was trained.
    Raises ModelError where `source` was not trained from `base`."""
    source = Path(source)
    content = _without_folders(artifact.read_description(source))
    trained = artifact.load(source)
    own = _base(base, content)
    if own is None:
        raise ModelError(f"{str(source)!r} was not trained from the model that is to be its base")
    held: dict[str, Tensor] = {}
    large: dict[str, Tensor] = {}
    for name, tensor in artifact.tensors_of(trained).items():
        before = own.get(name)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            held[name] = tensor
        elif torch.equal(before, tensor):
            continue
        elif tensor.dtype == torch.float32 and tensor.ndim > 1 and tensor.numel() >= CODED:
            large[name] = tensor - before
        elif size is not None and tensor.dtype == torch.float32 and tensor.ndim and tensor.numel() >= SHORT:
            held |= _coded(name, tensor - before)
        else:
            held[name] = tensor
    for name, change in large.items() if size is None else ():
        held |= _coded(name, change)
    held |= {} if size is None else _factored(large, size)
    data = safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in held.items()})
    with whole_folder(path, last=artifact.DESCRIPTION, alone=True) as fresh:
        (fresh / FILE).write_bytes(data)
        content["tensors_sha256"], content["tensors_bytes"] = artifact.file_hash(fresh / FILE), len(data)
        content["description_sha256"] = artifact.description_hash(content)
        (fresh / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(readme, encoding="utf-8")
        (fresh / artifact.DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")
    return Path(path)


def _without_folders(value: Any) -> Any:
    """A description whose data names end in a file's name: where it lay concerns nobody else."""
    if isinstance(value, dict):
        return {
            key: re.sub(r"(?<=:)/[^:?]*/", "", found)
            if key == "source" and isinstance(found, str)
            else _without_folders(found)
            for key, found in value.items()
        }
    return [_without_folders(each) for each in value] if isinstance(value, list) else value


def load(path: str | Path, base: nn.Module, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a difference and its base, checked as an artifact is before anything is built. Raises
    ArtifactError, also where it is the difference to another model."""
    path = Path(path)
    content = artifact.read_description(path)
    file, header = artifact.checked_file(path, FILE, content)
    own = _base(base, content)
    if own is None:
        raise ArtifactError(f"{str(path)!r} is the difference to another model than the one that was given as its base")
    whole = own | _changed(file, header, own)
    facts: TensorFile = {name: TensorFacts(NAMES[t.dtype], tuple(t.shape), 0, 0) for name, t in whole.items()}
    description.check_tensors(content, facts, str(file))
    return artifact.assemble(content, file, facts, lambda _: whole.items(), device)


def _base(base: nn.Module, content: dict[str, Any]) -> dict[str, Tensor] | None:
    """What the base has of the described model: its float tensors in explicit form but weights that have codes there,
    its lookups with codes where these have; None where it is another model."""
    base = copy.deepcopy(base).float()  # as training began
    towers = models.towers(base)
    if rewrite.weight_hash(base) != content["provenance"].get("source_sha256"):
        return None
    plans = {site.name: site.kind == "embedding" for tower in towers.values() for site in tower}
    rounded = [name for name in content["plans"] if plans.get(name)]
    if rounded:
        exceptions = (("*", None), *((name, Treatment(8, FLOAT)) for name in rounded))
        ptq.quantize_(base, Recipe("lookups", exceptions=exceptions))
    prefixes = {id(module): prefix for prefix, module in base.named_modules()}
    gone = set()
    for site in (site for tower in towers.values() for site in tower if site.name in content["plans"]):
        prefix = prefixes[id(site.module)]
        gone |= {f"{prefix}.weight"} if isinstance(site.module, nn.Linear) else set()
        gone |= {f"{prefix}.weight", f"{prefix}.bias"} if isinstance(site.module, nn.Conv2d) else set()
    return {name: tensor for name, tensor in artifact.tensors_of(base).items() if name not in gone}


def _coded(name: str, change: Tensor) -> dict[str, Tensor]:
    step = _rows(change).abs().amax(1) / 127
    codes = torch.round(_rows(change) / step.clamp(min=TINY)[:, None]).view(change.shape)
    return {f"{name}.{CODES}": codes.to(torch.int8), f"{name}.{STEP}": step}


def _rows(tensor: Tensor) -> Tensor:
    """`[N, K]`; a vector is one row."""
    return tensor.reshape(1, -1) if tensor.ndim == 1 else tensor.flatten(1)


def _factored(changes: dict[str, Tensor], size: int) -> dict[str, Tensor]:
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


def _product(packed: Tensor, steps: Tensor, shape: torch.Size) -> Tensor:
    """Raises ValueError and TypeError where these are no factors of that."""
    rows, rank = shape[0], steps.shape[1]
    columns = shape.numel() // rows
    codes = unpack_bits(packed, BITS, (rows + columns) * rank).view(-1, rank).double() - MOST
    left, right = codes[:rows] * steps[0].double(), codes[rows:] * steps[1].double()
    return (left @ right.T).float().view(shape)


def _changed(file: Path, header: TensorFile, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a difference, whole. Raises ArtifactError for codes that change nothing of the base."""
    try:
        with open_regular(file, ArtifactError) as data:
            held = safetensors.torch.load(data.read())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{str(file)!r} cannot be read ({error})") from None
    out = {}
    for name, tensor in held.items():
        whole, _, kind = name.rpartition(".")
        if (kind == STEP and f"{whole}.{CODES}" in held) or (kind == STEPS and f"{whole}.{FACTORS}" in held):
            continue
        if kind not in (CODES, FACTORS):
            out[name] = tensor
            continue
        of_steps = f"{whole}.{STEP if kind == CODES else STEPS}"
        before, step = own.get(whole), held.get(of_steps)
        wanted = torch.int8 if kind == CODES else torch.uint8
        if before is None or before.dtype != torch.float32 or not before.ndim or tensor.dtype != wanted:
            raise ArtifactError(f"{name!r} in {str(file)!r} is no change of a tensor of the base")
        if step is None or step.dtype != torch.float32:
            raise ArtifactError(f"{name!r} in {str(file)!r} has no steps")
        check_values(of_steps, step, str(file), ArtifactError)
        out[whole] = before + (_stepped if kind == CODES else _multiplied)(name, tensor, step, before.shape, file)
    return out


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


__all__ = ["FILE", "load", "save"]
