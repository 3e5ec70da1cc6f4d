"""`load_model`: every kind of name a user may give, and the checkpoints that ship with the package.

A shipped checkpoint is a folder of package data: `model.safetensors` (float16, the token embedding row-wise INT8) and
`card.json` (architecture, preprocessing, tokenizer, how it was trained, what was measured), and `README.md`. A
folder within it is a variant, `photos:w4a8-lsq`: a model trained from it, as the difference to it (`variants.py`).
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qkernels.contract import TINY

from . import artifact, models
from . import variants as variant_files
from .errors import ArtifactError, InputError, ModelError, nearest
from .files import whole_folder
from .untrusted import expand, is_folder

EMBEDDING = "token_embedding.weight"


def checkpoints() -> dict[str, dict[str, Any]]:
    """The shipped checkpoints: name -> card."""
    root = _root()
    if not root.is_dir():
        return {}
    cards = sorted(root.glob("*/card.json"))
    return {card.parent.name: json.loads(card.read_text()) for card in cards}


def variants() -> dict[str, dict[str, Any]]:
    """Trained models that ship as differences to a checkpoint: "CHECKPOINT:VARIANT" -> card."""
    cards = [(card, json.loads(card.read_text())) for card in sorted(_root().glob("*/*/card.json"))]
    return {f"{card.parent.parent.name}:{card.parent.name}": content for card, content in cards}


def _root() -> Path:
    return Path(str(files(__package__) / "checkpoints"))


def load_model(name: str | Path | nn.Module, device: str | torch.device = "cpu", arch: str | None = None) -> nn.Module:
    """A model in eval mode with `encode_image`, `encode_text`, `preprocess` and `tokenizer`.

    `name`: a shipped checkpoint (`"photos"`), a variant of it (`"photos:w4a8-reliable"`), an artifact folder, an
    open_clip name (`"ViT-B-32:laion2b_s34b_b79k"`, `"ViT-B-32"` for random weights), `"local-dir:PATH"`,
    `"hf:ID_OR_DIR"`, a checkpoint file (`arch` names its architecture where the file does not), or an `nn.Module`,
    which comes back as it is.
    Raises ModelError or ArtifactError; an unknown name lists the nearest ones. InputError for a device that is not
    there.
    """
    if isinstance(name, nn.Module):
        return name
    _check_device(device)
    text = str(name)
    if text in checkpoints():
        return _load_checkpoint(_root() / text).to(device)
    if text in variants():
        of, _, name = text.partition(":")
        return variant_files.load(_root() / of / name, _load_checkpoint(_root() / of), device)
    path = expand(text, ModelError)
    if is_folder(path, ModelError) and artifact.is_artifact(path):
        return artifact.load(path, device)
    if is_folder(path, ModelError):
        raise ModelError(
            f"{text!r} is a folder but no artifact ({artifact.DESCRIPTION} is missing); "
            f"for an open_clip or Hugging Face folder give 'local-dir:{text}' or 'hf:{text}'"
        )
    try:
        return models.load(text, device=device, arch=arch)
    except models.UnknownModelError:
        if arch is not None and arch not in models.names():
            raise  # it is the architecture that nobody knows
        of = text.split(":")[0]
        near = (
            nearest(text, [*variants(), of]) if of in checkpoints() else nearest(of, [*checkpoints(), *models.names()])
        )
        raise ModelError(f"unknown model {text!r}; {near} (`qclip models` lists all)") from None


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"device {str(device)!r} cannot be used here ({reason}); use 'cpu'") from None


def _load_checkpoint(path: Path) -> nn.Module:
    card = json.loads((path / "card.json").read_text())
    try:
        tensors = load_file(path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"the shipped checkpoint {path.name!r} cannot be read ({error}); reinstall qclip") from None
    model = models.create_from_config(card["architecture"])
    model.load_state_dict(unpack_tensors(tensors))
    models.attach(model, card["preprocess"], card["tokenizer"], source=path.name)
    return model.eval()


def pack_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A float state dict as it is shipped: float16, scalars float32, token embeddings row-wise INT8 (codes, scales)."""
    out = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name.endswith(EMBEDDING):
            scales = tensor.abs().amax(1).clamp(min=TINY) / 127
            out[f"{name}.codes"] = torch.round(tensor / scales[:, None]).clamp(-127, 127).to(torch.int8)
            out[f"{name}.scales"] = scales
        else:
            out[name] = tensor.half() if tensor.is_floating_point() and tensor.numel() > 1 else tensor
    return out


def unpack_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state dict of `pack_tensors`."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(f"{EMBEDDING}.codes"):
            base = name.removesuffix(".codes")
            out[base] = tensor.float() * tensors[f"{base}.scales"][:, None]
        elif not name.endswith(f"{EMBEDDING}.scales"):
            out[name] = tensor.float() if tensor.is_floating_point() else tensor
    return out


def write_checkpoint(path: Path, state: dict[str, Tensor], card: dict[str, Any], readme: str) -> None:
    """Package data from a trained state dict, whole or not at all; used by `dev/pack_checkpoint.py`."""
    with whole_folder(path, last="card.json") as part:
        save_file(pack_tensors(state), part / "model.safetensors", metadata={"format": "pt"})
        (part / "README.md").write_text(readme, encoding="utf-8")
        (part / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
