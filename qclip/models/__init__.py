"""Models as the rest of this package sees them. The only place that imports open_clip, timm or transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from .allowed import check_architecture
from .encoders import Encoders, encoders
from .explicit import telling_where, unsupported
from .family import (
    DEFAULT,
    FAMILIES,
    Family,
    UnknownModelError,
    described_family,
    families,
    family_of,
    materialize_buffers,
)
from .hooks import refuse_layer, refuse_others
from .inputs import Preprocess, attach, preprocess_from_config
from .structure import Structure, evaluating
from .tokenizer import Tokenizer, tokenizer_from_config
from .tower import Attention, Block, Mlp, Site, Tower
from .value_path import ValuePath


def towers(model: nn.Module) -> dict[str, Tower]:
    """The towers of `model` by name, "vision" and "text" (a model with an image encoder alone has only that).

    Brings the model into explicit form in place: every site a module of its own, attention and MLP as the cores of
    `tower`. Its outputs change by rounding only. Calling it again describes the model as it is then; whoever only looks
    uses `explicit_form`. Raises ModelError naming the module, and its class, that no adapter knows, or the module with
    code, hooks or weights of its own that would be lost; the model is as before then.
    """
    family, before = _owner(model), Structure(model)
    with before.kept_on_error(), telling_where(before.names):
        found = family.towers(model)
        before.refuse_losses(family.libraries)
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


def value_path(model: nn.Module) -> ValuePath:
    """How `model`, which stays as it is, embeds patches. Raises ModelError where that is not defined."""
    with explicit_form(model) as found:
        return _owner(model).value_path(model, found["vision"])


def _owner(model: nn.Module) -> Family:
    family = family_of(model)
    if family is None:
        raise unsupported(model)
    return family


def names() -> list[str]:
    """The names of models that `load` takes, as far as they can be listed."""
    return [name for family in families() for name in family.names()]


def load(name: str, device: str | torch.device = "cpu", arch: str | dict | None = None) -> nn.Module:
    """A float model in eval mode with `.preprocess`, `.tokenizer` and `.qclip_source`.

    `name`: an open_clip name, with its pretrained tag (`"ViT-B-32:laion2b_s34b_b79k"`) or without (random weights,
    which a warning says), `"local-dir:PATH"` in open_clip's layout, `"hf:ID_OR_DIR"`, a name that begins as those of
    another family (`Family.prefixes`), or a checkpoint file, whose architecture `arch` names where nothing beside the
    file does. Raises UnknownModelError or ModelError.
    """
    for family in families():
        if name.startswith(family.prefixes):
            return family.load(name, device, arch)
    return FAMILIES.made(DEFAULT).load(name, device, arch)


def create_from_config(config: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """A model of the described architecture with random weights (without memory on the meta device), from `config_of`'s
    description or from open_clip's own `model_cfg`. Raises ModelError, also for a setting that is not allowed."""
    if "family" in config:
        check_architecture(config)
    return described_family(config).create_from_config(config, device)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The JSON-able description from which `create_from_config` builds this architecture again. Raises ModelError."""
    with telling_where({module: name for name, module in model.named_modules()}):
        return _owner(model).config_of(model)


def preprocess_config(model: nn.Module) -> dict[str, Any] | None:
    """The description of the model's image transform (`preprocess_from_config` builds it), None if it has none."""
    kept = model.__dict__.get("preprocess")
    return deepcopy(kept.config) if isinstance(kept, Preprocess) else _owner(model).preprocess_config(model)


def tokenizer_config(model: nn.Module) -> dict[str, Any] | None:
    """The description of the model's tokenizer (`tokenizer_from_config` builds it), None if it has none."""
    kept = model.__dict__.get("tokenizer")
    return deepcopy(kept.config) if isinstance(kept, Tokenizer) else _owner(model).tokenizer_config(model)


def carried_tokenizer(model: nn.Module) -> tuple[dict[str, Any] | None, bytes | None]:
    """The description of the model's tokenizer that needs no network, and the file that goes with it
    (`Tokenizer.carried`)."""
    kept = model.__dict__.get("tokenizer")
    return kept.carried() if isinstance(kept, Tokenizer) else (tokenizer_config(model), None)


__all__ = [
    "Attention",
    "Block",
    "Encoders",
    "FAMILIES",
    "Family",
    "Mlp",
    "Preprocess",
    "Site",
    "Structure",
    "Tokenizer",
    "Tower",
    "UnknownModelError",
    "ValuePath",
    "attach",
    "carried_tokenizer",
    "config_of",
    "create_from_config",
    "encoders",
    "evaluating",
    "explicit_form",
    "families",
    "family_of",
    "load",
    "materialize_buffers",
    "names",
    "preprocess_config",
    "preprocess_from_config",
    "refuse_others",
    "tokenizer_config",
    "tokenizer_from_config",
    "towers",
    "value_path",
]
