"""What every backend must agree on: dtypes, names, numbers, and what ends a linear op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class Epilogue(NamedTuple):
    """What a linear op does after its product, in the order of its arguments: `activation(product + bias) + residual`,
    and the form in which that leaves. Meanings are those of `qkernels.ops.int8_linear`.

    Backends get it checked and normalised: `bias` `[N]` of any float dtype (GPU kernels read it so: a cast would be a
    launch), `residual` `[..., N]`, `out_scale` float32 `[]` or `[N]`, `out_zero_point` float32 `[]`.
    """

    bias: Tensor | None = None
    activation: str | None = None
    residual: Tensor | None = None
    out_scale: Tensor | None = None
    out_zero_point: Tensor | None = None
    out_group: int | None = None
    out_dtype: torch.dtype = torch.float32

    def results(self, lead: Sequence[int], n: int) -> list[tuple[Sequence[int], torch.dtype]]:
        """Shape and dtype of each result of `lead` rows and n outputs."""
        if self.out_group is not None:
            return [((*lead, n), torch.int8), ((*lead, -(-n // GROUP)), torch.float32)]
        return [((*lead, n), self.out_dtype if self.out_scale is None else torch.int8)]

    def allocate(self, lead: Sequence[int], n: int, device: torch.device) -> Any:
        """Memory for the results: a tensor, or a pair with `out_group`."""
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results(lead, n)]
        return made[0] if len(made) == 1 else tuple(made)


NO_EPILOGUE = Epilogue()
