"""Tensors from a checkpoint file into a model. Nothing in the file is executed."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError
from ..untrusted import is_file, open_regular, read_header, reason
from .values import check_float, check_values

PICKLED = (".bin", ".pth", ".pt")
SUFFIXES = (".safetensors", *PICKLED)
STATE = ("state_dict", "model_state_dict", "model")  # under which training loops keep it
# DistributedDataParallel, torch.compile, FSDP and activation checkpointing, around the model or a part of it.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
SHOWN = 3


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors`, `.pt`, `.pth` or `.bin` file, on the CPU.

    `state_dict` entries of training checkpoints are unwrapped and the prefixes `model.` and those of `WRAPPERS`
    stripped, alone or nested. Raises ModelError for files that are missing, truncated, foreign, or hold anything but
    plain tensors that are as large as the file: unpickling would run code from the file.
    """
    if not is_file(path, ModelError):
        raise ModelError(f"there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        read_header(path, ModelError)
        try:
            state: Any = load_file(path)
        except Exception as error:
            raise ModelError(f"{str(path)!r} is not a readable safetensors file ({reason(error)})") from error
    elif path.suffix in PICKLED:
        state = _unpickle(path)
    else:
        raise ModelError(f"{str(path)!r} is no checkpoint; known are {', '.join(SUFFIXES)}")
    for key in STATE:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{str(path)!r} holds no state dict (names to tensors); save model.state_dict()")
    for name, tensor in state.items():
        if not isinstance(name, str) or not _plain(tensor):
            raise ModelError(
                f"{str(name)[:80]!r} in {str(path)!r} is no plain tensor of numbers; save model.state_dict()"
            )
    return stripped(state, path)


def stripped(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict by the names that the model itself has. Raises ModelError where two become one."""
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state}
    while all(new.startswith("model.") for new in names.values()):
        names = {name: new.removeprefix("model.") for name, new in names.items()}
    if len(set(names.values())) != len(names):
        seen: dict[str, str] = {}
        for name, new in names.items():
            if new in seen:
                raise ModelError(f"{str(path)!r} holds both {seen[new]!r} and {name!r}; save one model's state dict")
            seen[new] = name
    return {names[name]: tensor for name, tensor in state.items()}


def _plain(tensor: Tensor) -> bool:
    """Dense numbers on the CPU that take no more memory than the file gave them."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_complex()
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _unpickle(path: Path) -> Any:
    try:
        with open_regular(path, ModelError) as file:
            zipped = zipfile.is_zipfile(file)
        if zipped:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{str(path)!r} holds pickled Python objects, which are refused because unpickling runs code "
            "from the file; save model.state_dict() or a .safetensors file"
        ) from error
    except Exception as error:  # a hostile pickle makes the unpickler fail in every way there is
        raise ModelError(f"{str(path)!r} is not a readable checkpoint ({reason(error)})") from error


def _check_archive(path: Path) -> None:
    """torch stores its entries as they are: compressed ones could become a thousand times the file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ModelError(
            f"{str(path)!r} is a TorchScript program, which is not run; save its state_dict() as .safetensors"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ModelError(f"{str(path)!r} is a compressed archive, which torch does not write; save it with torch.save")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ModelError(f"{str(path)!r} is an archive that says to hold more than its own size; it is not read")


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Load `state` into `model` as open_clip does: other projects' names, old text layouts, resized positions.

    Every parameter must be there. Raises ModelError naming those that are missing or left over, or the first of another
    shape or with a value that is not finite.
    """
    kind = type(model).__name__
    try:
        state = _converted(model, state)
    except Exception as error:  # other projects' layouts, half there
        raise ModelError(f"the names and shapes in {str(path)!r} are not those of {kind} ({reason(error)})") from error
    wanted = model.state_dict()
    if differ := difference(wanted, state):
        raise ModelError(f"{str(path)!r} does not fit {kind}: it {differ}; give the architecture that has these names")
    try:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except Exception as error:
        raise ModelError(f"the positions in {str(path)!r} cannot be resized for {kind} ({reason(error)})") from error
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(
                f"{str(path)!r} does not fit {kind}: {name!r} is {tuple(tensor.shape)} "
                f"instead of {tuple(wanted[name].shape)}; give the architecture that has this shape"
            )
        if wanted[name].is_floating_point():
            check_float(name, tensor, str(path), ModelError)
        check_values(name, tensor, str(path), ModelError)
    model.load_state_dict(state)
    return model.eval()


def _converted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        mine = getattr(model, name)
        if name in state and mine is not None:
            state[name] = state[name].reshape(mine.shape)
    if model.logit_bias is not None and "logit_bias" not in state and "logit_scale" in state:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
    # What OpenAI's files carry along, and a buffer that text encoders of transformers had before 4.31.
    for name in ("input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids"):
        state.pop(name, None)
    return state


def difference(wanted: Any, found: Any) -> str:
    """In words, which of the wanted names are not there and which are there beside them; "" where none is."""
    parts = []
    for verb, odd in (("lacks", set(wanted) - set(found)), ("holds the unknown", set(found) - set(wanted))):
        if odd:
            names = sorted(odd)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{verb} {', '.join(repr(name[:120]) for name in names[:SHOWN])}{more}")
    return " and ".join(parts)
