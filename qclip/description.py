"""What the description of an artifact (`qclip.json`) may hold, and what of it must agree.

Everything here is checked before anything is built; the settings of the model itself stand in `models/allowed.py`.
"""

from __future__ import annotations

from typing import Any

from . import layers, typed
from .errors import ArtifactError, ModelError, RecipeError
from .models import allowed
from .recipes import FLOAT, Treatment
from .untrusted import TensorFile
from .untrusted.schema import Refused, anything, mapping, record, text, validate, whole

FLOATS = ("F32", "F16", "BF16")

_DIGEST = text(64, "[0-9a-f]{64}")
_NAME = text(400)


def _plan(value: Any, where: str) -> None:
    """What was wanted of a site."""
    try:
        typed.from_dict(Treatment, value, where, RecipeError)
    except RecipeError as error:
        raise Refused(str(error)) from None


CONTENT = {
    "format": whole(1, 1000),
    "architecture": anything,  # these three by `allowed.py`
    "preprocess": anything,
    "tokenizer": anything,
    "source": text(4096),
    "recipe": anything,  # by `Recipe.from_dict`
    "plans": mapping(_NAME, _plan, 20_000),
    "sites": mapping(_NAME, layers.check, 20_000),
    "attention": mapping(_NAME, layers.AttentionOperands.schema(), 20_000),  # quantizers inside attention, if any
    "coverage": anything,  # shown, never used
    "provenance": mapping(_NAME, anything, 200),
    "tensors_sha256": _DIGEST,
    "tensors_bytes": whole(8, 2**48),
    "description_sha256": _DIGEST,
}
NEEDED = tuple(key for key in CONTENT if key not in ("attention", "coverage"))


def check(content: dict[str, Any], where: str) -> None:
    """Raises ArtifactError for a key, type or range that no artifact of ours has, naming it, and for parts of the
    description that contradict each other. `where` names the artifact."""
    if reason := _refusal(content):
        raise ArtifactError(f"{where!r}: {reason}; the artifact is edited or foreign")


def check_saved(content: dict[str, Any]) -> None:
    """Before a description is written: what could not be loaded again is not saved. Raises ModelError."""
    if reason := _refusal(content):
        raise ModelError(f"the model cannot be saved: {reason}")


def _refusal(content: dict[str, Any]) -> str:
    """Why a description is refused; empty for one that is not."""
    try:
        validate(record(CONTENT, NEEDED), content, "description", ArtifactError)
        allowed.check_architecture(content["architecture"], ArtifactError)
        if content["preprocess"] is not None:
            allowed.check_preprocess(content["preprocess"], ArtifactError)
        if content["tokenizer"] is not None:
            allowed.check_tokenizer(content["tokenizer"], ArtifactError)
        if content["preprocess"] is not None:
            allowed.check_image_size(content["architecture"], content["preprocess"], ArtifactError)
    except ArtifactError as error:
        return str(error)
    return ""


def check_layer(name: str, layer: layers.QuantizedSite, plan: Treatment) -> None:
    """Raises ArtifactError where a layer is not what its plan asks for."""
    said, where = layer.describe(), f"the layer {name!r}"
    if said.weight_bits != plan.weight_bits or layer.grid != plan.grid:
        raise ArtifactError(f"{where} has weights on {layer.grid}, and its plan is {plan.grid}")
    if (said.activation_bits or FLOAT) != plan.activation_bits:
        has = said.activation_bits or FLOAT
        raise ArtifactError(f"{where} has inputs of {has} bits and its plan says {plan.activation_bits}")
    static = layer.input_scale is not None
    if static != plan.static:
        raise ArtifactError(f"{where} has {'a' if static else 'no'} static scale, unlike its plan")
    grid = getattr(layer, "activation_grid", "sym") if layer.input_zero is None else "asym"
    if grid != plan.activation_grid or (static and grid == "asym" and layer.input_zero is None):
        has = "a" if layer.input_zero is not None else "no"
        raise ArtifactError(f"{where} has {has} zero point of its input, and its plan is {plan.activation_grid!r}")


def check_tensors(content: dict[str, Any], tensors: TensorFile, where: str) -> None:
    """Raises ArtifactError where the tensors of a file cannot be those of its (checked) description: before anything is
    built, so that what is built is no larger than the file."""
    for name, facts in tensors.items():
        if facts.dtype == "F64":
            raise ArtifactError(f"{name!r} in {where!r} is float64; artifacts hold {', '.join(FLOATS)}")
    shapes = {name: facts.shape for name, facts in tensors.items()}
    allowed.check_sizes(content["architecture"], shapes, where, ArtifactError)


__all__ = ["check", "check_layer", "check_saved", "check_tensors"]
