"""Blur of ImageNet-C and CIFAR-10-C: out of focus, in motion, zooming, Gaussian."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import filters
from .published import Image, Published

LEAST = 16  # pixels: the widest kernel of the 32-pixel tables still has an image around it


class DefocusBlur(Published):
    """A disk (radius, deviation of its soft edge)."""

    name, label, group, least = "defocus_blur", "Defocus blur", "blur", LEAST
    large = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
    small = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, float], rng: np.random.Generator) -> Image:
        height, width = image.shape[:2]
        spectrum, radius = _disk_spectrum(*strength, height, width)
        return filters.image_of(filters.convolve(filters.planes(image), spectrum, radius))


@functools.lru_cache(maxsize=32)
def _disk_spectrum(radius: float, soft: float, height: int, width: int) -> tuple[Tensor, int]:
    kernel = disk(radius, soft)
    return filters.kernel_spectrum(kernel, height, width), len(kernel) // 2


def disk(radius: float, soft: float) -> NDArray[np.float64]:
    """The pixels of a disk, softened by 3 x 3 pixels (5 x 5 for more than 8) of a Gaussian. The square that holds it
    is 17 pixels wide up to a radius of 8; a disk that fills it loses part of its edge to the mirrored border."""
    reach, around = (8, 1) if radius <= 8 else (int(radius), 2)
    along = np.arange(-reach, reach + 1)
    hard = (along[:, None] ** 2 + along**2 <= radius**2).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-around, around + 1) / soft) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        wide = np.pad(hard, [(around, around) if axis == a else (0, 0) for a in (0, 1)], mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(wide, len(weights), axis)
        hard = windows @ weights
    return hard / (along[:, None] ** 2 + along**2 <= radius**2).sum()


class MotionBlur(Published):
    """A smear (radius, deviation) in a direction up to 45 degrees off the horizontal."""

    name, label, group, least = "motion_blur", "Motion blur", "blur", LEAST
    large = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
    small = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))

    def worsen(self, image: NDArray[np.float64], strength: tuple[int, float], rng: np.random.Generator) -> Image:
        radius, sigma = strength
        return filters.image_of(filters.smear(filters.planes(image), radius, sigma, rng.uniform(-45, 45)))


class ZoomBlur(Published):
    """The mean of the image and of its enlargements (up to, step)."""

    name, label, group, least = "zoom_blur", "Zoom blur", "blur", LEAST
    large = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    small = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, float], rng: np.random.Generator) -> Image:
        clear = filters.planes(image)
        factors = np.arange(1, *strength)  # as floats go: 12 factors for (1.11, 0.01), the last of them 1.11
        total = clear.clone()
        for factor in factors:
            total += filters.enlarge(clear, float(factor))
        return filters.image_of(total / (len(factors) + 1))


class GaussianBlur(Published):
    """A Gaussian of this deviation, in pixels."""

    name, label, group = "gaussian_blur", "Gaussian blur", "validation"
    large = (1, 2, 3, 4, 6)
    small = (0.4, 0.6, 0.7, 0.8, 1)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        return filters.image_of(filters.smooth(filters.planes(image), strength))
