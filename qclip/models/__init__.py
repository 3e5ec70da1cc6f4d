"""Models as the rest of this package sees them. The only place that imports open_clip, timm or transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..untrusted import expand, is_file
from . import huggingface, huggingface_files, local, open_clip, timm
from .encoders import Encoders, encoders
from .explicit import unsupported
from .hooks import refuse_layer, refuse_others
from .inputs import Preprocess, preprocess_from_config
from .open_clip import UnknownModelError, attach, create, materialize_buffers, names
from .structure import Structure, evaluating
from .tokenizer import Tokenizer, tokenizer_from_config
from .tower import Block, Site, Tower

FILES = local.SUFFIXES


def towers(model: nn.Module) -> dict[str, Tower]:
    """The towers of `model` by name, "vision" and "text" (a timm model has "vision" alone).

    Brings the model into explicit form in place: every site a module of its own, attention and MLP as the cores of
    `tower`. Its outputs change by rounding only. Calling it again describes the model as it is then; whoever only looks
    uses `explicit_form`. Raises ModelError naming the class that no adapter knows, or the module with code, hooks or
    weights of its own that would be lost; the model is as before then.
    """
    before = Structure(model)
    with before.kept_on_error():
        found = _towers(model)
        before.refuse_losses()
        for site in (site for tower in found.values() for site in tower):
            if not type(site.module).__module__.startswith("qclip."):
                refuse_layer(site.module, before.names.get(site.module, site.name))
    return found


@contextlib.contextmanager
def explicit_form(model: nn.Module) -> Iterator[dict[str, Tower]]:
    """`towers(model)` while the block runs; then the model is what it was: the same modules, parameters and hooks. It
    costs no second copy of the weights, but the block must not replace them."""
    before = Structure(model)
    try:
        yield towers(model)
    finally:
        before.restore()


def _towers(model: nn.Module) -> dict[str, Tower]:
    if open_clip.owns(model):
        return open_clip.towers(model)
    if huggingface.owns(model):
        return huggingface.towers(model)
    if hasattr(model, "pretrained_cfg"):  # every timm model
        return {"vision": timm.tower(model)}
    raise unsupported(model)


def load(name: str, device: str | torch.device = "cpu", arch: str | dict | None = None) -> nn.Module:
    """A float model in eval mode with `.preprocess`, `.tokenizer` and `.qclip_source`.

    `name`: an open_clip name, with its pretrained tag (`"ViT-B-32:laion2b_s34b_b79k"`) or without (random weights,
    which a warning says), `"local-dir:PATH"` in open_clip's layout, `"hf:ID_OR_DIR"`, or a checkpoint file, whose
    architecture `arch` names where nothing beside the file does. Raises UnknownModelError or ModelError.
    """
    if name.startswith("local-dir:"):
        return local.load_directory(name.removeprefix("local-dir:")).to(device)
    if name.startswith("hf:"):
        source = name.removeprefix("hf:")
        return attach(*huggingface_files.load(source, device), source=name)
    path = expand(name, ModelError)
    if is_file(path, ModelError) or path.suffix in FILES:
        return local.load_file_checkpoint(path, arch).to(device)
    return create(name, device=device)


def create_from_config(config: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """A model of the described architecture with random weights; see the `create_from_config` of the families."""
    if config.get("family") == "huggingface":
        return huggingface_files.create_from_config(config, device)
    return open_clip.create_from_config(config, device)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The JSON-able description from which `create_from_config` builds this architecture again. Raises ModelError."""
    return huggingface.config_of(model) if huggingface.owns(model) else open_clip.config_of(model)


def preprocess_config(model: nn.Module) -> dict[str, Any] | None:
    """The description of the model's image transform (`preprocess_from_config` builds it), None if it has none."""
    return huggingface.preprocess_config(model) if huggingface.owns(model) else open_clip.preprocess_config(model)


def tokenizer_config(model: nn.Module) -> dict[str, Any] | None:
    """The description of the model's tokenizer (`tokenizer_from_config` builds it), None if it has none."""
    return huggingface.tokenizer_config(model) if huggingface.owns(model) else open_clip.tokenizer_config(model)


def carried_tokenizer(model: nn.Module) -> tuple[dict[str, Any] | None, bytes | None]:
    """The description of the model's tokenizer that needs no network, and the file that goes with it
    (`Tokenizer.carried`)."""
    kept = model.__dict__.get("tokenizer")
    return kept.carried() if isinstance(kept, Tokenizer) else (tokenizer_config(model), None)


__all__ = [
    "Block",
    "Encoders",
    "Preprocess",
    "Site",
    "Structure",
    "Tokenizer",
    "Tower",
    "UnknownModelError",
    "attach",
    "carried_tokenizer",
    "config_of",
    "create",
    "create_from_config",
    "encoders",
    "evaluating",
    "explicit_form",
    "load",
    "materialize_buffers",
    "names",
    "preprocess_config",
    "preprocess_from_config",
    "refuse_others",
    "tokenizer_config",
    "tokenizer_from_config",
    "towers",
]
