"""Tensors from a checkpoint file into a model. Nothing in the file is executed."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError

PICKLED = (".bin", ".pth", ".pt")
SUFFIXES = (".safetensors", *PICKLED)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors`, `.pt`, `.pth` or `.bin` file, on the CPU.

    `state_dict` entries of training checkpoints and `module.` prefixes are unwrapped. Raises ModelError for files that
    are missing, truncated, foreign, or hold anything but plain tensors: unpickling would run code from the file.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            state: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{str(path)!r} is not a readable safetensors file ({error})") from error
    elif path.suffix in PICKLED:
        state = _unpickle(path)
    else:
        raise ModelError(f"{str(path)!r} is no checkpoint; known are {', '.join(SUFFIXES)}")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{str(path)!r} holds no state dict (names to tensors); save model.state_dict()")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _unpickle(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ModelError(
                    f"{str(path)!r} is a TorchScript program, which is not run; save its state_dict() as .safetensors"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{str(path)!r} holds pickled Python objects, which are refused because unpickling runs code "
            "from the file; save model.state_dict() or a .safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{str(path)!r} is not a readable checkpoint ({reason})") from error


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Load `state` into `model` as open_clip does: other projects' names, old text layouts, resized positions.

    Every parameter must be there. Raises ModelError naming the first that is missing, left over, of another shape or
    not finite.
    """
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        mine = getattr(model, name)
        if name in state and mine is not None:
            state[name] = state[name].reshape(mine.shape)
    if model.logit_bias is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
    for name in ("input_resolution", "context_length", "vocab_size"):  # what OpenAI's files carry along
        state.pop(name, None)
    wanted = model.state_dict()
    for verb, odd in (("lacks", set(wanted) - set(state)), ("holds the unknown", set(state) - set(wanted))):
        if odd:
            raise ModelError(
                f"{str(path)!r} does not fit {type(model).__name__}: it {verb} {sorted(odd)[0]!r} "
                f"(and {len(odd) - 1} more); give the right architecture"
            )
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(
                f"{str(path)!r} does not fit {type(model).__name__}: {name!r} is {tuple(tensor.shape)} "
                f"instead of {tuple(wanted[name].shape)}; give the right architecture"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"{name!r} in {str(path)!r} holds NaN or Inf; the checkpoint is damaged")
    model.load_state_dict(state)
    return model.eval()
