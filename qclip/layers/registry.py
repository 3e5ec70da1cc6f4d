"""Layers by class name, so that code which stores or counts layers names no class."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ArtifactError
from ..registry import Registry
from ..untrusted.schema import Refused, one_of, shown

#: Classes of layers: ours, those of entry points "qclip.layers", and registered ones. Artifacts load no others.
LAYERS: Registry[Any] = Registry(
    "layer",
    "qclip.layers",
    {
        "QuantizedEmbedding": "qclip.layers.embedding:QuantizedEmbedding",
        "Int8Linear": "qclip.layers.linear:Int8Linear",
        "Int4Linear": "qclip.layers.linear:Int4Linear",
        "SimulatedLinear": "qclip.layers.simulated:SimulatedLinear",
        "QuantizedPatch": "qclip.layers.patch:QuantizedPatch",
    },
    attributes=("facts", "schema", "from_facts", "describe", "misfit", "dequantized"),
    error=ArtifactError,
)


def from_facts(facts: dict[str, Any]) -> nn.Module:
    """The layer that `facts()` of another one describes, empty, on the meta device. Raises ArtifactError where they
    contradict each other; `check` comes before."""
    return LAYERS.get(facts["class"]).from_facts(facts)


def check(facts: Any, where: str) -> None:
    """What the facts of a layer may hold, for `untrusted.schema`: those of its class."""
    if not isinstance(facts, dict):
        raise Refused(f"{where} is {shown(facts)}; it must be an object")
    one_of(*LAYERS)(facts.get("class"), f"{where}.class")
    LAYERS.get(facts["class"]).schema()(facts, where)
