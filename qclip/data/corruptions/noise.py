"""Noise of ImageNet-C and CIFAR-10-C: every value of every pixel by itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .published import Image, Published


class GaussianNoise(Published):
    """The same deviation in every pixel and channel."""

    name, label, group = "gaussian_noise", "Gaussian noise", "noise"
    large = (0.08, 0.12, 0.18, 0.26, 0.38)
    small = (0.04, 0.06, 0.08, 0.09, 0.10)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        return image + strength * rng.standard_normal(image.shape)


class ShotNoise(Published):
    """Photons that are counted: Poisson, `strength` of them where a channel is white."""

    name, label, group = "shot_noise", "Shot noise", "noise"
    large = (60, 25, 12, 5, 3)
    small = (500, 250, 100, 75, 50)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        return rng.poisson(image * strength) / strength


class ImpulseNoise(Published):
    """Salt and pepper: a share of all values is black or white, evenly."""

    name, label, group = "impulse_noise", "Impulse noise", "noise"
    large = (0.03, 0.06, 0.09, 0.17, 0.27)
    small = (0.01, 0.02, 0.03, 0.05, 0.07)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        drawn = rng.random(image.shape)
        return np.where(drawn < strength, drawn < strength / 2, image)


class SpeckleNoise(Published):
    """Gaussian noise in proportion to the value."""

    name, label, group = "speckle_noise", "Speckle noise", "validation"
    large = (0.15, 0.2, 0.35, 0.45, 0.6)
    small = (0.06, 0.1, 0.12, 0.16, 0.2)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        return image * (1 + strength * rng.standard_normal(image.shape))
