"""Spatter of ImageNet-C and CIFAR-10-C: drops of water or spots of mud."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import filters
from .published import Image, Published

WATER = np.array([175, 238, 238]) / 255
MUD = np.array([63, 42, 20]) / 255
FARTHEST = 20  # pixels from an edge, beyond which all are equally far


class Spatter(Published):
    """(mean, deviation and blur of the liquid, what of it sticks, strength or blur, whether it is mud)."""

    name, label, group, least = "spatter", "Spatter", "validation", 16
    large = (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    )
    small = (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    )

    def worsen(self, image: NDArray[np.float64], strength: tuple[float, ...], rng: np.random.Generator) -> Image:
        mean, deviation, blur, least, last, mud = strength
        drawn = mean + deviation * rng.standard_normal(image.shape[:2])
        liquid = _smooth(drawn, blur)
        if mud:
            spots = _smooth(liquid > least, last)[..., None]
            spots = np.where(spots < 0.8, 0, spots)
            return image * (1 - spots) + MUD * spots
        liquid = np.where(liquid < least, 0, np.minimum(liquid * 255, 255)).astype(np.uint8)
        drops = liquid * _relief(_distances(_edges(liquid)))
        return image + (last * drops / max(drops.max(), 1))[..., None] * WATER


def _smooth(field: NDArray, sigma: float) -> NDArray[np.float32]:
    return filters.smooth(filters.planes(field), sigma)[0].numpy()


def _edges(layer: NDArray[np.uint8], low: int = 50, high: int = 150) -> NDArray[np.bool_]:
    """Canny's edges of a uint8 layer: Sobel gradients (sum of magnitudes) that are the largest across the edge, above
    `high`, or above `low` and joined to such."""
    wide = np.pad(layer.astype(np.int32), 1, mode="edge")
    right = wide[:, 2:] - wide[:, :-2]
    right = right[:-2] + 2 * right[1:-1] + right[2:]
    down = wide[2:] - wide[:-2]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    across, along = abs(right), abs(down)
    size = np.pad(across + along, 1)
    middle, (height, width) = size[1:-1, 1:-1], layer.shape

    def at(y: int, x: int) -> NDArray[np.int32]:
        return size[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    flat, steep = along < np.tan(np.pi / 8) * across, along > np.tan(3 * np.pi / 8) * across
    falling = (right ^ down) < 0
    largest = np.select(
        [flat, steep, falling],
        [
            (middle > at(0, -1)) & (middle >= at(0, 1)),
            (middle > at(-1, 0)) & (middle >= at(1, 0)),
            (middle > at(-1, 1)) & (middle > at(1, -1)),
        ],
        (middle > at(-1, -1)) & (middle > at(1, 1)),
    )
    weak = largest & (middle > low)
    found = largest & (middle > high)
    while True:
        wide = np.pad(found, 1)
        rows = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
        joined = weak & (rows[:-2] | rows[1:-1] | rows[2:])
        if np.array_equal(joined, found):
            return found
        found = joined


def _distances(edges: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Euclidean distance of each pixel to the nearest edge, at most `FARTHEST`."""
    height, width = edges.shape
    columns = np.arange(width)
    before = np.maximum.accumulate(np.where(edges, columns, -FARTHEST - width), axis=1)
    behind = np.minimum.accumulate(np.where(edges, columns, FARTHEST + 2 * width)[:, ::-1], axis=1)[:, ::-1]
    squares = np.minimum(np.minimum(columns - before, behind - columns), FARTHEST).astype(np.float32) ** 2
    out = squares.copy()
    for step in range(1, min(FARTHEST, height)):
        np.minimum(out[step:], squares[:-step] + step**2, out=out[step:])
        np.minimum(out[:-step], squares[step:] + step**2, out=out[:-step])
    return np.sqrt(out)


def _relief(distances: NDArray[np.float32]) -> NDArray[np.float64]:
    """Distances as heights of a drop that is lit from one corner: blurred, spread over all grey levels, embossed."""
    levels = np.floor(_mean3(distances)).astype(np.int64)
    counts = np.bincount(levels.ravel(), minlength=256).cumsum()
    first = counts[levels.min()]
    equal = np.rint((counts - first) * (255 / max(counts[-1] - first, 1)))[levels]
    wide = np.pad(equal, 1, mode="reflect")
    embossed = (
        (equal + wide[1:-1, 2:] + wide[2:, 1:-1] - wide[:-2, 1:-1] - wide[1:-1, :-2])
        + 2 * (wide[2:, 2:] - wide[:-2, :-2])
    )  # fmt: skip
    return np.rint(_mean3(np.clip(embossed, 0, 255)))


def _mean3(field: NDArray) -> NDArray[np.float64]:
    wide = np.pad(field.astype(np.float64), 1, mode="reflect")
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
