"""Images that need no data set, and what is compared between our corruptions and the published code."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SIDES = {224: 6, 32: 32}  # images a side
DRAWS = {
    "motion_blur": 8,
    "elastic_transform": 20,
    "snow": 8,
    "frost_gen": 4,
    "fog": 12,
    "spatter": 8,
}  # chance per image


@functools.cache
def images(side: int) -> tuple[np.ndarray, ...]:
    """uint8 `[side, side, 3]`: coloured 1/f noise with a rectangle and a disk of one colour, some of them grey."""
    rng = np.random.default_rng(side)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    f[0, 0] = np.inf
    y, x = np.mgrid[:side, :side]
    out = []
    for number in range(SIDES[side]):
        white = np.fft.fft2(rng.standard_normal((side, side, 3)), axes=(0, 1))
        field = np.fft.ifft2(white / f[..., None], axes=(0, 1)).real
        field = field / field.std() @ (np.eye(3) * 0.45 + 0.3) * 0.16 + rng.uniform(0.3, 0.6, 3)
        top, left = rng.integers(0, side // 2, 2)
        field[top : top + side // 4, left : left + side // 3] = rng.uniform(0, 1, 3) if number % 3 else 0.5
        field[np.hypot(y - rng.uniform(0, side), x - rng.uniform(0, side)) < side / 8] = rng.uniform(0, 1, 3)
        out.append(np.rint(field.clip(0, 1) * 255).astype(np.uint8))
    return tuple(out)


def statistics(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of (clean, corrupted) uint8 images: mean and standard deviation of the values in 0..1, slope of the logarithm of
    the radial amplitude spectrum of the mean over channels, PSNR in dB."""
    means, deviations, errors, grey = [], [], [], []
    for clean, worse in pairs:
        worse = worse / 255
        means.append(worse.mean())
        deviations.append(worse.std())
        errors.append(((worse - clean / 255) ** 2).mean())
        grey.append(worse.mean(2))
    return {
        "mean": float(np.mean(means)),
        "std": float(np.mean(deviations)),
        "slope": radial_slope(grey),
        "psnr": float(-10 * np.log10(np.mean(errors))),
    }


def radial_slope(fields: Iterable[np.ndarray]) -> float:
    """Of log amplitude on log frequency, the amplitudes of all fields averaged first."""
    spectrum = np.mean([_radial(each) for each in fields], 0)
    return float(np.polyfit(np.log(np.arange(2, len(spectrum) + 2)), np.log(spectrum), 1)[0])


def _radial(grey: np.ndarray) -> np.ndarray:
    """Mean amplitude at each whole number of periods, from 2 to half a side (Nyquist) less 1."""
    side = len(grey)
    amplitude = np.abs(np.fft.fft2(grey - grey.mean())).ravel()
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) * side
    ring = np.rint(f).astype(int).ravel()
    total, count = np.bincount(ring, amplitude), np.bincount(ring)
    return (total / count)[2 : side // 2]


def reference() -> dict[str, dict[str, list[dict[str, float]]]]:
    """side -> name -> severities 1 to 5 of the published code (`dev/corruption_reference.py`)."""
    return json.loads(FILE.read_text())["statistics"]
