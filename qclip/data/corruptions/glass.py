"""Glass blur of ImageNet-C and CIFAR-10-C: pixels taken from a few pixels away, between two Gaussian blurs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from . import filters
from .published import Image, Published


class GlassBlur(Published):
    """(deviation of the blurs, reach of a pixel, rounds)."""

    name, label, group, least = "glass_blur", "Glass blur", "blur", 16
    large = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
    small = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, int, int], rng: np.random.Generator) -> Image:
        sigma, reach, rounds = strength
        blurred = filters.smooth(filters.planes(image), sigma)
        levels = np.floor(blurred.flatten(1).numpy() * 255 + 1e-3)  # the published code cuts to 8 bits
        height, width = image.shape[:2]
        shown = np.arange(height * width)
        for _ in range(rounds):
            moves = rng.integers(-reach, reach, (2, height - 2 * reach, width - 2 * reach))
            shown = shown[sources(height, width, reach, moves)]
        shuffled = torch.from_numpy(levels[:, shown].reshape(-1, height, width) / 255)
        return filters.image_of(filters.smooth(shuffled, sigma))


def sources(height: int, width: int, reach: int, moves: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which pixel of the image each pixel shows after one round, `[H * W]`.

    moves: (down, right) `[2, H - 2 reach, W - 2 reach]`, each in [-reach, reach), of the pixels from (reach + 1,
    reach + 1) on. The published code means to swap two pixels, but its views of one array make it copy; it goes from
    the last pixel to the first, so that a pixel that is copied from further on is a copy itself. Here each pixel names
    the one that it copies, and names are followed until they end at a pixel that was not yet overwritten: the same
    result, in as many steps as the logarithm of the longest chain.
    """
    here = np.arange(height * width).reshape(height, width)
    named = here.copy()
    inside = slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1)
    named[inside] += moves[0] * width + moves[1]
    copied = named.ravel()
    followed = np.maximum(copied, here.ravel())  # what lies before a pixel is still untouched when it is copied
    while True:
        further = followed[followed]
        if np.array_equal(further, followed):
            return copied[followed]
        followed = further
