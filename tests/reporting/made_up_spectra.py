"""Made-up rows of features and of controls that ran through the model, for the table of `conftest.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qclip.spectral import CONTROLS

if TYPE_CHECKING:
    from tests.reporting.conftest import Maker

BANDS = {"ranks 0-8": 0, "ranks 8-64": 8, "ranks 64-": 64}  # name -> first rank
SET = {"set": "scenes-test", "role": "id", "n": 2000}
BLOCKS = ("vision.blocks.0", "vision.blocks.11")


def claims(maker: Maker, where: dict) -> None:
    """Level and shape of each variant, and what each control would be in its place."""
    for model in list(maker.labels)[1:]:
        harm = 0.004 + maker.harm(model)
        for metric, value in (("level", 1 - 0.02 * harm), ("shape", -0.001 * harm)):
            common = {"model": model, "metric": metric} | where
            half = 0.01 * harm
            maker.results.add(**common, value=value, low=value - half, high=value + half)
            for k, control in enumerate(CONTROLS):
                other = value + 0.004 * harm * (k - 2)
                ends = {"low": other - half, "high": other + half}
                maker.results.add(**common, axis="control", at=control, value=other, **ends)
                gap = value - other
                maker.results.add(**common, reference=control, value=gap, low=gap - half, high=gap + half)


def features(maker: Maker) -> None:
    for model in maker.labels:
        harm = maker.harm(model)
        for (band, at), energy in zip(BANDS.items(), (0.6, 0.3, 0.1), strict=True):
            where = SET | {"model": model, "subset": band, "axis": "band", "at": at}
            maker.results.add(**where, metric="band_energy", value=energy)
            for k, metric in enumerate(("band_top1", "band_top1_own", "band_top1_random", "band_top1_energy")):
                value = 0.8 * energy - 0.05 * k - 0.3 * harm
                maker.results.add(**where, metric=metric, value=value, low=value - 0.02, high=value + 0.02)
            if model != maker.reference:
                gain, sqnr = 1 - 0.1 * harm, 35 - at / 8 - 100 * harm
                maker.results.add(**where, metric="gain", value=gain, low=gain - harm / 5, high=gain + harm / 5)
                maker.results.add(**where, metric="sqnr", value=sqnr, low=sqnr - 0.5, high=sqnr + 0.5)
        curve = SET | {"model": model}
        ranks = [0, 1, 3, 7, 15, 31, 63, 127, 191]
        maker.results.add_curve(
            {"rank": ranks, "value": [1 - 0.6 * (1 + rank) ** -0.8 for rank in ranks]}, **curve, metric="energy_cdf"
        )
        for block in BLOCKS:
            place = {"axis": "block", "at": block, "metric": "fourier_radial"}
            frequency = [k / 7 for k in range(8)]
            maker.results.add_curve(
                {"frequency": frequency, "value": [-(4 - 9 * harm) * f for f in frequency]}, **curve, **place
            )
        u, v = (grid.ravel() for grid in np.meshgrid(np.arange(-7, 7) / 14, np.arange(-7, 7) / 14, indexing="ij"))
        value = -(5 - 10 * harm) * np.hypot(u, v)
        maker.results.add_curve({"u": u, "v": v, "value": value}, **curve, metric="fourier_map")
        for at in (1, 2, 4, 8, 16):
            for metric, value in (("grating_response", 0.02 * at**0.5 + harm), ("grating_top1", -0.01 * at - harm)):
                ends = {"low": 0.9 * value, "high": 1.1 * value}
                maker.results.add(**curve, metric=metric, axis="cycles", at=at, value=value, **ends)
    claims(maker, SET)


def interventions(maker: Maker) -> None:
    near = {"set": "near-ood", "role": "ood-near", "n": 1500, "score": "mcm"}
    for model in list(maker.labels)[1:]:
        harm = maker.harm(model)
        for metric, base, where in (("top1", 0.88, SET), ("ece", 0.035, SET), ("auroc", 0.81, near)):
            places = [("control", control) for control in CONTROLS]
            places += [("intervention", name) for name in ("weights", "level undone", "temperature")]
            places += [("filter", strength) for strength in (0.25, 0.5, 1.0)]
            for k, (axis, at) in enumerate(places):
                worse = harm * (1 + 0.1 * k) + (0.1 * at if isinstance(at, float) else 0)
                value = base + worse if metric == "ece" else base - worse
                ends = {"low": value - 0.02, "high": value + 0.02}
                maker.results.add(model=model, metric=metric, axis=axis, at=at, value=value, **ends, **where)
