"""What the description of an artifact (`qclip.json`) may hold, and what of it must agree.

Everything here is checked before anything is built; the settings of the model itself stand in `models/allowed.py`.
"""

from __future__ import annotations

from typing import Any

from . import models
from .errors import ArtifactError, ModelError
from .models import allowed
from .recipes import FLOAT, OBSERVERS
from .untrusted import TensorFile
from .untrusted.schema import (
    anything,
    either,
    flag,
    listing,
    mapping,
    one_of,
    optional,
    record,
    text,
    validate,
    whole,
)

LINEAR = {"Int8Linear", "Int4Linear", "SimulatedLinear"}
EMBEDDING = "QuantizedEmbedding"
FLOATS = ("F32", "F16", "BF16")

_DIGEST = text(64, "[0-9a-f]{64}")
_NAME = text(400)
_BITS = whole(2, 8)
SITE = record(
    {
        "class": one_of(*sorted(LINEAR), EMBEDDING),
        "shape": listing(whole(1, allowed.VOCABULARY), 2, 2),
        "group": optional(whole(1, allowed.VOCABULARY)),
        **dict.fromkeys(("zeros", "bias", "smooth", "input_scale", "float_input"), flag),
        "dtype": one_of("float32", "float16", "bfloat16"),
        "patch": listing(whole(1, allowed.SIDE), 2, 2),
        "activation_bits": either(one_of(FLOAT), _BITS),
    },
    ("class", "shape", "group", "zeros", "bias", "smooth", "input_scale", "dtype"),
)
PLAN = record(
    {
        "state": one_of("real", "simulated", "float"),
        "weight_bits": _BITS,
        "activation_bits": either(one_of(FLOAT), _BITS),
        "group": optional(one_of(32, 64, 128)),
        "static": flag,
        "weight_observer": one_of(*OBSERVERS),
    },
    ("state",),
)
CONTENT = {
    "format": whole(1, 1000),
    "architecture": anything,  # these three by `allowed.py`
    "preprocess": anything,
    "tokenizer": anything,
    "source": text(4096),
    "recipe": anything,  # by `Recipe.from_dict`
    "plans": mapping(_NAME, PLAN, 20_000),
    "sites": mapping(_NAME, SITE, 20_000),
    "coverage": anything,  # shown, never used
    "provenance": mapping(_NAME, anything, 200),
    "tensors_sha256": _DIGEST,
    "tensors_bytes": whole(8, 2**48),
    "description_sha256": _DIGEST,
}
NEEDED = tuple(key for key in CONTENT if key != "coverage")


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
        for name, facts in content["sites"].items():
            _check_site(name, facts, content["plans"].get(name, {"state": "float"}))
    except ArtifactError as error:
        return str(error)
    return ""


def _check_site(name: str, facts: dict[str, Any], plan: dict[str, Any]) -> None:
    """One layer against its plan, and its settings against each other."""
    where = f"the layer {name[:120]!r}"
    kind, (_, k), group = facts["class"], facts["shape"], facts["group"]
    if plan["state"] == "float":
        raise ArtifactError(f"{where} has no plan that quantizes it, so the layers do not fit the plans")
    bits, activation = plan.get("weight_bits", 8), plan.get("activation_bits", 8)
    if kind == EMBEDDING:
        wanted = EMBEDDING if (bits, activation) == (8, FLOAT) else ""
    elif plan["state"] == "simulated":
        wanted = "SimulatedLinear"
    else:
        wanted = {8: "Int8Linear", 4: "Int4Linear"}.get(bits, "")
    if kind != wanted:
        raise ArtifactError(f"{where} is of class {kind!r}, which is not what its plan of {bits} bits is run by")
    if (group is not None) != (bits == 4) or (group is not None and group not in (32, 64, 128, k)):
        raise ArtifactError(f"{where} has weight groups of {group}, which its {bits} bits and {k} inputs do not have")
    if group is None and facts["zeros"]:
        raise ArtifactError(f"{where} has zero points, which its grid of {bits} bits does not have")
    if facts["input_scale"] and activation == FLOAT:
        raise ArtifactError(f"{where} has an input scale, and its plan leaves the input float")
    if kind == "SimulatedLinear" and facts.get("activation_bits") != activation:
        raise ArtifactError(f"{where} has inputs of {facts.get('activation_bits')} bits and its plan says {activation}")
    if kind == "Int4Linear" and facts.get("float_input") is not (activation == FLOAT):
        raise ArtifactError(f"{where} says float_input {facts.get('float_input')}, its plan {activation} bits")


def check_tensors(content: dict[str, Any], tensors: TensorFile, where: str) -> None:
    """Raises ArtifactError where the tensors of a file cannot be those of its (checked) description: before anything is
    built, so that what is built is no larger than the file."""
    for name, facts in tensors.items():
        if facts.dtype == "F64":
            raise ArtifactError(f"{name!r} in {where!r} is float64; artifacts hold {', '.join(FLOATS)}")
    shapes = {name: facts.shape for name, facts in tensors.items()}
    allowed.check_sizes(content["architecture"], shapes, where, ArtifactError)


def check_skeleton(site: models.Site, facts: dict[str, Any]) -> None:
    """Raises ArtifactError where a layer of the description cannot stand for the float module of its site."""
    module, where = site.module, f"the layer {site.name!r}"
    shape = tuple(module.weight.flatten(1).shape)  # type: ignore[operator, union-attr]
    if shape != tuple(facts["shape"]):
        raise ArtifactError(f"{where} has the shape {tuple(facts['shape'])} instead of {shape}")
    if facts["bias"] != (getattr(module, "bias", None) is not None):
        raise ArtifactError(f"{where} {'has a' if facts['bias'] else 'lacks the'} bias, unlike its architecture")
    if (facts["class"] == EMBEDDING) != (site.kind == "embedding"):
        raise ArtifactError(f"{where} is of class {facts['class']!r}, and its site is of kind {site.kind!r}")
    kernel = getattr(module, "kernel_size", None)
    patch = facts.get("patch")
    if (None if kernel is None else tuple(kernel)) != (None if patch is None else tuple(patch)):
        raise ArtifactError(f"{where} takes patches of {patch}, and its architecture of {kernel}")


__all__ = ["check", "check_saved", "check_skeleton", "check_tensors"]
