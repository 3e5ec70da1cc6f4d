"""Corruptions of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich 2019), applied to the crop that a model sees.

Two parameter tables exist, for 224 and for 32 pixels; the image's side chooses one and nothing is scaled. Unlike the
published sets nothing is compressed again afterwards. The same (image id, name, severity, seed) gives the same pixels,
whatever the batch or the order. A family of corruptions is a file; another package adds one by an entry point of the
group `qclip.corruptions`, a script by `CORRUPTIONS.register`.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qclip.errors import DataError
from qclip.registry import Registry

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64  # up to here the 32-pixel table holds


class Corruption(Protocol):
    """`version` rises with every change of its pixels: embeddings that are kept on disk are then computed again."""

    name: str
    label: str
    version: int

    def __call__(
        self, image: NDArray[np.float64], severity: int, small: bool, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """image: `[H, W, 3]` in 0..1; the result may leave that range and is clipped. severity: 1 to 5. small: whether
        the parameters for 32 pixels hold. rng: the only source of chance."""
        ...


CORRUPTIONS: Registry[Corruption] = Registry(
    "corruption",
    "qclip.corruptions",
    {"gaussian_noise": "qclip.data.corruptions.noise:GaussianNoise"},
    ("label", "version", "__call__"),
    DataError,
)


def apply(image: NDArray[np.uint8], name: str, severity: int, seed: int, image_id: int = 0) -> NDArray[np.uint8]:
    """Corrupted copy of one uint8 image `[H, W, 3]`; severity 0 is the image itself.

    Raises DataError for an unknown name, a severity outside 0..5, another shape or dtype, or a corruption that gives
    anything but finite numbers of the image's shape.
    """
    check(name, severity)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"corruptions take uint8 images [H, W, 3], not {image.dtype} {list(image.shape)}.")
    if severity == 0:
        return image.copy()
    rng = np.random.default_rng([zlib.crc32(name.encode()), severity, seed % 2**64, image_id])
    small = max(image.shape[:2]) <= SMALL_SIDE
    worse = np.asarray(CORRUPTIONS.made(name)(image.astype(np.float64) / 255, severity, small, rng), np.float64)
    if worse.shape != image.shape or not np.isfinite(worse).all():
        raise DataError(
            f"corruption {name!r} gives {list(worse.shape)} with {np.size(worse) - np.isfinite(worse).sum()} NaN or "
            f"infinite values for an image {list(image.shape)}; it must give finite numbers of the same shape"
        )
    return np.rint(np.clip(worse, 0, 1) * 255).astype(np.uint8)


def check(name: str, severity: int) -> None:
    """Raises DataError for an unknown name or a severity outside 0..5."""
    CORRUPTIONS.get(name)
    if severity not in (0, *SEVERITIES):
        raise DataError(f"{name} has severities 1 to 5 (0 = none), not {severity!r}.")
