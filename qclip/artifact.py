"""A quantized model as a folder: `model.safetensors` (canonical codes and the rest), `qclip.json` (everything else),
and `tokenizer.json` where the tokenizer is one of Hugging Face's.

Nothing in it is executed, and loading it contacts no network. Loading checks the description, the tensors' header
against it, and the checksums before it builds anything, makes the float skeleton on the meta device, and brings in one
tensor at a time, looking at its values, so that two forms of a weight never coexist.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from qkernels import Int4Weight, Int8Weight

from . import description, models, rewrite
from .errors import ArtifactError, ModelError, OutputExistsError
from .files import check_folder, whole_folder
from .layers import (
    Int4Linear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedPatch,
    QuantizedSite,
    SimulatedLinear,
)
from .layers.site import FIXED
from .models.allowed import TOKENIZER_BYTES
from .models.tokenizer import FILE as TOKENIZER
from .models.values import check_values
from .recipes import Recipe, SitePlan
from .site_values import check_site_values
from .untrusted import TensorFile, inside, is_file, open_regular, read_bytes, read_header, read_json, reason

FORMAT = 1
TENSORS, DESCRIPTION = "model.safetensors", "qclip.json"


def is_artifact(path: str | Path) -> bool:
    return is_file(Path(path) / DESCRIPTION, ArtifactError)


def description_hash(content: dict[str, Any]) -> str:
    """sha256 of everything in the description but this hash itself."""
    rest = {key: value for key, value in content.items() if key != "description_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with open_regular(path, ArtifactError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(model: nn.Module, path: str | Path, force: bool = False) -> Path:
    """Write a quantized model to the folder `path`; whole or not at all. Returns the folder.

    Raises ModelError for a model that is not quantized or could not be loaded again, OutputExistsError for a non-empty
    folder without `force` (with it, only a folder that is an artifact is replaced).
    """
    path = Path(path)
    done = rewrite.quantization(model)
    if done is None:
        raise ModelError("the model is not quantized, so there is no artifact to save; call qclip.quantize first")
    check_output(path, force)
    with whole_folder(path, last=DESCRIPTION, alone=True) as fresh:
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        try:
            save_file(_unshared(tensors), fresh / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:  # its name for a full disk
            raise OSError(str(error)) from None
        coverage = done.coverage
        tokenizer, tokenizer_file = models.carried_tokenizer(model)
        content = {
            "format": FORMAT,
            "architecture": models.config_of(model),
            "preprocess": models.preprocess_config(model),
            "tokenizer": tokenizer,
            "source": done.source,
            "recipe": done.recipe.to_dict(),
            "plans": {name: dataclasses.asdict(plan) for name, plan in done.plans.items()},
            "sites": {
                site.name: _site_facts(site.module)
                for t in models.towers(model).values()
                for site in t
                if done.plans[site.name].state != "float"
            },
            "coverage": {
                state: {of: round(coverage.share(state, of), 6) for of in ("macs", "parameters")}
                for state in ("real", "simulated", "float")
            },
            "provenance": done.provenance,
            "tensors_sha256": file_hash(fresh / TENSORS),
            "tensors_bytes": (fresh / TENSORS).stat().st_size,
        }
        content["description_sha256"] = description_hash(content)
        description.check_saved(content)
        if tokenizer_file is not None:
            (fresh / TOKENIZER).write_bytes(tokenizer_file)
        (fresh / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")
        (fresh / TENSORS).chmod((fresh / DESCRIPTION).stat().st_mode)  # safetensors' own files are for their owner only
    return path


def check_output(path: str | Path, force: bool = False) -> None:
    """Raises, before any work, as `save(model, path, force)` would."""
    path = Path(path)
    if force and path.is_dir() and any(path.iterdir()) and not is_artifact(path):
        raise OutputExistsError(
            f"{str(path)!r} holds other files than an artifact and is not replaced; choose another folder"
        )
    check_folder(path, (TENSORS, DESCRIPTION, TOKENIZER), force, alone=True)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (tied weights): give each its own."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _site_facts(module: nn.Module) -> dict[str, Any]:
    """What rebuilds an empty module of this form."""
    inner = module.site if isinstance(module, QuantizedPatch) else module
    assert isinstance(inner, QuantizedSite)
    facts: dict[str, Any] = {
        "class": type(inner).__name__,
        "shape": list(inner.shape),
        "group": inner.group,
        "zeros": inner.zeros is not None,
        "bias": inner.bias is not None,
        "smooth": inner.smooth is not None,
        "input_scale": inner.input_scale is not None,
        "dtype": str(inner.witness.dtype).removeprefix("torch."),
    }
    if isinstance(module, QuantizedPatch):
        facts["patch"] = list(module.patch)
    if isinstance(inner, SimulatedLinear):
        facts["activation_bits"] = inner.activation_bits
    if isinstance(inner, Int4Linear):
        facts["float_input"] = inner.float_input
    return facts


def _empty_site(facts: dict[str, Any]) -> nn.Module:
    """The module of `_site_facts` on the meta device."""
    n, k = facts["shape"]
    dtype = getattr(torch, facts["dtype"])
    with torch.device("meta"):
        bias = torch.empty(n, dtype=dtype) if facts["bias"] else None
        smooth = torch.empty(k) if facts["smooth"] else None
        scale = torch.empty(()) if facts["input_scale"] else None
        weight: Int8Weight | Int4Weight
        if facts["group"] is None:
            weight = Int8Weight(torch.empty(n, k, dtype=torch.int8), torch.empty(n), (n, k))
        else:
            groups = -(-k // facts["group"])
            zeros = torch.empty(n, groups, dtype=torch.float16) if facts["zeros"] else None
            weight = Int4Weight(
                torch.empty(n, -(-k // 2), dtype=torch.uint8),
                torch.empty(n, groups, dtype=torch.float16),
                zeros,
                (n, k),
                facts["group"],
            )
    kind = facts["class"]
    module: nn.Module
    if kind == "QuantizedEmbedding":
        module = QuantizedEmbedding(weight, dtype=dtype)
    elif kind == "SimulatedLinear":
        module = SimulatedLinear(weight, bias, int(facts["activation_bits"]), smooth, scale, dtype)
    elif kind == "Int8Linear":
        module = Int8Linear(weight, bias, smooth, scale, dtype)
    elif kind == "Int4Linear":
        module = Int4Linear(weight, bias, smooth, scale, dtype)
        module.float_input = bool(facts["float_input"])
    else:
        raise ArtifactError(f"the artifact has a layer of the unknown class {kind!r}; it is not one of ours")
    patch = facts.get("patch")
    return module if patch is None else QuantizedPatch(module, (int(patch[0]), int(patch[1])))


def read_description(path: str | Path) -> dict[str, Any]:
    """`qclip.json`, checked for form, version and allowed settings. Raises ArtifactError with the reason."""
    path = Path(path)
    file = inside(path, DESCRIPTION, ArtifactError)
    if not is_file(file, ArtifactError):
        raise ArtifactError(f"{str(path)!r} is no artifact: {DESCRIPTION} is missing")
    content = read_json(file, ArtifactError)
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] < 1:
        raise ArtifactError(f"{str(file)!r} has no format version; it was not written by qclip")
    if content["format"] > FORMAT:
        raise ArtifactError(
            f"{str(path)!r} has format {content['format']}, this version reads up to {FORMAT}; upgrade qclip"
        )
    if missing := [key for key in description.NEEDED if key not in content]:
        raise ArtifactError(f"{str(file)!r} lacks {missing[0]!r}; the artifact is edited or foreign")
    if description_hash(content) != content["description_sha256"]:
        raise ArtifactError(f"{str(file)!r} does not match its own checksum; it was changed after it was saved")
    description.check(content, str(path))
    return content


@torch.no_grad()
def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """A model from an artifact folder, in eval mode, with `preprocess` and `tokenizer`.

    Raises ArtifactError - truncated, edited, foreign, newer, of settings that are not allowed - before any model
    exists, and for values that no layer can hold.
    """
    path = Path(path)
    content = read_description(path)
    file = inside(path, TENSORS, ArtifactError)
    if not is_file(file, ArtifactError):
        raise ArtifactError(f"{str(path)!r} lacks {TENSORS}")
    size = file.stat().st_size
    if size != content["tensors_bytes"]:
        raise ArtifactError(
            f"{str(file)!r} has {size} bytes instead of {content['tensors_bytes']}; "
            "it is truncated or from another artifact"
        )
    tensors = read_header(file, ArtifactError)
    description.check_tensors(content, tensors, str(file))
    if file_hash(file) != content["tensors_sha256"]:
        raise ArtifactError(f"{str(file)!r} does not match its checksum; it was changed after it was saved")
    tokenizer = _read_tokenizer(path, content["tokenizer"])
    try:
        model, plans, recipe = _skeleton(content, tokenizer)
    except ArtifactError:
        raise
    except Exception as error:  # sizes that contradict each other: every library below has errors of its own
        raise ArtifactError(
            f"{str(path / DESCRIPTION)!r} describes no model that can be built ({reason(error)}); "
            "it is edited or foreign"
        ) from None
    _fill(model, file, tensors, plans, torch.device(device))
    models.materialize_buffers(model)
    if torch.device(device).type != "cpu":
        model.to(device)
    rewrite.mark(model, recipe, plans, content["provenance"], content["source"])
    return model.eval()


def _read_tokenizer(path: Path, config: dict[str, Any] | None) -> bytes | None:
    """The bytes of the artifact's own tokenizer; their checksum is looked at where they are taken."""
    if config is None or config["kind"] != "json":
        return None
    return read_bytes(inside(path, TOKENIZER, ArtifactError), TOKENIZER_BYTES, ArtifactError)


def _skeleton(content: dict[str, Any], tokenizer: bytes | None) -> tuple[nn.Module, dict[str, SitePlan], Recipe]:
    recipe = Recipe.from_dict(content["recipe"])
    plans = {name: SitePlan(**plan) for name, plan in content["plans"].items()}
    model = models.create_from_config(content["architecture"], device="meta")
    towers = models.towers(model)
    sites = {site.name: site for tower in towers.values() for site in tower}
    if set(plans) != set(sites):
        odd = sorted(set(plans) ^ set(sites))[0]
        raise ArtifactError(f"the artifact's sites do not fit its architecture (first difference: {odd!r})")
    wanted = {name for name, plan in plans.items() if plan.state != "float"}
    if set(content["sites"]) != wanted:
        odd = sorted(set(content["sites"]) ^ wanted)[0]
        raise ArtifactError(f"the artifact's layers do not fit its plans (first difference: {odd!r})")
    for name, facts in content["sites"].items():
        description.check_skeleton(sites[name], facts)
    rewrite.write(towers, {name: _empty_site(facts) for name, facts in content["sites"].items()})
    models.attach(model, content["preprocess"], content["tokenizer"], source=content["source"], file=tokenizer)
    return model, plans, recipe


def _fill(model: nn.Module, path: Path, tensors: TensorFile, plans: dict[str, SitePlan], device: torch.device) -> None:
    """Move the file's tensors into the skeleton, module by module, looking at the values of each and packing each
    weight as soon as it is there.

    Codes that will be packed pass through one memory: in memories of their own, freed beside their packed copies, they
    would leave the heap in pieces a fifth larger than what it holds.
    """
    slots = {name: _slot(model, name) for name in model.state_dict()}
    if set(tensors) != set(slots):
        odd = sorted(set(tensors) ^ set(slots))[0]
        raise ArtifactError(f"{str(path)!r} does not fit its description (first difference: {odd!r})")
    for name, (owner, attribute) in slots.items():
        have, dtype = getattr(owner, attribute), _TYPES[tensors[name].dtype]
        # A float tensor comes back in its own dtype (`.half()` before saving); codes, scales and zeros have but one.
        free = attribute not in FIXED and dtype.is_floating_point and have.is_floating_point()
        if have.shape != tensors[name].shape or (have.dtype != dtype and not free):
            raise ArtifactError(
                f"{name!r} in {str(path)!r} is {dtype} {tensors[name].shape} instead of "
                f"{have.dtype} {tuple(have.shape)}"
            )
    planned = {
        id(module.site if isinstance(module, QuantizedPatch) else module): plans[site.name]
        for tower in models.towers(model).values()
        for site in tower
        for module in [site.module]
    }
    passing = {
        name
        for name, (owner, attribute) in slots.items()
        if attribute == "codes" and isinstance(owner, QuantizedLinear) and device.type == "cpu"
    }
    done: dict[int, int] = {}
    for name, tensor in _read(path, tensors, passing):
        owner, attribute = slots[name]
        if isinstance(owner, QuantizedSite):
            check_site_values(name, attribute, tensor, planned[id(owner)], str(path))
        else:
            check_values(name, tensor, str(path), ArtifactError)
        if attribute in owner._parameters:
            trained = owner._parameters[attribute].requires_grad  # type: ignore[union-attr]
            owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=trained)
        else:
            owner._buffers[attribute] = tensor
        if isinstance(owner, QuantizedSite):
            done[id(owner)] = done.get(id(owner), 0) + 1
            if done[id(owner)] == len(owner.state_dict()):
                owner.witness = torch.empty(0, dtype=owner.witness.dtype)
                if device.type == "cpu":
                    owner.pack()
            if name in passing and owner.layout == "canonical":  # scales are yet to come, or the backend packs nothing
                owner.codes = owner.codes.clone()


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _read(path: Path, tensors: TensorFile, passing: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in file order, each read straight into its own memory; those named in `passing` into one that the
    next of them takes over.

    Not through `safe_open`: that maps the file, and the pages of a map count as ours beside the tensors made of them.
    The header was checked by `read_header` and the bytes by their checksum before this runs.
    """
    with open_regular(path, ArtifactError) as file:
        largest = max((tensors[name].end - tensors[name].start for name in passing), default=0)
        shared = torch.empty(largest, dtype=torch.uint8)
        for name, facts in tensors.items():
            if name in passing:
                tensor = shared[: facts.end - facts.start].view(_TYPES[facts.dtype]).view(facts.shape)
            else:
                tensor = torch.empty(facts.shape, dtype=_TYPES[facts.dtype])
            file.seek(facts.start)
            if tensor.numel():
                read = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                if read != facts.end - facts.start:
                    raise ArtifactError(f"{str(path)!r} was changed while it was read")
            yield name, tensor


def bytes_of(path: str | Path) -> int:
    """Size of an artifact on disk."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


__all__ = ["FORMAT", "bytes_of", "is_artifact", "load", "read_description", "save"]
