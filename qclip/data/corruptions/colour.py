"""Brightness, contrast and saturation as in ImageNet-C and CIFAR-10-C: no chance, every pixel by itself.

Brightness and saturation change V or S of a pixel's HSV; the formulas are what that comes to in RGB.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .published import Image, Published


def _largest(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[H, W, 1]`, over channels; numpy is slow along an axis of three."""
    return np.maximum(np.maximum(image[..., :1], image[..., 1:2]), image[..., 2:])


class Brightness(Published):
    """Adds to V = max(R, G, B), up to 1."""

    name, label, group = "brightness", "Brightness", "weather"
    large = (0.1, 0.2, 0.3, 0.4, 0.5)
    small = (0.05, 0.1, 0.15, 0.2, 0.3)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        value = _largest(image)
        brighter = np.minimum(value + strength, 1)
        return np.where(value > 0, image * (brighter / np.where(value > 0, value, 1)), brighter)  # black has no colour


class Contrast(Published):
    """Shrinks the distance to the mean of each channel."""

    name, label, group = "contrast", "Contrast", "digital"
    large = (0.4, 0.3, 0.2, 0.1, 0.05)
    small = (0.75, 0.5, 0.4, 0.3, 0.15)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        mean = image.mean((0, 1), keepdims=True)
        return mean + (image - mean) * strength


class Saturate(Published):
    """S becomes S times the first + the second number, in 0..1; a grey pixel counts as a red one."""

    name, label, group = "saturate", "Saturate", "validation"
    large = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
    small = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, float], rng: np.random.Generator) -> Image:
        times, plus = strength
        value = _largest(image)
        below = value - image
        chroma = _largest(below)
        saturation = chroma / np.where(value > 0, value, 1)
        wanted = np.clip(saturation * times + plus, 0, 1)
        coloured = np.where(chroma > 0, wanted / np.where(chroma > 0, saturation, 1), 0)
        grey = np.where(chroma > 0, 0, value * wanted)
        return value - below * coloured - grey * np.array([0.0, 1.0, 1.0])
