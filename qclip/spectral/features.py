"""Spectra of the vision tower's penultimate features on the float model's own basis (docs/methods.md, Spectra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qclip.errors import InputError
from qclip.progress import Progress
from qclip.results import Results

from ..seeds import generator
from .band_accuracy import band_accuracy
from .bands import in_band
from .basis import effective_rank
from .controls import CONTROLS, MIN_SEEDS, Control
from .feature_basis import FeatureBasis, FeatureChange
from .intervals import one_more
from .opened import opened
from .pixels import Pixels
from .replaced import Replaced
from .resampling import counts, percentile

IMAGES = 1000


def feature_spectrum(
    float_model: nn.Module,
    quantized_models: Mapping[str, nn.Module],
    pixels: Pixels,
    *,
    controls: Sequence[str] = (),
    seeds: int = MIN_SEEDS,
    seed: int = 0,
    label: str = "float",
    progress: Progress | None = None,
) -> Results:
    """Rows of the set `pixels.name`, role "id", with 95 % intervals from resampled images.

    Of each model's own features: `band_energy`, `effective_rank` and the curve `energy_cdf` (rank, share of the energy
    up to it). Of a quantized model's on the float basis: `gain` (slope) and `sqnr` in dB by band, `level`, `shape`,
    `mean_shift` (in units of the features' spread), the curve `by_rank`. Where the set has labels: `band_top1`, see
    `band_accuracy`.

    controls: names of `CONTROLS`; each replaces the residual of every quantized weight of a float copy, `seeds` times,
    and gives `level` and `shape` (`axis` "control"), with the paired difference of the quantized model to it.

    Raises InputError unless there are more images than features, or where fewer than 8 seeds are asked for.
    """
    if seeds < MIN_SEEDS:
        raise InputError(f"{seeds} seeds are too few for the controls; use {MIN_SEEDS} or more")
    results = Results()
    features = Features(results, float_model, quantized_models, pixels, seed, label, progress)
    for name, model in quantized_models.items():
        if controls:
            with Replaced(float_model, model, name) as copy:
                for chosen in controls:
                    control, draws = CONTROLS.made(chosen), []
                    for k in range(seeds if control.random else 1):
                        copy.put(control, seed, k)
                        with opened(copy.model, name) as vision:
                            draws.append(vision.see(pixels.batches).features)
                    features.control(name, control, draws)
    return results


class Features:
    """The rows of all models' own features, put into `results`; `control` adds those of a control."""

    def __init__(
        self,
        results: Results,
        float_model: nn.Module,
        quantized_models: Mapping[str, nn.Module],
        pixels: Pixels,
        seed: int,
        label: str,
        progress: Progress | None = None,
    ) -> None:
        self._results, self.pixels = results, pixels
        pixels.tell(results)
        self._drawn = drawn = counts(len(pixels), generator(seed, f"features {pixels.name}"))
        self._common = {"set": pixels.name, "role": "id", "n": len(pixels), "seed": seed}
        everything = {label: float_model, **quantized_models}
        basis, reference = None, None
        self._changes: dict[str, FeatureChange] = {}
        for done, (name, model) in enumerate(everything.items()):
            if progress is not None:
                progress(f"{name}: features", done, len(everything))
            where = self._common | {"model": name}
            with opened(model, name) as vision:
                features = vision.see(pixels.batches).features
                if basis is None:
                    basis = FeatureBasis.of(features)
                _own(results, where, basis, features)
                if name != label:
                    self._changes[name] = FeatureChange.of(basis, features)
                    _change(results, where, basis, self._changes[name], drawn)
                if pixels.labels is not None:
                    found = band_accuracy(
                        results, where, vision, pixels, basis, features, drawn, seed, label, reference
                    )
                    reference = found if name == label else reference
        assert basis is not None
        self._basis = basis

    def control(self, model: str, control: Control, draws: Sequence[np.ndarray]) -> None:
        """`level` and `shape` of the features `[n, d]` of float copies, one for each draw of a control's residual in
        the place of the quantized model's, and how far that model lies from them."""
        changes = [FeatureChange.of(self._basis, features) for features in draws]
        own = self._changes[model]
        for claim, mine, theirs in (
            ("level", own.level(self._drawn), [each.level(self._drawn) for each in changes]),
            ("shape", own.shape(self._drawn), [each.shape(self._drawn) for each in changes]),
        ):
            values = np.stack(theirs, axis=1)
            where = self._common | {"model": model, "metric": claim}
            self._results.add(**where, axis="control", at=control.name, **one_more(values[0]).columns)
            self._results.add(**where, reference=control.name, **percentile(mine[:, None] - values).columns)


def _own(results: Results, common: dict[str, Any], basis: FeatureBasis, features: np.ndarray) -> None:
    singular = np.linalg.svd(features - features.mean(0), compute_uv=False)
    share = singular**2 / (singular**2).sum()
    for band, part in basis.bands.items():
        results.add(**common, **in_band(band), metric="band_energy", value=float(share[part].sum()))
    results.add(**common, metric="effective_rank", value=effective_rank(torch.from_numpy(singular)))
    results.add_curve({"rank": range(len(share)), "value": np.cumsum(share).tolist()}, **common, metric="energy_cdf")


def _change(
    results: Results, common: dict[str, Any], basis: FeatureBasis, change: FeatureChange, drawn: np.ndarray
) -> None:
    for metric, by_band in (("gain", change.gains(drawn)), ("sqnr", change.sqnr(drawn))):
        for band, values in by_band.items():
            results.add(**common, **in_band(band), metric=metric, **percentile(values).columns)
    for metric, values in (("level", change.level(drawn)), ("shape", change.shape(drawn))):
        results.add(**common, metric=metric, **percentile(values).columns)
    results.add(**common, metric="mean_shift", value=change.shift)
    mine, theirs = basis.scores, change.scores
    energy, noise = (mine**2).sum(0), ((theirs - mine) ** 2).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        points = {
            "rank": range(len(energy)),
            "gain": _finite((mine * theirs).sum(0) / energy),
            "sqnr": _finite(10 * np.log10(energy / noise)),
        }
    results.add_curve(points, **common, metric="by_rank")


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
