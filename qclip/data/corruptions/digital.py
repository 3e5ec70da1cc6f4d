"""Digital corruptions of ImageNet-C and CIFAR-10-C: elastic, pixelate, JPEG."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from . import filters
from .published import Image, Published
from .stored import jpeg


class ElasticTransform(Published):
    """A random affine map (corners move up to the third number of pixels), then displacements: uniform noise, blurred
    by the second and multiplied by the first number. The published code says 244 where it means 224."""

    name, label, group, least = "elastic_transform", "Elastic", "digital", 16
    large = tuple(
        (244 * a, 244 * s, 244 * m)
        for a, s, m in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    )
    small = tuple(
        (32 * a, 32 * s, 32 * m)
        for a, s, m in ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    )

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, ...], rng: np.random.Generator) -> Image:
        height, width = image.shape[:2]
        amount, sigma, corner = strength
        y, x = (torch.from_numpy(a).float() for a in np.mgrid[:height, :width])
        across = affine(height, width, rng.uniform(-corner, corner, (3, 2)))
        from_x, from_y = (a * x + b * y + c for a, b, c in across.tolist())
        bent = filters.sample(filters.planes(image), from_y, from_x, edge_twice=False)
        moves = torch.from_numpy(rng.uniform(-1, 1, (2, height, width)).astype(np.float32))
        right, down = amount * filters.smooth(moves, sigma, truncate=3, border="mirror")
        return filters.image_of(filters.sample(bent, y + down, x + right, edge_twice=True))


def affine(height: int, width: int, moves: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[2, 3]`: where in the image (x, y, 1) of the result comes from, when three corners of a square around its middle
    move by `moves` `[3, 2]`."""
    middle, third = np.array([height // 2, width // 2], np.float64), min(height, width) // 3
    before = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + moves
    return np.linalg.solve(np.column_stack([after, np.ones(3)]), before).T


class Pixelate(Published):
    """Fewer pixels, each the mean of its area."""

    name, label, group, least = "pixelate", "Pixelate", "digital", 4
    large = (0.6, 0.5, 0.4, 0.3, 0.25)
    small = (0.95, 0.9, 0.85, 0.75, 0.65)

    def worsen(self, image: NDArray[np.float64], strength: float, rng: np.random.Generator) -> Image:
        height, width = image.shape[:2]
        fewer = eight_bits(image).resize((int(width * strength), int(height * strength)), Pillow.Resampling.BOX)
        return np.asarray(fewer.resize((width, height), Pillow.Resampling.BOX), np.float32) / 255


class JpegCompression(Published):
    """JPEG of this quality, chroma subsampled."""

    name, label, group = "jpeg_compression", "JPEG compression", "digital"
    large = (25, 18, 15, 10, 7)
    small = (80, 65, 58, 50, 40)

    def worsen(self, image: NDArray[np.float64], strength: int, rng: np.random.Generator) -> Image:
        return jpeg(np.rint(image * 255).astype(np.uint8), strength).astype(np.float32) / 255


def eight_bits(image: NDArray[np.float64]) -> Pillow.Image:
    return Pillow.fromarray(np.rint(image * 255).astype(np.uint8))
