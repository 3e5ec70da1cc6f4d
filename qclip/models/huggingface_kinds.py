"""Which classes of transformers are known, and how their versions and variants nest the same towers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import ModelError
from .explicit import unsupported

ALIGN = "its EfficientNet and BERT towers have no kernels here"
BOTH = ("vision", "text")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of models. `family`: "clip", "siglip" or "siglip2", as its image tower is. `towers`: those it has.
    `projected`: linear maps into the joint space stand behind the towers. `bert`: its text tower is BERT's; the number
    is how many tokens it was trained with."""

    family: str
    towers: tuple[str, ...] = BOTH
    projected: bool = False
    bert: int = 0

    @property
    def clip(self) -> bool:
        return self.family == "clip"

    @property
    def naflex(self) -> bool:
        """Whether it takes patches of grids of any shape, with masks, not images."""
        return self.family == "siglip2" and "vision" in self.towers


KINDS: dict[str, Kind] = {
    "CLIPModel": Kind("clip", projected=True),
    "AltCLIPModel": Kind("clip", projected=True, bert=77),
    "ChineseCLIPModel": Kind("clip", projected=True, bert=52),
    "CLIPVisionModelWithProjection": Kind("clip", ("vision",), projected=True),
    "CLIPTextModelWithProjection": Kind("clip", ("text",), projected=True),
    "CLIPVisionModel": Kind("clip", ("vision",)),
    "CLIPTextModel": Kind("clip", ("text",)),
    "SiglipModel": Kind("siglip"),
    "SiglipVisionModel": Kind("siglip", ("vision",)),
    "SiglipTextModel": Kind("siglip", ("text",)),
    "Siglip2Model": Kind("siglip2"),
    "Siglip2VisionModel": Kind("siglip2", ("vision",)),
    "Siglip2TextModel": Kind("siglip2", ("text",)),
}


def class_names(model: nn.Module) -> set[str]:
    """Names of the transformers classes above an object, told without importing transformers."""
    return {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.")}


def owns(model: nn.Module) -> bool:
    """Whether this adapter is for `model`, or ought to say why it is not."""
    return bool(class_names(model) & {*KINDS, "AlignModel", "PreTrainedModel"})


def name_of(model: nn.Module) -> str:
    """The known class that `model` is of. Raises ModelError for others."""
    names = class_names(model)
    if found := [name for name in KINDS if name in names]:
        version = sys.modules["transformers"].__version__
        if KINDS[found[0]].bert and version.startswith("4."):  # whose own calls of these models differ, or fail
            raise ModelError(f"{found[0]} is supported with transformers 5 and newer, not {version}; update it")
        return found[0]
    if "AlignModel" in names:
        raise ModelError(f"ALIGN (AlignModel) is not supported: {ALIGN}; use a CLIP or SigLIP model")
    raise unsupported(model)


def kind_of(model: nn.Module) -> Kind:
    return KINDS[name_of(model)]


def nested(model: nn.Module, tower: str) -> Iterator[Any]:
    """`model`, what it wraps, and so on down to the transformer of this tower itself, which comes last: versions wrap
    it differently, and a model of one tower may be that tower."""
    below: Any = model
    while below is not None:
        yield below
        below = getattr(below, f"{tower}_model", None)


def inner(model: nn.Module, tower: str) -> Any:
    """The transformer of a tower itself."""
    *_, last = nested(model, tower)
    return last


def settings_of(model: Any, tower: str) -> Any:
    """The configuration of a tower."""
    return getattr(model.config, f"{tower}_config", model.config)
