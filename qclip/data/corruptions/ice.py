"""Generated ice: ridged, domain-warped noise in the colours of the ice on windows.

It is held to what was measured of the photographs behind ImageNet-C's frost: mean colours, deviation of a channel and
the slope of the radial amplitude spectrum. Nothing else of them is here.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from . import filters

LOOKS = (  # mean colour, deviation of a channel, share of the draws
    ((0.31, 0.59, 0.65), 0.12, 0.2),
    ((0.79, 0.81, 0.84), 0.11, 0.4),
    ((0.54, 0.60, 0.65), 0.14, 0.2),
    ((0.44, 0.48, 0.53), 0.15, 0.2),
)


def ice(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """`[height, width, 3]`, mostly in 0..1."""
    colour, deviation, _ = LOOKS[rng.choice(len(LOOKS), p=[share for _, _, share in LOOKS])]
    side = max(height, width)
    drift, needles, grain = _fields(side, rng)
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    reach = 0.06 * side
    bent = filters.sample(needles[None], y + reach * drift, x + reach * drift.T, edge_twice=True)[0]
    ridges = 1 - bent.abs()  # crests where the warped field crosses zero
    texture = (ridges - ridges.mean()) / ridges.std() + 0.95 * grain + 0.5 * drift
    texture = (texture - texture.mean()) / texture.std()
    found = np.array(colour, np.float32) + np.float32(deviation) * texture[:height, :width, None].numpy()
    return found


def _fields(side: int, rng: np.random.Generator) -> torch.Tensor:
    """Three Gaussian fields `[3, side, side]`, mean 0 and deviation 1, of falling smoothness."""
    n = -(-side // 32) * 32
    white = torch.from_numpy(rng.standard_normal((3, n, n), dtype=np.float32))
    fields = torch.fft.irfft2(torch.fft.rfft2(white) * _slopes(n), s=(n, n))[:, :side, :side]
    return (fields - fields.mean((1, 2), keepdim=True)) / fields.std((1, 2), keepdim=True)


@functools.lru_cache(maxsize=8)
def _slopes(n: int) -> torch.Tensor:
    """Amplitudes `[3, n, n / 2 + 1]`: 1 / f to these powers."""
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
    f[0, 0] = np.inf
    return torch.from_numpy(np.stack([f**-power for power in (2.0, 1.2, 0.4)]).astype(np.float32))
