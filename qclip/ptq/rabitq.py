"""RaBitQ codes (Gao & Long, arXiv 2405.12497; several bits 2409.09913): a vector's direction on the mid-rise grid.

Of all codes the ones whose vector y, odd halves, has the largest cosine with w. The scale is found after them:

- unbiased: `|w|^2 / <y, w>`, with which `<scale * y, P x>` is `<w, x>` on average over random rotations P of w and x;
- least squares: `<y, w> / |y|^2`, which has the smaller error and shrinks every product by the squared cosine.

Methods rotate before: unrotated, the inner product's error depends on the vectors.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkernels.contract import TINY
from qkernels.grids import Grid
from qkernels.weights import Weight, weight_from_codes

Array = NDArray[Any]
ScaleRule = Literal["unbiased", "least-squares"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
MOST_BITS = 7  # odd integers of 8 bits do not fit the INT8 product

#: Mean squared sine between a Gaussian vector and its codes' vector, by bits: the least squared error of the mid-rise
#: grid on N(0, 1), relative to the variance.
SINE2 = {1: 0.36338, 2: 0.11885, 3: 0.03744, 4: 0.011543, 5: 0.003495, 6: 0.001040, 7: 0.000304}

_AT_ONCE = 1 << 17  # events of a chunk of rows, so that they stay in the cache
_STEP = 127  # the bits of an event's mantissa that hold its step


def relative_error(bits: int, rule: ScaleRule = "unbiased") -> float:
    """Expected `|w - scale * y|^2 / |w|^2` of a rotated weight at that width, by `SINE2`."""
    return SINE2[bits] / (1 - SINE2[bits]) if rule == "unbiased" else SINE2[bits]


@torch.no_grad()
def codes(weight: Tensor, bits: int) -> Tensor:
    """Codes c `[N, K]`, uint8, of float `[N, K]`, row by row: y = c - (2^bits - 1) / 2 has the largest cosine with the
    row. Raises ValueError beyond 1 to 7 bits.

    The signs of y are those of the row; magnitudes are `floor(t |w|) + 1/2`, clipped, for some t >= 0. All t at which
    one of them changes are tried in rising order, from t = 0 on: `O(2^bits K log K)` a row.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"RaBitQ codes have 1 to {MOST_BITS} bits here, not {bits}: their odd integers fit into int8")
    half, w = 2 ** (bits - 1), weight.detach().float().cpu().numpy()
    rows = max(1, _AT_ONCE // (w.shape[1] * half))
    found = np.empty(w.shape, np.uint8)

    def find(at: int) -> None:
        chunk = w[at : at + rows]
        steps = _steps(np.abs(chunk).astype(np.float64), half - 1)
        found[at : at + rows] = np.where(chunk < 0, half - 1 - steps, half + steps)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy sorts and sums without the interpreter's lock
        list(pool.map(find, range(0, len(w), rows)))
    return torch.from_numpy(found).to(weight.device)


def _steps(size: Array, most: int) -> Array:
    """For magnitudes `[N, K]` the steps k, 0 to `most`, whose k + 1/2 point best."""
    n, k = size.shape
    if most == 0:
        return np.zeros((n, k), np.uint8)
    # A value takes its next step at the event t = step / size; values of zero do so last, which gains nothing. The sort
    # is fast for plain numbers: each carries its step in the last bits of its mantissa, too few to change an order.
    steps = np.arange(1, most + 1, dtype=np.uint64)
    events = steps / np.maximum(size, 1e-60)[:, :, None]
    mantissa = events.view(np.uint64)
    mantissa &= ~np.uint64(_STEP)
    mantissa |= steps
    t = np.sort(events.reshape(n, -1), axis=1)  # [N, events]
    step = (t.view(np.uint64) & np.uint64(_STEP)).astype(np.float64)
    # It adds |w_i| = step / t to the product, and (c + 1/2)^2 - (c - 1/2)^2 = 2c to the squared length.
    product = np.cumsum(step / t, axis=1) + size.sum(1, keepdims=True) / 2
    length = np.cumsum(step, axis=1) * 2 + k / 4
    cosine = product * product / length
    at = cosine.argmax(1)[:, None]
    start = size.sum(1, keepdims=True) ** 2 / k  # of t = 0: (sum / 2)^2 / (K / 4)
    last = np.where(np.take_along_axis(cosine, at, 1) > start, np.take_along_axis(t, at, 1), 0.0)
    return (events <= last[:, :, None]).sum(2, dtype=np.uint8)


@torch.no_grad()
def scales(weight: Tensor, codes: Tensor, grid: Grid, rule: ScaleRule) -> Tensor:
    """Scales `[N]`, float32, of given codes, as their container holds them. A row of zeros has the smallest one that
    does: the grid has no zero."""
    w, y = weight.double(), codes.double() - grid.high / 2
    product = (w * y).sum(1)
    found = w.square().sum(1) / product if rule == "unbiased" else product / y.square().sum(1)
    return grid.held(torch.where(product > 0, found, 0.0).float().clamp(min=TINY))


def quantize(weight: Tensor, bits: int, rule: ScaleRule = "unbiased") -> tuple[Weight, Grid]:
    """Float `[N, K]` on its RaBitQ codes, a scale per row, in the container whose kernels multiply them; and the grid.
    Raises ValueError where a scale leaves the container's range."""
    grid = Grid(bits, "midrise")
    found = codes(weight, bits)
    return weight_from_codes(found, grid, scales(weight, found, grid, rule)), grid
