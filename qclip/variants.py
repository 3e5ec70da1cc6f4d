"""A trained model as its difference to the float model that it was trained from: what the base has is not stored again.

A folder like an artifact's: `qclip.json` describes the whole model, `difference.safetensors` holds the tensors that the
base does not have, bit for bit. Lookups of tokens are rounded again from the base's. Large float tensors may be stored
as codes of their change: `NAME.difference`, int8, and `NAME.step`, float32, one for each row.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qkernels.contract import TINY

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
NAMES = {dtype: name for name, dtype in artifact.TYPES.items()}


def save(source: str | Path, base: nn.Module, path: str | Path, card: dict[str, Any], readme: str) -> Path:
    """Write what the artifact `source` has and `base` has not, with a card. Changes of large float tensors become codes
    of 8 bits, so that a float model comes back nearly as it was; codes and scales of layers come back bit for bit.
    Raises ModelError where `source` was not trained from `base`."""
    source = Path(source)
    content = _without_folders(artifact.read_description(source))
    trained = artifact.load(source)
    own = _base(base, content)
    if own is None:
        raise ModelError(f"{str(source)!r} was not trained from the model that is to be its base")
    held: dict[str, Tensor] = {}
    for name, tensor in artifact.tensors_of(trained).items():
        before = own.get(name)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            held[name] = tensor
        elif torch.equal(before, tensor):
            continue
        elif tensor.dtype == torch.float32 and tensor.ndim > 1 and tensor.numel() >= CODED:
            held |= _coded(name, tensor - before)
        else:
            held[name] = tensor
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
    step = change.flatten(1).abs().amax(1) / 127
    codes = torch.round(change / step.clamp(min=TINY).view(-1, *[1] * (change.ndim - 1)))
    return {f"{name}.{CODES}": codes.to(torch.int8), f"{name}.{STEP}": step}


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
        if kind == STEP and f"{whole}.{CODES}" in held:
            continue
        if kind != CODES:
            out[name] = tensor
            continue
        before, step = own.get(whole), held.get(f"{whole}.{STEP}")
        fits = before is not None and before.dtype == torch.float32 and before.ndim > 1 and tensor.shape == before.shape
        if not fits or step is None or tensor.dtype != torch.int8 or step.dtype != torch.float32:
            raise ArtifactError(f"{name!r} in {str(file)!r} is no change of a tensor of the base")
        if tuple(step.shape) != (len(tensor),):
            raise ArtifactError(f"{name!r} in {str(file)!r} has steps {tuple(step.shape)}, not one for each row")
        check_values(f"{whole}.{STEP}", step, str(file), ArtifactError)
        assert before is not None
        out[whole] = before + tensor.float() * step.view(-1, *[1] * (tensor.ndim - 1))
    return out


__all__ = ["FILE", "load", "save"]
