"""Quantization-aware training: a float model learns with rounded weights and inputs, and becomes a quantized one."""

from __future__ import annotations

from .checkpoint import CheckpointError
from .conversion import ConversionError, convert
from .fit import train
from .pairs import Pairs
from .preparation import prepare
from .quantizer import InputRounding, LearnedScale, Quantizer, Rounding, WeightRounding, straight_through
from .settings import Settings
from .trainer import TrainingError

__all__ = [
    "CheckpointError",
    "ConversionError",
    "InputRounding",
    "LearnedScale",
    "Pairs",
    "Quantizer",
    "Rounding",
    "Settings",
    "TrainingError",
    "WeightRounding",
    "convert",
    "prepare",
    "straight_through",
    "train",
]
