"""Weather of ImageNet-C and CIFAR-10-C: snow and fog as published, ice that is generated."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from . import filters
from .ice import ice
from .published import Image, Published

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class Snow(Published):
    """Flakes (mean, deviation, size; all below the fourth number melt) that fall (radius, deviation of the smear), over
    a paler image (share that stays)."""

    name, label, group, least = "snow", "Snow", "weather", 16
    large = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )
    small = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, ...], rng: np.random.Generator) -> Image:
        mean, deviation, size, least, radius, sigma, share = strength
        drawn = mean + deviation * rng.standard_normal(image.shape[:2], dtype=np.float32)
        flakes = filters.enlarge(filters.planes(drawn), size)
        flakes = torch.where(flakes < least, 0, flakes.clamp(0, 1) * 255).floor() / 255
        fallen = filters.smear(flakes, int(radius), sigma, rng.uniform(-135, -45))[0].numpy()[..., None]
        fallen = np.rint(fallen * 255) / 255
        pale = np.maximum(image, (image @ GREY)[..., None] * 1.5 + 0.5)
        return share * image + (1 - share) * pale + fallen + fallen[::-1, ::-1]


class FrostGen(Published):
    """Share of the image + share of generated ice, with the shares of ImageNet-C's frost. Its ice are photographs, so
    that this is another corruption, held to their mean colours, deviations and spectra only."""

    name, label, group, least = "frost_gen", "Frost (generated)", "weather", 16
    large = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
    small = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, float], rng: np.random.Generator) -> Image:
        (own, frozen), (height, width) = strength, image.shape[:2]
        return own * image + frozen * ice(height, width, rng)


class Fog(Published):
    """(amount, how much smoother each finer scale is)."""

    name, label, group = "fog", "Fog", "weather"
    large = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
    small = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, float], rng: np.random.Generator) -> Image:
        amount, decay = strength
        height, width = image.shape[:2]
        field = plasma(max(height, width), decay, rng)[:height, :width, None]
        lightest = image.max()
        return (image + amount * field) * (lightest / (lightest + amount))


def plasma(side: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A height map in 0..1 of the next power of two of pixels a side, by the diamond-square algorithm on a torus. A
    scale's noise is uniform within the square of a width that starts at 100 and shrinks by `decay` for each."""
    n = 1 << max(side - 1, 1).bit_length()
    heights = np.zeros((n, n))
    step, width = n, 100.0
    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]

        def between(*around: NDArray[np.float64], reach: float = width**2) -> NDArray[np.float64]:
            return sum(around) / 4 + rng.uniform(-reach, reach, around[0].shape)

        below = corners + np.roll(corners, -1, 0)
        middles = between(below, np.roll(below, -1, 1))
        heights[half::step, half::step] = middles
        heights[::step, half::step] = between(middles, np.roll(middles, 1, 0), corners, np.roll(corners, -1, 1))
        heights[half::step, ::step] = between(middles, np.roll(middles, 1, 1), corners, np.roll(corners, -1, 0))
        step, width = half, width / decay
    heights -= heights.min()
    return heights / heights.max()
