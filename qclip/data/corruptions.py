"""Corruptions of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich 2019), applied to the crop that a model sees.

Two parameter tables exist, for 224 and for 32 pixels; the image's side chooses one and nothing is scaled. Unlike the
published sets nothing is compressed again afterwards. The same (image id, name, severity, seed) gives the same pixels,
whatever the batch or the order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qclip.errors import DataError, nearest

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64  # up to here the 32-pixel table holds
NOISE_SIGMA = {"large": (0.08, 0.12, 0.18, 0.26, 0.38), "small": (0.04, 0.06, 0.08, 0.09, 0.10)}


def _gaussian_noise(image: NDArray[np.float64], severity: int, small: bool, rng: np.random.Generator) -> NDArray:
    sigma = NOISE_SIGMA["small" if small else "large"][severity - 1]
    return image + sigma * rng.standard_normal(image.shape)


_TABLE: dict[str, Callable[[NDArray[np.float64], int, bool, np.random.Generator], NDArray]] = {
    "gaussian_noise": _gaussian_noise,
}
NAMES = tuple(_TABLE)


def apply(image: NDArray[np.uint8], name: str, severity: int, seed: int, image_id: int = 0) -> NDArray[np.uint8]:
    """Corrupted copy of one uint8 image `[H, W, 3]`; severity 0 is the image itself.

    Raises DataError for an unknown name, a severity outside 0..5, or another shape or dtype.
    """
    check(name, severity)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"corruptions take uint8 images [H, W, 3], not {image.dtype} {list(image.shape)}.")
    if severity == 0:
        return image.copy()
    rng = np.random.default_rng([zlib.crc32(name.encode()), severity, seed % 2**64, image_id])
    small = max(image.shape[:2]) <= SMALL_SIDE
    worse = _TABLE[name](image.astype(np.float64) / 255, severity, small, rng)
    return np.rint(np.clip(worse, 0, 1) * 255).astype(np.uint8)


def check(name: str, severity: int) -> None:
    """Raises DataError for an unknown name or a severity outside 0..5."""
    if name not in _TABLE:
        raise DataError(f"unknown corruption {name!r}; {nearest(name, NAMES)}")
    if severity not in (0, *SEVERITIES):
        raise DataError(f"{name} has severities 1 to 5 (0 = none), not {severity!r}.")
