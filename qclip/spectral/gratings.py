"""How sensitive a model is to sinusoidal gratings (cf. the Fourier heat maps of Yin et al. 1906.08988)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qclip.progress import Progress
from qclip.results import Results

from ..seeds import generator
from .opened import opened
from .pixels import Pixels
from .resampling import counts, percentile

RADII = 6  # spatial frequencies, log-spaced from one cycle per image to Nyquist
CONTRAST = 0.25  # root mean square of a grating, in units of the images' standard deviation


def gratings(
    models: Mapping[str, nn.Module],
    pixels: Pixels,
    contrast: float = CONTRAST,
    seed: int = 0,
    progress: Progress | None = None,
) -> Results:
    """x + a sin(2 pi (u i / H + v j / W) + phi), of equal norm at every (u, v); orientation and phase are random for
    each image and the same for all models. The grating is added to what the model takes, so nothing is clipped.

    Rows along `axis` "cycles" (cycles per image in `at`): `grating_response`, 1 - cosine between the embeddings with
    and without it; `grating_top1`, where there are labels, accuracy with it minus accuracy without. Intervals are from
    resampled images, with paired differences to the first model.
    """
    results = Results()
    pixels.tell(results)
    drawn = counts(len(pixels), generator(seed, f"gratings {pixels.name}")) / len(pixels)
    clean = torch.cat(pixels.batches)
    size = (clean.shape[2], clean.shape[3])
    spread = clean.std(dim=(0, 2, 3), keepdim=True)
    cycles = sorted({round(r) for r in np.geomspace(1, min(size) / 2, RADII).tolist()})
    waves = {r: grating(size, len(clean), r, generator(seed, f"grating {r}")) for r in cycles}
    found: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    reference = next(iter(models))
    for done, (name, model) in enumerate(models.items()):
        if progress is not None:
            progress(f"{name}: gratings", done, len(models))
        found[name] = _responses(model, name, pixels, clean, waves, contrast * spread)
        common = {"model": name, "set": pixels.name, "role": "id", "n": len(pixels), "seed": seed}
        for (metric, r), values in found[name].items():
            where: dict[str, Any] = common | {"metric": metric, "axis": "cycles", "at": r}
            results.add(**where, **percentile(drawn @ values).columns)
            if name != reference:
                gap = percentile(drawn @ (values - found[reference][metric, r]))
                results.add(**where, reference=reference, **gap.columns)
    return results


def _responses(
    model: nn.Module, name: str, pixels: Pixels, clean: Tensor, waves: dict[int, Tensor], amplitude: Tensor
) -> dict[tuple[str, int], np.ndarray]:
    size = len(pixels.batches[0])
    out = {}
    with opened(model, name) as vision:
        plain = vision.see(pixels.batches).embeddings
        for r, wave in waves.items():
            moved = vision.see((clean + amplitude * wave).split(size)).embeddings
            out["grating_response", r] = 1 - (plain * moved).sum(1)
            before, after = pixels.right(plain), pixels.right(moved)
            if before is not None and after is not None:
                out["grating_top1", r] = after - before
    return out


def grating(size: tuple[int, int], n: int, cycles: float, draw: np.random.Generator) -> Tensor:
    """n gratings of about so many cycles per image in random directions and phases, each of root mean square 1: float32
    `[n, 1, H, W]`. A phase that leaves nothing of a wave at the Nyquist frequency is drawn again."""
    rows, columns = (np.arange(side) / side for side in size)
    out = np.empty((n, 1, *size), np.float32)
    for k in range(n):
        wave, strength = np.zeros(size), 0.0
        while strength < 0.1:
            angle, phase = draw.uniform(0, 2 * np.pi, 2)
            u, v = np.rint(cycles * np.sin(angle)), np.rint(cycles * np.cos(angle))
            wave = np.sin(2 * np.pi * (u * rows[:, None] + v * columns) + phase)
            strength = float(np.sqrt((wave**2).mean()))
        out[k, 0] = wave / strength
    return torch.from_numpy(out)
