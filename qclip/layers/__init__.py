"""The modules that replace a float site, and the two cores that fuse them."""

from .attention import QuantizedAttention
from .embedding import QuantizedEmbedding
from .linear import Int4Linear, Int8Linear, QuantizedLinear
from .mlp import QuantizedMlp
from .patch import QuantizedPatch
from .simulated import SimulatedLinear
from .site import QuantizedSite

__all__ = [
    "Int4Linear",
    "Int8Linear",
    "QuantizedAttention",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMlp",
    "QuantizedPatch",
    "QuantizedSite",
    "SimulatedLinear",
]
