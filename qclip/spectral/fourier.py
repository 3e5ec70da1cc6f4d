"""The 2D Fourier spectrum of patch tokens, block by block (Park & Kim 2202.06709; docs/methods.md, Spectra)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from qclip.progress import Progress
from qclip.results import Results

from ..seeds import generator
from .opened import opened
from .pixels import Pixels
from .resampling import counts, percentile

HIGH = 0.5  # of the Nyquist frequency: from here on a frequency counts as high


def fourier(
    models: Mapping[str, nn.Module], pixels: Pixels, seed: int = 0, progress: Progress | None = None
) -> Results:
    """Log amplitudes of the patch tokens over the float grid of patches, without CLS and registers, the logarithm taken
    before the mean over images and channels. The first model is the reference.

    Curves of every block (`axis` "block", its name in `at`): `fourier_radial`, the mean in rings of frequency (in units
    of the Nyquist frequency, half a cycle per patch) minus that at frequency 0, and `fourier_diagonal`, along the half
    diagonal of the map. The last block's map is `fourier_map`, with columns u, v in cycles per patch. The row
    `high_frequency` is the mean log amplitude of frequencies from half of Nyquist on minus that at 0 in the last block,
    with intervals from resampled images and paired differences.
    """
    results = Results()
    pixels.tell(results)
    drawn = counts(len(pixels), generator(seed, f"fourier {pixels.name}")) / len(pixels)
    reference = next(iter(models))
    high: dict[str, np.ndarray] = {}
    for done, (name, model) in enumerate(models.items()):
        if progress is not None:
            progress(f"{name}: Fourier", done, len(models))
        with opened(model, name) as vision:
            maps = vision.see(pixels.batches, fourier=True).amplitudes
        if not maps:
            results.note(f"{name}: its patches make no square grid, so there is no Fourier spectrum of its tokens")
            continue
        common = {"model": name, "set": pixels.name, "role": "id", "n": len(pixels), "seed": seed}
        for block, amplitude in maps.items():
            where = common | {"axis": "block", "at": block}
            mean = amplitude.mean(0)
            results.add_curve(radial(mean), **where, metric="fourier_radial")
            results.add_curve(diagonal(mean), **where, metric="fourier_diagonal")
        u, v = frequencies(mean.shape)
        points = {"u": u.ravel().tolist(), "v": v.ravel().tolist(), "value": mean.ravel().tolist()}
        results.add_curve(points, **common, metric="fourier_map")
        _high(results, common, drawn, amplitude, reference, high)
    return results


def _high(
    results: Results,
    common: dict[str, Any],
    drawn: np.ndarray,
    amplitude: np.ndarray,
    reference: str,
    high: dict[str, np.ndarray],
) -> None:
    h, w = amplitude.shape[1:]
    where = radius((h, w)) >= HIGH
    high[common["model"]] = mine = amplitude[:, where].mean(1) - amplitude[:, h // 2, w // 2]
    results.add(**common, metric="high_frequency", **percentile(drawn @ mine).columns)
    if common["model"] != reference and reference in high and len(high[reference]) == len(mine):
        gap = percentile(drawn @ (mine - high[reference]))
        results.add(**common, metric="high_frequency", reference=reference, **gap.columns)


def frequencies(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Cycles per patch, down and across, at every place of a map with frequency 0 in the middle."""
    down, across = (np.fft.fftshift(np.fft.fftfreq(side)) for side in shape)
    return np.meshgrid(down, across, indexing="ij")


def radius(shape: tuple[int, ...]) -> np.ndarray:
    """Distance from frequency 0 in units of the Nyquist frequency."""
    u, v = frequencies(shape)
    return 2 * np.hypot(u, v)


def radial(amplitude: np.ndarray) -> dict[str, list[float]]:
    """Mean in rings one step of the shorter side's frequency wide, minus the value at frequency 0."""
    h, w = amplitude.shape
    ring = np.rint(radius((h, w)) * min(h, w) / 2).astype(int)
    rings = range(min(h, w) // 2 + 1)
    values = [float(amplitude[ring == k].mean() - amplitude[h // 2, w // 2]) for k in rings]
    return {"frequency": [2 * k / min(h, w) for k in rings], "value": values}


def diagonal(amplitude: np.ndarray) -> dict[str, list[float]]:
    """From frequency 0 towards a corner, minus the value at 0. `frequency` is that of each axis, in units of Nyquist:
    7 x 7 patches end at 6/7."""
    h, w = amplitude.shape
    steps = range(min(h - h // 2, w - w // 2))
    values = [float(amplitude[h // 2 + k, w // 2 + k] - amplitude[h // 2, w // 2]) for k in steps]
    return {"frequency": [2 * k / min(h, w) for k in steps], "value": values}
