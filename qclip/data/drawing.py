"""Vectorized drawing in NumPy: hashed random numbers, signed-distance shapes, textures and backgrounds.

Everything is an array with the images first, `[B, side, side]`, and no pixel of an image depends on another image of
the batch. Coordinates run from -1 to 1, x to the right and y up, so a scene is the same at any size. Random numbers
are hashes of (image key, name, position): no state, so a new parameter changes no other one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of SplitMix64 (Steele et al. 2014): a bijection of 64 bits without visible structure."""
    with np.errstate(over="ignore"):  # wraps on purpose; scalars would warn
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def image_keys(seed: int, split: str, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit key per image, `[B]`, that depends on (seed, split, index) alone."""
    start = mix(np.array([seed % 2**64], np.uint64)) ^ np.uint64(zlib.crc32(split.encode()))
    return mix(mix(start) ^ indices.astype(np.uint64))


class Dice:
    """Named random numbers of a batch of images; `keys` uint64 `[B]`."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def subset(self, mask: NDArray[np.bool_]) -> Dice:
        return Dice(self.keys[mask])

    def uniform(self, name: str, *shape: int) -> Float:
        """float32 `[B, *shape]` in [0, 1)."""
        slots = np.arange(int(np.prod(shape)) if shape else 1, dtype=np.uint64)
        keys = mix(self.keys ^ mix(np.array([zlib.crc32(name.encode())], np.uint64)))
        bits = mix(keys[:, None] + slots * _GOLDEN) >> np.uint64(40)
        return (bits.astype(np.float32) / np.float32(2**24)).reshape(len(self.keys), *shape)

    def between(self, name: str, low: float, high: float, *shape: int) -> Float:
        return np.float32(low) + np.float32(high - low) * self.uniform(name, *shape)

    def pick(self, name: str, count: int) -> NDArray[np.int64]:
        """int64 `[B]` in 0..count-1."""
        return np.minimum((self.uniform(name) * count).astype(np.int64), count - 1)

    def chance(self, name: str, share: float) -> NDArray[np.bool_]:
        return self.uniform(name) < share


def grid(side: int) -> tuple[Float, Float]:
    """x and y of the pixel centres, each `[1, side, side]`."""
    axis = ((np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1).astype(np.float32)
    return np.broadcast_to(axis, (1, side, side)), np.broadcast_to(-axis[:, None], (1, side, side))


def column(values: NDArray) -> Float:
    """`[B]` -> float32 `[B, 1, 1]`, to meet pixels."""
    return values.astype(np.float32)[:, None, None]


def value_noise(dice: Dice, name: str, side: int, across: int, down: int | None = None) -> Float:
    """Smooth random field in [0, 1), `[B, side, side]`, of `across` x `down` cells."""
    down = across if down is None else down
    lattice = dice.uniform(name, down + 1, across + 1)

    def cells(count: int) -> tuple[NDArray[np.int64], Float]:
        position = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(count / side)
        start = np.minimum(position.astype(np.int64), count - 1)
        part = position - start.astype(np.float32)
        return start, (part * part * (3 - 2 * part)).astype(np.float32)

    (row, down_part), (col, across_part) = cells(down), cells(across)
    upper = lattice[:, row] * (1 - down_part)[:, None] + lattice[:, row + 1] * down_part[:, None]
    return upper[:, :, col] * (1 - across_part) + upper[:, :, col + 1] * across_part


# -- shapes: signed distance (negative inside) of points in the shape's own frame, bounding circle about 1 -------------


def _box(x: Float, y: Float, width: float, height: float) -> Float:
    dx, dy = np.abs(x) - width, np.abs(y) - height
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return outside + np.minimum(np.maximum(dx, dy), 0)


def _fold(x: Float, y: Float, count: int) -> tuple[Float, Float]:
    """Radius, and angle to the nearest of `count` spokes, the first one up."""
    sector = 2 * np.pi / count
    angle = np.arctan2(x, y)
    return np.hypot(x, y), np.abs(angle - sector * np.round(angle / sector))


def _polygon(x: Float, y: Float, count: int, radius: float) -> Float:
    r, a = _fold(x, y, count)  # the spoke points at a corner; the edge's normal lies half a sector on
    return r * np.cos(np.pi / count - a) - radius * np.cos(np.pi / count)


def _star(x: Float, y: Float) -> Float:
    r, a = _fold(x, y, 5)
    px, py, outer, inner = r * np.cos(a), r * np.sin(a), 1.0, 0.42
    ex, ey = inner * np.cos(np.pi / 5) - outer, inner * np.sin(np.pi / 5)
    return ((px - outer) * ey - py * ex) / np.hypot(ex, ey)


def _heart(x: Float, y: Float) -> Float:
    """After Inigo Quilez, "2D distance functions"."""
    x, y = np.abs(x) / 1.5, y / 1.5 + 0.55
    upper = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    half = np.maximum(x + y, 0) / 2
    lower = np.sqrt(np.minimum(x * x + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, upper, lower) * 1.5


def _arrow(x: Float, y: Float) -> Float:
    head = np.maximum((np.abs(x) * 0.85 + (y - 0.95) * 0.62) / 1.05, 0.05 - y)
    return np.minimum(head, _box(x, y + 0.4, 0.24, 0.5))


SHAPES: dict[str, Callable[[Float, Float], Float]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.82,
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "triangle": lambda x, y: _polygon(x, y + 0.15, 3, 1.0),
    "star": _star,
    "heart": _heart,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.86, 0.29), _box(x, y, 0.29, 0.86)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.62) - 0.22,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.88, 0.72 - np.hypot(x - 0.45, y - 0.1)),
    "arrow": _arrow,
    "hourglass": lambda x, y: np.maximum(np.abs(y) - 0.82, (np.abs(x) - 0.12 - 0.75 * np.abs(y)) * 0.8),
}

UNSEEN_SHAPES: dict[str, Callable[[Float, Float], Float]] = {
    "diamond": lambda x, y: (np.abs(x) / 0.55 + np.abs(y) / 0.95 - 1) * 0.48,
    "flower": lambda x, y: np.hypot(x, y) - 0.66 - 0.24 * np.cos(5 * np.arctan2(x, y)),
    "drop": lambda x, y: np.minimum(
        np.hypot(x, y + 0.3) - 0.6, np.maximum(np.abs(x) * 0.88 + (y - 0.98) * 0.47, -y - 0.02)
    ),
    "half circle": lambda x, y: np.maximum(np.hypot(x, y + 0.4) - 0.95, -0.4 - y),
    "tee": lambda x, y: np.minimum(_box(x, y - 0.6, 0.8, 0.24), _box(x, y + 0.2, 0.24, 0.7)),
    "hexagon": lambda x, y: _polygon(x, y, 6, 0.9),
    "frame": lambda x, y: np.abs(_box(x, y, 0.58, 0.58)) - 0.17,
}


def shape_distance(kinds: NDArray[np.int64], table: dict[str, Callable[[Float, Float], Float]], x: Float, y: Float):
    """Distance `[B, side, side]`; `kinds` `[B]` counts through `table`; x and y are in each shape's own frame."""
    out = np.empty_like(x)
    for kind, distance in enumerate(table.values()):
        chosen = kinds == kind
        if chosen.any():
            out[chosen] = distance(x[chosen], y[chosen])
    return out


# -- textures of an object: share of the second tone ------------------------------------------------------------------

TEXTURES: dict[str, Callable[[Float, Float], Float]] = {
    "plain": lambda x, y: np.zeros_like(x),
    "striped": lambda x, y: np.sin(8.5 * x) * 4,
    "dotted": lambda x, y: (np.cos(8.5 * x) * np.cos(8.5 * y) - 0.35) * 4,
    "checkered": lambda x, y: np.sin(7.5 * x) * np.sin(7.5 * y) * 8,
}


def texture_share(kinds: NDArray[np.int64], x: Float, y: Float) -> Float:
    """0 (first tone) .. 1 (second tone), `[B, side, side]`."""
    out = np.zeros_like(x)
    for kind, pattern in enumerate(TEXTURES.values()):
        chosen = kinds == kind
        if kind and chosen.any():
            out[chosen] = np.clip(pattern(x[chosen], y[chosen]) + 0.5, 0, 1)
    return out


# -- backgrounds: brightness field, and two colours between which it runs ---------------------------------------------


def _bricks(dice: Dice, side: int) -> Float:
    x, y = grid(side)
    row = np.floor((y + column(dice.uniform("brick y"))) * 3.0)
    along = (x + column(dice.uniform("brick x"))) * 2 + 0.5 * np.mod(row, 2)
    across = (y + column(dice.uniform("brick y"))) * 3.0
    edge = np.minimum(np.abs(along - np.round(along)) / 2, np.abs(across - np.round(across)) / 3.0)
    return np.clip(edge * 14 - 0.2, 0, 1) * (0.75 + 0.25 * value_noise(dice, "brick", side, 8))


def _wood(dice: Dice, side: int) -> Float:
    x, _ = grid(side)
    plank = (x + column(dice.uniform("plank"))) * 2.2
    gap = np.clip(np.abs(plank - np.round(plank)) * 12, 0, 1)
    return gap * (0.4 + 0.6 * value_noise(dice, "grain", side, 24, 3))


def _water(dice: Dice, side: int) -> Float:
    _, y = grid(side)
    phase = 6 * value_noise(dice, "swell", side, 3, 2) + 6.3 * column(dice.uniform("phase"))
    return 0.5 + 0.5 * np.sin(16 * y + phase)


def _sky(dice: Dice, side: int) -> Float:
    _, y = grid(side)
    clouds = value_noise(dice, "cloud", side, 4, 5) * 0.7 + value_noise(dice, "wisp", side, 9, 11) * 0.3
    return np.clip((clouds - 0.48) * 4, 0, 1) * 0.8 + 0.2 * (0.5 - 0.5 * y)


def _stone(dice: Dice, side: int) -> Float:
    folds = np.abs(value_noise(dice, "crack", side, 5) - 0.5) + 0.5 * np.abs(value_noise(dice, "fine", side, 11) - 0.5)
    return np.clip(folds * 2.5, 0, 1)


BACKGROUNDS: dict[str, tuple[Callable[[Dice, int], Float], tuple[float, ...], tuple[float, ...]]] = {
    "grass": (
        lambda d, s: value_noise(d, "blades", s, 26, 8) * 0.7 + value_noise(d, "patches", s, 4) * 0.3,
        (0.10, 0.32, 0.08),
        (0.45, 0.70, 0.25),
    ),
    "sand": (
        lambda d, s: value_noise(d, "grains", s, 30) * 0.5 + value_noise(d, "dunes", s, 3, 5) * 0.5,
        (0.68, 0.56, 0.36),
        (0.93, 0.84, 0.62),
    ),
    "water": (_water, (0.05, 0.22, 0.45), (0.25, 0.52, 0.72)),
    "sky": (_sky, (0.38, 0.62, 0.90), (0.96, 0.97, 1.0)),
    "brick": (_bricks, (0.72, 0.68, 0.63), (0.60, 0.24, 0.17)),
    "wood": (_wood, (0.25, 0.14, 0.07), (0.66, 0.44, 0.24)),
    "stone": (_stone, (0.25, 0.25, 0.27), (0.62, 0.61, 0.60)),
    "snow": (
        lambda d, s: value_noise(d, "drift", s, 3) * 0.7 + value_noise(d, "flakes", s, 20) * 0.3,
        (0.72, 0.78, 0.88),
        (1.0, 1.0, 1.0),
    ),
}


def background(kinds: NDArray[np.int64], dice: Dice, side: int) -> Float:
    """Colours `[B, side, side, 3]` in about 0..1; `kinds` `[B]` counts through `BACKGROUNDS`."""
    out = np.empty((len(kinds), side, side, 3), np.float32)
    for kind, (field, low, high) in enumerate(BACKGROUNDS.values()):
        chosen = kinds == kind
        if chosen.any():
            part = dice.subset(chosen)
            tint = part.between("tint", -0.07, 0.07, 3)[:, None, None]
            level = np.clip(field(part, side), 0, 1)[..., None]
            out[chosen] = np.asarray(low, np.float32) + np.subtract(high, low, dtype=np.float32) * level + tint
    return out
