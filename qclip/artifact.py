"""A quantized model as a folder: `model.safetensors` (canonical codes and the rest), `qclip.json` (everything else),
and `tokenizer.json` where the tokenizer is one of Hugging Face's.

Nothing in it is executed, and loading it contacts no network. Loading checks the description, the tensors' header
against it, and the checksums before it builds anything, makes the float skeleton on the meta device, and brings in one
tensor at a time, looking at its values, so that two forms of a weight never coexist.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from . import description, models, rewrite
from .errors import ArtifactError, ModelError, OutputExistsError
from .files import check_folder, whole_folder
from .layers import AttentionOperands, QuantizedSite, from_facts
from .models.allowed import TOKENIZER_BYTES
from .models.tokenizer import FILE as TOKENIZER
from .models.values import check_values
from .recipes import Recipe, Treatment
from .untrusted import TensorFile, inside, is_file, open_regular, read_bytes, read_header, read_json, reason

FORMAT = 2  # 2: layers describe themselves, codes of few bits are packed
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
        try:
            save_file(_unshared(tensors_of(model)), fresh / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:  # its name for a full disk: "... (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            why = OSError(str(error)) if number is None else OSError(int(number[1]), os.strerror(int(number[1])))
            raise why from None
        tokenizer, tokenizer_file = models.carried_tokenizer(model)
        content = {
            "format": FORMAT,
            "architecture": models.config_of(model),
            "preprocess": models.preprocess_config(model),
            "tokenizer": tokenizer,
            "source": done.source,
            "recipe": done.recipe.to_dict(),
            "plans": {name: plan.to_dict() for name, plan in done.plans.items()},
            "sites": {
                site.name: site.module.facts()  # type: ignore[operator]
                for t in models.towers(model).values()
                for site in t
                if hasattr(site.module, "facts")
            },
            **_attention(model),
            "coverage": {
                state: {of: round(share, 6) for of, share in shares.items()}
                for state, shares in done.coverage.shares().items()
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


def _attention(model: nn.Module) -> dict[str, Any]:
    """Facts of the quantizers inside attention by block name, where there are any."""
    blocks = [block for tower in models.towers(model).values() for block in tower.blocks if block.attention is not None]
    found = {block.name: getattr(*block.attention).operands for block in blocks}  # type: ignore[misc]
    facts = {name: each.facts() for name, each in found.items() if isinstance(each, AttentionOperands)}
    return {"attention": facts} if facts else {}


def check_output(path: str | Path, force: bool = False) -> None:
    """Raises, before any work, as `save(model, path, force)` would."""
    path = Path(path)
    if force and os.path.isdir(path) and os.listdir(path) and not is_artifact(path):
        raise OutputExistsError(
            f"{str(path)!r} holds other files than an artifact and is not replaced; choose another folder"
        )
    check_folder(path, (TENSORS, DESCRIPTION, TOKENIZER), force, alone=True)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is saved of a model in explicit form, as the file holds it."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedSite):
            tensors |= {f"{prefix}.{name}": t.cpu().contiguous() for name, t in module.to_disk().items()}
    return tensors


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (tied weights): give each its own."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


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
    if content["format"] < FORMAT:
        raise ArtifactError(
            f"{str(path)!r} has format {content['format']} of an earlier qclip, this version reads format {FORMAT}; "
            "quantize the model again"
        )
    if missing := [key for key in description.NEEDED if key not in content]:
        raise ArtifactError(f"{str(file)!r} lacks {missing[0]!r}; the artifact is edited or foreign")
    if description_hash(content) != content["description_sha256"]:
        raise ArtifactError(f"{str(file)!r} does not match its own checksum; it was changed after it was saved")
    description.check(content, str(path))
    return content


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """A model from an artifact folder, in eval mode, with `preprocess` and `tokenizer`.

    Raises ArtifactError - truncated, edited, foreign, newer, of settings that are not allowed - before any model
    exists, and for values that no layer can hold.
    """
    path = Path(path)
    content = read_description(path)
    file, tensors = checked_file(path, TENSORS, content)
    description.check_tensors(content, tensors, str(file))
    return assemble(content, file, tensors, functools.partial(_read, file, tensors), device)


def checked_file(path: Path, name: str, content: dict[str, Any]) -> tuple[Path, TensorFile]:
    """The file of tensors in the folder and its header, held to the description's size and checksum."""
    file = inside(path, name, ArtifactError)
    if not is_file(file, ArtifactError):
        raise ArtifactError(f"{str(path)!r} lacks {name}")
    size = file.stat().st_size
    if size != content["tensors_bytes"]:
        raise ArtifactError(
            f"{str(file)!r} has {size} bytes instead of {content['tensors_bytes']}; "
            "it is truncated or from another artifact"
        )
    tensors = read_header(file, ArtifactError)
    if file_hash(file) != content["tensors_sha256"]:
        raise ArtifactError(f"{str(file)!r} does not match its checksum; it was changed after it was saved")
    return file, tensors


#: Tensors by name; of those named the memory may be the next one's.
Reader = Callable[[set[str]], Iterable[tuple[str, Tensor]]]


@torch.no_grad()
def assemble(
    content: dict[str, Any], file: Path, tensors: TensorFile, read: Reader, device: str | torch.device
) -> nn.Module:
    """The model of a checked description and its tensors, which `file`, beside the description, holds or completes.
    Raises as `load`."""
    path = file.parent
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
    _fill(model, file, tensors, read, plans, torch.device(device))
    models.materialize_buffers(model)
    if torch.device(device).type != "cpu":
        model.to(device)
        rewrite.pack(model)
    rewrite.mark(model, recipe, plans, content["provenance"], content["source"])
    return model.eval()


def _read_tokenizer(path: Path, config: dict[str, Any] | None) -> bytes | None:
    """The bytes of the artifact's own tokenizer; their checksum is looked at where they are taken."""
    if config is None or config["kind"] != "json":
        return None
    return read_bytes(inside(path, TOKENIZER, ArtifactError), TOKENIZER_BYTES, ArtifactError)


def _skeleton(content: dict[str, Any], tokenizer: bytes | None) -> tuple[nn.Module, dict[str, Treatment], Recipe]:
    recipe = Recipe.from_dict(content["recipe"])
    plans = {name: Treatment(**plan) for name, plan in content["plans"].items()}
    if odd := sorted(set(content["sites"]) ^ set(plans)):
        raise ArtifactError(f"the artifact's layers do not fit its plans (first difference: {odd[0]!r})")
    model = models.create_from_config(content["architecture"], device="meta")
    towers = models.towers(model)
    sites = {site.name: site for tower in towers.values() for site in tower}
    if odd := sorted(set(content["sites"]) - set(sites)):
        raise ArtifactError(f"the artifact's layers do not fit its architecture, which has no site {odd[0]!r}")
    built = {}
    for name, facts in content["sites"].items():
        built[name] = layer = from_facts(facts)
        if reason := layer.misfit(sites[name].module):  # type: ignore[operator]
            raise ArtifactError(f"the layer {name!r} {reason}")
        for below in layer.modules():
            if isinstance(below, QuantizedSite):
                description.check_layer(name, below, plans[name])
    blocks = {block.name: block for tower in towers.values() for block in tower.blocks}
    operands = {name: AttentionOperands.from_facts(facts) for name, facts in content.get("attention", {}).items()}
    for name, each in operands.items():
        core = getattr(*blocks[name].attention) if name in blocks and blocks[name].attention else None  # type: ignore[misc]
        if core is None or len(each.q_scale) not in (1, core.heads):  # type: ignore[arg-type]
            raise ArtifactError(f"the artifact's attention {name!r} does not fit its architecture")
    if built or operands:  # a float model that was trained on stays as it was built
        rewrite.write(towers, built, operands, recipe.trained is not None)
    models.attach(model, content["preprocess"], content["tokenizer"], source=content["source"], file=tokenizer)
    return model, plans, recipe


def _fill(
    model: nn.Module,
    path: Path,
    tensors: TensorFile,
    read: Reader,
    plans: dict[str, Treatment],
    device: torch.device,
) -> None:
    """Move the tensors into the skeleton, module by module, looking at the values of each and packing each
    weight as soon as it is there.

    Codes that will be packed pass through one memory: in memories of their own, freed beside their packed copies, they
    would leave the heap in pieces a fifth larger than what it holds.
    """
    slots = {name: _slot(model, name) for name in model.state_dict()}
    if set(tensors) != set(slots):
        odd = sorted(set(tensors) ^ set(slots))[0]
        raise ArtifactError(f"{str(path)!r} does not fit its description (first difference: {odd!r})")
    for name, (owner, attribute) in slots.items():
        have, dtype = getattr(owner, attribute), TYPES[tensors[name].dtype]
        # A float tensor comes back in its own dtype (`.half()` before saving); codes, scales and zeros have but one.
        free = attribute not in getattr(owner, "FIXED", ()) and dtype.is_floating_point and have.is_floating_point()
        dense = owner.disk_form(attribute) if isinstance(owner, QuantizedSite) else None
        shape, wanted = dense or (tuple(have.shape), have.dtype)
        if shape != tuple(tensors[name].shape) or (wanted != dtype and not free):
            raise ArtifactError(
                f"{name!r} in {str(path)!r} is {dtype} {tensors[name].shape} instead of {wanted} {shape}"
            )
    passing = {
        name
        for name, (owner, attribute) in slots.items()
        if attribute == "codes" and isinstance(owner, QuantizedSite) and owner.packs and device.type == "cpu"
    }
    # The search for the least squared error turns uneven grids around, by negative scales.
    turned = {
        id(below)
        for tower in models.towers(model).values()
        for site in tower
        for below in site.module.modules()
        if (plan := plans.get(site.name)) and plan.weight_observer == "mse" and plan.grid.kind == "symfull"
    }
    own = Counter(id(owner) for owner, _ in slots.values())  # tensors of each module
    done: dict[int, int] = {}
    for name, tensor in read(passing):
        owner, attribute = slots[name]
        if isinstance(owner, QuantizedSite):
            tensor = owner.from_disk(attribute, tensor)
        if hasattr(owner, "check_tensor"):
            owner.check_tensor(attribute, tensor, f"{name!r} in {str(path)!r}", id(owner) in turned)  # type: ignore[operator]
        else:
            check_values(name, tensor, str(path), ArtifactError)
        if attribute in owner._parameters:
            trained = owner._parameters[attribute].requires_grad  # type: ignore[union-attr]
            owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=trained)
        else:
            owner._buffers[attribute] = tensor
        if isinstance(owner, QuantizedSite):
            done[id(owner)] = done.get(id(owner), 0) + 1
            if done[id(owner)] == own[id(owner)]:
                owner.witness = torch.empty(0, dtype=owner.witness.dtype)
                if device.type == "cpu":
                    owner.pack()
            if name in passing and owner.layout == "canonical":  # scales are yet to come, or the backend packs nothing
                owner.codes = owner.codes.clone()


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


TYPES = {  # as safetensors names them
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
                tensor = shared[: facts.end - facts.start].view(TYPES[facts.dtype]).view(facts.shape)
            else:
                tensor = torch.empty(facts.shape, dtype=TYPES[facts.dtype])
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
