"""What this package asks of a family of models, and the families by name: one object per library of models.

Another package adds one in an entry point of the group `qclip.families`, a script calls `FAMILIES.register`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..registry import Registry
from ..untrusted.schema import Check
from .value_path import ValuePath, undefined

if TYPE_CHECKING:
    from .tower import Tower

Description = dict[str, Any]  # {"family": ..., "class": ..., "config": {...}}
Blocks = list[tuple[str, int]]  # prefix of numbered blocks, how many
Tables = list[tuple[str, tuple[int, int]]]  # name of a tensor, its shape
Shapes = Mapping[str, tuple[int, ...]]  # of tensors by their names


class UnknownModelError(ModelError):
    """A model name that no family knows."""


class Family:
    """Models of one library. `owns` and `towers` are enough to quantize; to save a model as an artifact and load it
    again, `classes`, `config_of` and `create_from_config` are needed too. The rest has defaults.

    A model keeps the factor on its cosines in the parameter `logit_scale`, as a logarithm (and SigLIP's `logit_bias`).
    """

    name: ClassVar[str] = ""
    #: Packages (or modules, by their dotted names) whose module classes `towers` takes apart, besides
    #: `hooks.LIBRARIES`. Code of other origin that would be lost (a subclass with a `forward` of its own) is refused by
    #: name.
    libraries: ClassVar[tuple[str, ...]] = ()
    #: By the name of a class: which settings the `config` of a description may hold (`qclip.untrusted.schema`).
    classes: ClassVar[Mapping[str, Check]] = {}
    #: Names of models that begin so are loaded by `load` ("hf:").
    prefixes: ClassVar[tuple[str, ...]] = ()
    #: Rows of `qclip models`: a name that `load` takes, and what it is.
    examples: ClassVar[tuple[tuple[str, str], ...]] = ()

    # ---- towers

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is one of this family, or this family ought to say why it cannot be quantized."""
        return False

    def towers(self, model: Any) -> dict[str, Tower]:
        """The towers by name ("vision", "text"), in explicit form, in place: see `qclip.models.towers`. Called again on
        a model that has this form already, it only describes it. Raises ModelError."""
        raise NotImplementedError

    # ---- calling

    def encodes(self, model: nn.Module) -> tuple[str, ...]:
        """What `model` embeds: images ("vision"), texts ("text"), or both."""
        both = hasattr(model, "encode_image") and hasattr(model, "encode_text")
        return ("vision", "text") if both else ()

    def pools(self, model: Any) -> bool:
        """Whether embeddings are all that is read of the towers: not the other tokens, too."""
        return True

    def encode_image(self, model: Any, images: Tensor) -> Tensor:
        """`[B, 3, H, W]`, preprocessed, of the model's device and dtype -> `[B, E]`, not normalised."""
        return model.encode_image(images)  # type: ignore[no-any-return]

    def encode_text(self, model: Any, tokens: Tensor) -> Tensor:
        """Token ids `[B, L]` on any device -> `[B, E]`, not normalised."""
        return model.encode_text(tokens.to(model.logit_scale.device))  # type: ignore[no-any-return]

    def text_positions(self, model: Any, tokens: Tensor) -> Tensor | None:
        """Which positions of the text tower reach the embeddings of `tokens` `[B, L]`: bool `[B, S]`, or None where
        those that do not are left out by `encode_text`, or there are none."""
        return None

    def text_ends(self, model: Any, tokens: Tensor) -> Tensor:
        """The position of each text's last token, int64 `[B]`: texts of equal ends are calibrated with together. Here
        that of the largest id, which is CLIP's EOT."""
        return tokens.argmax(-1)

    def value_path(self, model: Any, tower: Tower) -> ValuePath:
        """How patches get embeddings of their own (`qclip.models.value_path`); `tower`: the vision tower, in explicit
        form. Raises ModelError where that is not defined."""
        raise undefined(model, "its family does not say how")

    def image_size(self, model: Any) -> int | tuple[int, int] | None:
        """Side of the input images in pixels, or height and width; None where only the preprocessing knows."""
        return getattr(getattr(model, "visual", None), "image_size", None)

    def preprocess_config(self, model: Any) -> dict[str, Any] | None:
        """What `qclip.models.Preprocess` is made of for a model that was not loaded with one; None: not known."""
        return None

    def tokenizer_config(self, model: Any) -> dict[str, Any] | None:
        """What `qclip.models.Tokenizer` is made of for a model that was not loaded with one; None: not known."""
        return None

    # ---- by name, and by description

    def names(self) -> list[str]:
        """What `load` takes, as far as it can be listed."""
        return []

    def load(self, name: str, device: str | torch.device = "cpu", arch: str | dict | None = None) -> nn.Module:
        """The float model of a name that begins with one of `prefixes`; see `qclip.models.load`."""
        raise UnknownModelError(f"the model family {self.name!r} loads no models by name")

    def config_of(self, model: Any) -> Description:
        """The JSON-able description from which `create_from_config` builds this architecture again. Raises
        ModelError."""
        raise ModelError(
            f"{type(model).__module__}.{type(model).__name__} cannot be saved: its family, "
            f"{self.name or 'which is not registered,'}, has no description of it (`config_of`)"
        )

    def create_from_config(self, config: Description, device: str | torch.device = "cpu") -> nn.Module:
        """A model of the described architecture with random weights, or without memory on the meta device. `config` was
        checked against `classes`. Raises ModelError."""
        raise NotImplementedError

    def rebuild_buffers(self, model: nn.Module) -> None:
        """Make anew, on the CPU, the buffers that no checkpoint stores, for a model that began on the meta device."""

    # ---- what a description must agree with

    def grid(self, config: Description) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Height and width of the images that a described model has positions for, and patches down and across; None
        where no setting says so."""
        return None

    def sizes(self, config: Description) -> tuple[Blocks, Tables]:
        """Which tensors a file of a described model holds, as far as they grow without bound when the description lies:
        depths, positions, vocabularies. They are compared before anything is built."""
        return [], []

    def plain(self, config: Description, shapes: Shapes) -> Shapes:
        """Shapes by the names that `sizes` uses: versions of a library may wrap a model differently."""
        return shapes


#: The last one named is asked first whether it owns a model: a family of your own may take over a subclass.
FAMILIES: Registry[Family] = Registry(
    "model family",
    "qclip.families",
    {
        "timm": "qclip.models.timm:FAMILY",
        "huggingface": "qclip.models.huggingface:FAMILY",
        "open_clip": "qclip.models.open_clip_family:FAMILY",
    },
    attributes=tuple(name for name in vars(Family) if not name.startswith("_")),
    error=ModelError,
)
#: Loads what has no family's prefix: names of architectures, checkpoint files.
DEFAULT = "open_clip"


def families() -> Iterator[Family]:
    """Every family, in the order in which they are asked."""
    return (FAMILIES.made(name) for name in reversed(FAMILIES.names()))


def family_of(model: nn.Module) -> Family | None:
    """The family of `model`; None where none owns it."""
    return next((family for family in families() if family.owns(model)), None)


def described_family(config: Mapping[str, Any]) -> Family:
    """The family that a description names, which must be registered. Raises ModelError."""
    return FAMILIES.made(config.get("family", DEFAULT))


def materialize_buffers(model: nn.Module) -> nn.Module:
    """Rebuild the buffers that no checkpoint stores (masks, position ids), for a model that began on the meta device.

    They are made on the CPU; raises ModelError naming one that its family does not rebuild.
    """
    (family_of(model) or Family()).rebuild_buffers(model)
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                raise ModelError(
                    f"buffer '{prefix}.{name}' of {type(model).__name__} is in no checkpoint and cannot be rebuilt"
                )
    return model
