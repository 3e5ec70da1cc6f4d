"""A trained model as its difference to the float model that it was trained from: what the base has is not stored again.

A folder like an artifact's: `qclip.json` describes the whole model, `difference.safetensors` holds the tensors that the
base does not have: codes and scales of layers bit for bit, large float tensors rounded (`changes`). Lookups of tokens
are rounded again from the base's.
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

from . import artifact, changes, description, models, ptq, rewrite
from .errors import ArtifactError, ModelError
from .files import whole_folder
from .recipes import FLOAT, Recipe, Treatment
from .untrusted import TensorFile, open_regular
from .untrusted.tensors import TensorFacts

FILE = "difference.safetensors"
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
    content = without_folders(artifact.read_description(source))
    trained = artifact.load(source)
    known = _base(base, content)
    if known is None:
        raise ModelError(f"{str(source)!r} was not trained from the model that is to be its base")
    held = changes.stored(artifact.tensors_of(trained), *known, size)
    data = safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in held.items()})
    with whole_folder(path, last=artifact.DESCRIPTION, alone=True) as fresh:
        (fresh / FILE).write_bytes(data)
        content["tensors_sha256"], content["tensors_bytes"] = artifact.file_hash(fresh / FILE), len(data)
        content["description_sha256"] = artifact.description_hash(content)
        (fresh / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(readme, encoding="utf-8")
        (fresh / artifact.DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")
    return Path(path)


def without_folders(value: Any) -> Any:
    """JSON, of whose data names ("source") the folders of files are cut off: where they lay concerns nobody else."""
    if isinstance(value, dict):
        return {
            key: re.sub(r"(?<=:)/[^:?]*/", "", found)
            if key == "source" and isinstance(found, str)
            else without_folders(found)
            for key, found in value.items()
        }
    return [without_folders(each) for each in value] if isinstance(value, list) else value


def load(path: str | Path, base: nn.Module, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a difference and its base, checked as an artifact is before anything is built. Raises
    ArtifactError, also where it is the difference to another model."""
    path = Path(path)
    content = artifact.read_description(path)
    file, _ = artifact.checked_file(path, FILE, content)
    known = _base(base, content)
    if known is None:
        raise ArtifactError(f"{str(path)!r} is the difference to another model than the one that was given as its base")
    whole = known[0] | changes.whole(_read(file), *known, file)
    facts: TensorFile = {name: TensorFacts(NAMES[t.dtype], tuple(t.shape), 0, 0) for name, t in whole.items()}
    description.check_tensors(content, facts, str(file))
    return artifact.assemble(content, file, facts, lambda _: whole.items(), device)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with open_regular(file, ArtifactError) as data:
            return safetensors.torch.load(data.read())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{str(file)!r} cannot be read ({error})") from None


def _base(base: nn.Module, content: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """What the base has of the described model: its float tensors in explicit form, its lookups with codes where these
    have; apart from them the weights that have codes there. None where it is another model."""
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
    tensors = artifact.tensors_of(base)
    return {n: t for n, t in tensors.items() if n not in gone}, {n: t for n, t in tensors.items() if n in gone}


__all__ = ["FILE", "load", "save", "without_folders"]
