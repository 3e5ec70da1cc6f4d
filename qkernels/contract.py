"""What every backend must agree on: dtypes, names and numbers."""

from __future__ import annotations

import torch

# Raise it where some kernel comes to give other bits for the same input: embeddings that are kept on disk are then
# computed again.
NUMBERS = 1

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")

GROUP = 128  # channels that share one activation scale where scales are per group
WEIGHT_GROUPS = (32, 64, 128)  # inputs that may share one scale of a 4-bit weight, besides all K
WIDEST = 2**23  # zero points and bounds of codes lie within: float32 holds them and their sums exactly
MAX_K = 65536  # above it an int32 accumulator, shifted by 128, could overflow
TINY = 2.0**-100  # a row (or group) whose largest magnitude is below this counts as a row of zeros
SMALLEST_NORMAL_HALF = 2.0**-14  # below it a float16 scale would lose bits

ESTIMATORS = ("ste", "lsq", "lsq_plus", "ewgs", "pact", "dorefa")  # of fake_quantize; its C++ numbers them so
LEARNED_SCALE = ("lsq", "lsq_plus", "ewgs", "pact")  # those that give the scale a gradient
OFFSET = ("lsq_plus", "ewgs")  # those whose zero point is a float offset, with a gradient
