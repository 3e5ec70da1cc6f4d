"""How much of zero-shot accuracy lies inside each band of ranks of the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qclip.results import Results

from ..seeds import generator
from .bands import in_band
from .controls import MIN_SEEDS
from .feature_basis import FeatureBasis
from .intervals import one_more
from .opened import Vision
from .pixels import Pixels
from .resampling import percentile

Right = dict[tuple[str, str], np.ndarray]  # (metric, band) -> whether each image is right, [n]


def band_accuracy(
    results: Results,
    common: dict[str, Any],
    vision: Vision,
    pixels: Pixels,
    basis: FeatureBasis,
    features: np.ndarray,
    drawn: np.ndarray,
    seed: int,
    label: str,
    reference: Right | None,
) -> Right:
    """Rows of top-1 accuracy from features that are kept within a band, mean + V_B V_B' (f - mean), then projected and
    compared with the float model's class embeddings.

    `band_top1`: on the float basis; `band_top1_own`: on the model's own. Baselines of the same model, means over 8
    random orthogonal bases: `band_top1_random`, as many directions; `band_top1_energy`, as many as hold the band's
    energy. The first two have paired differences to the float model, whose images are given in `reference`. Returns
    which images were right.
    """
    mean = features.mean(0)
    centred = features - mean

    def right(directions: np.ndarray) -> np.ndarray | None:
        embedded = vision.project(mean + centred @ directions @ directions.T)
        return None if embedded is None else pixels.right(embedded)

    if right(basis.v[:, :1]) is None:
        results.note(f"{vision.label}: several layers come after its features, so there is no accuracy inside bands")
        return {}
    own = np.linalg.svd(centred, full_matrices=False)[2].T
    found: Right = {}
    for band, part in basis.bands.items():
        where = common | in_band(band)
        for metric, v in (("band_top1", basis.v), ("band_top1_own", own)):
            hits = right(v[:, part])
            assert hits is not None
            found[metric, band] = hits
            results.add(**where, metric=metric, **percentile(drawn @ hits / hits.size).columns)
            if reference and (metric, band) in reference:
                gap = drawn @ (hits - reference[metric, band]) / hits.size
                results.add(**where, metric=metric, reference=label, **percentile(gap).columns)
        share = float(((centred @ basis.v[:, part]) ** 2).sum() / (centred**2).sum())
        _baselines(results, where, right, centred, part.stop - part.start, share, seed)
    return found


def _baselines(
    results: Results,
    where: dict[str, Any],
    right: Callable[[np.ndarray], np.ndarray | None],
    centred: np.ndarray,
    dimensions: int,
    share: float,
    seed: int,
) -> None:
    """Random orthogonal bases: as many directions as the band has, and as many as hold its share of the energy."""
    same: list[float] = []
    energy: list[float] = []
    for k in range(MIN_SEEDS):
        width = centred.shape[1]
        q = np.linalg.qr(generator(seed, f"orthogonal {k}").standard_normal((width, width)))[0]
        held = np.cumsum(((centred @ q) ** 2).sum(0)) / (centred**2).sum()
        enough = min(int(np.searchsorted(held, share)) + 1, width)
        for size, into in ((dimensions, same), (enough, energy)):
            hits = right(q[:, :size])
            assert hits is not None
            into.append(float(hits.mean()))
    for metric, values in (("band_top1_random", same), ("band_top1_energy", energy)):
        results.add(**where | {"n": MIN_SEEDS}, metric=metric, **one_more(np.array(values)).columns)
