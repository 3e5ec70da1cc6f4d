"""The modules that replace a float site, and the two cores that fuse them."""

from .attention import QuantizedAttention
from .branch import Branch
from .embedding import QuantizedEmbedding
from .linear import Int4Linear, Int8Linear, QuantizedLinear
from .mlp import QuantizedMlp
from .operands import AttentionOperands
from .patch import QuantizedPatch
from .registry import LAYERS, check, from_facts
from .simulated import SimulatedLinear
from .site import Description, QuantizedSite, grid_bits, stored_bits
from .transforms import TRANSFORMS, Hadamard, RandomHadamard, Scale, Shift, Transform

__all__ = [
    "LAYERS",
    "TRANSFORMS",
    "AttentionOperands",
    "Branch",
    "Description",
    "Hadamard",
    "Int4Linear",
    "Int8Linear",
    "QuantizedAttention",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMlp",
    "QuantizedPatch",
    "QuantizedSite",
    "RandomHadamard",
    "Scale",
    "Shift",
    "SimulatedLinear",
    "Transform",
    "check",
    "from_facts",
    "grid_bits",
    "stored_bits",
]
