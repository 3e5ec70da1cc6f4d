"""Quantization kernels for PyTorch: one contract for each op (`qkernels.ops`), several backends behind it.

    codes, scale = qkernels.quantize_per_token(x)
    weight = qkernels.pack(qkernels.Int8Weight.quantize(linear.weight))
    y = qkernels.int8_linear(codes, scale, weight, linear.bias)

Needs torch and nothing else. Without native code (no C++ compiler at installation) the slow reference backend runs,
with one warning.
"""

from .dispatch import (
    FallbackError,
    FallbackWarning,
    SettingError,
    attention_dtype,
    backend_for,
    info,
    output_group,
    pack,
    runner,
)
from .grids import Grid
from .heap import release_memory
from .ops import (
    attention,
    channel_absmax,
    fake_quantize,
    hadamard_transform,
    int4_linear,
    int8_linear,
    layer_norm_quantize,
    quantize_patches,
    quantize_per_token,
    smooth_scale,
)
from .weights import Int4Weight, Int8Weight, quantize_weight, zero_point_bias

__all__ = [
    "FallbackError",
    "FallbackWarning",
    "Grid",
    "Int4Weight",
    "Int8Weight",
    "SettingError",
    "attention",
    "attention_dtype",
    "backend_for",
    "channel_absmax",
    "fake_quantize",
    "hadamard_transform",
    "output_group",
    "info",
    "int4_linear",
    "int8_linear",
    "layer_norm_quantize",
    "pack",
    "quantize_patches",
    "quantize_per_token",
    "quantize_weight",
    "release_memory",
    "runner",
    "smooth_scale",
    "zero_point_bias",
]
