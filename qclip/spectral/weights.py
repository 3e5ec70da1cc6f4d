"""Singular spectra of weights before and after quantization (docs/methods.md, Spectra).

W = U S V' is the float weight, W^ the quantized one, E = W^ - W. The tail energy of W^'s *own* spectrum rises under any
rounding, and SQNR falls with rank under any noise; so what is asked is the gain on the float basis, beside that of
white noise with E's norm in every output channel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qclip import models as qmodels
from qclip.errors import InputError, NonFiniteError, nearest
from qclip.models.tower import Site, Tower
from qclip.progress import Progress
from qclip.results import Results

from ..seeds import generator
from .controls import MIN_SEEDS, prediction_interval, white_directions

BANDS: dict[str, tuple[int, int | None]] = {"ranks 0-8": (0, 8), "ranks 8-64": (8, 64), "ranks 64-": (64, None)}
EMPTY = 1e-24  # share of the energy below which a band of a float64 SVD is rounding noise
RANKS_SHOWN = 24  # singular values in the rows of one site, log-spaced over its ranks
RESAMPLES = 2000
Row = dict[str, Any]


def bands(rank: int) -> dict[str, slice]:
    """The bands of `BANDS` that a matrix of this rank has."""
    return {
        name: slice(start, rank if end is None else min(end, rank))
        for name, (start, end) in BANDS.items()
        if start < rank
    }


def in_band(name: str) -> dict[str, Any]:
    """The columns of a row that say its band: `at` is the band's first rank, counted from 0."""
    return {"subset": name, "axis": "band", "at": BANDS[name][0]}


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of sigma / sum sigma (Roy & Vetterli 2007); r for the identity, 1 for rank one."""
    share = singular / singular.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def stable_rank(singular: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm."""
    return float((singular**2).sum() / singular.max() ** 2)


def band_energy(singular: Tensor) -> dict[str, float]:
    """Share of the squared singular values in each band."""
    energy = singular**2
    return {name: float(energy[part].sum() / energy.sum()) for name, part in bands(len(singular)).items()}


@dataclasses.dataclass(frozen=True)
class Basis:
    """Singular vectors of a float weight `[N, K]`: u `[N, r]`, s `[r]`, v `[K, r]`, float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Basis:
        weight = weight.double()
        if weight.shape[0] < weight.shape[1]:
            turned = cls.of(weight.mT)
            return cls(turned.v, turned.s, turned.u)
        q, r = torch.linalg.qr(weight)  # a third of the time for the four-to-one matrices of an MLP
        u, s, vh = torch.linalg.svd(r)
        return cls(q @ u, s, vh.mT)

    def response(self, residual_v: Tensor, rows: Tensor | None = None) -> tuple[dict[str, float], dict[str, float]]:
        """Gain and SQNR in dB of each band, from E V `[N, r]` (times `rows` `[N, 1]` where given).

        The gain of a band is sum(sigma_i M_ii) / sum(sigma_i^2) with M = U' W^ V: the least-squares slope of W^ on W
        over the band, equal to g_i where all are equal, and not ruled by the smallest sigma as a plain mean would be.
        SQNR is sum(sigma_i^2) / sum(norm(E v_i)^2).
        """
        if rows is not None:
            residual_v = residual_v * rows
        shift = (self.u * residual_v).sum(0)  # M_ii - sigma_i
        noise = (residual_v**2).sum(0)
        gain, sqnr = {}, {}
        for name, part in bands(len(self.s)).items():
            energy = (self.s[part] ** 2).sum()
            if energy <= EMPTY * (self.s**2).sum() or not noise[part].any():
                continue  # a weight of lower rank has nothing there that could be damped
            gain[name] = float(1 + (self.s[part] * shift[part]).sum() / energy)
            sqnr[name] = float(10 * torch.log10(energy / noise[part].sum()))
        return gain, sqnr


def effective_weight(tower: Tower, site: Site) -> Tensor:
    """What the site multiplies with, float64 `[N, K]`: dequantized where it is quantized. Raises NonFiniteError."""
    module = site.module
    quantized = getattr(module, "dequantized_weight", None)
    weight = (tower.weight(site) if quantized is None else quantized()).detach().double().cpu()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"the weight of {site.name} holds NaN or Inf; check the checkpoint")
    return weight


def choose_sites(towers: Mapping[str, Tower], sites: str | Sequence[str] | None) -> list[tuple[Tower, Site]]:
    """Sites by name or pattern (`fnmatch`); None = all but embeddings. Raises InputError where a pattern fits none."""
    everything = [(tower, site) for tower in towers.values() for site in tower]
    if sites is None:
        return [(tower, site) for tower, site in everything if site.kind != "embedding"]
    patterns = [sites] if isinstance(sites, str) else list(sites)
    names = [site.name for _, site in everything]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"no site is named {pattern!r}; {nearest(pattern, names)}")
    return [(t, site) for t, site in everything if any(fnmatch.fnmatchcase(site.name, p) for p in patterns)]


def weight_spectrum(
    float_model: nn.Module,
    quantized_models: Mapping[str, nn.Module],
    sites: str | Sequence[str] | None = None,
    seeds: int = MIN_SEEDS,
    seed: int = 0,
    label: str = "float",
    progress: Progress | None = None,
) -> Results:
    """Rows of every chosen site, then of every tower, for the float and the quantized models.

    The curve `singular_values` (rank, counted from 0, and value), `band_energy`, `effective_rank`, `stable_rank` are of
    each weight's own spectrum; `gain` and `sqnr` of a quantized weight on the float basis, `gain_white` and
    `sqnr_white` of white residuals of equal norm per output channel (`seeds` of them; low and high: where one more
    would fall). Rows of a band (`axis` "band") have its first rank in `at`. A site that was not changed has no gain.
    Tower rows are means over sites with intervals from resampled sites; those with `reference="white"` are the paired
    difference to the control.

    Raises InputError on fewer than 8 seeds, a pattern that fits no site, or models of different shape.
    """
    if seeds < MIN_SEEDS:
        raise InputError(f"{seeds} seeds are too few for the white control; use {MIN_SEEDS} or more")
    with one_thread():
        return _weight_spectrum(float_model, quantized_models, sites, seeds, seed, label, progress)


def _weight_spectrum(
    float_model: nn.Module,
    quantized_models: Mapping[str, nn.Module],
    sites: str | Sequence[str] | None,
    seeds: int,
    seed: int,
    label: str,
    progress: Progress | None,
) -> Results:
    with contextlib.ExitStack() as forms:
        chosen = choose_sites(forms.enter_context(qmodels.explicit_form(float_model)), sites)
        others = {name: forms.enter_context(qmodels.explicit_form(m)) for name, m in quantized_models.items()}
        return _rows_of(chosen, others, seeds, seed, label, progress)


def _rows_of(
    chosen: list[tuple[Tower, Site]],
    others: dict[str, dict[str, Tower]],
    seeds: int,
    seed: int,
    label: str,
    progress: Progress | None,
) -> Results:
    results = Results()
    measured: list[_Measured] = []
    for done, (tower, site) in enumerate(chosen):
        if progress is not None:
            progress(site.name, done, len(chosen))
        weight = effective_weight(tower, site)
        basis = Basis.of(weight)
        _own_spectrum(results, label, site.name, basis.s)
        residuals = {}
        for name, towers in others.items():
            other = _same_site(towers, site, name, weight.shape)
            residual = other - weight
            changed = bool(residual.any())
            _own_spectrum(results, name, site.name, torch.linalg.svdvals(other) if changed else basis.s)
            if changed:
                residuals[name] = residual
        found = _beside_white(basis, residuals, site, seeds, seed)
        for each in found:
            each.write(results)
        measured += found
    _tower_rows(results, measured, seed)
    if progress is not None:
        progress("spectra", len(chosen), len(chosen))
    return results


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: decompositions of this size are many times slower where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _same_site(towers: Mapping[str, Tower], site: Site, model: str, shape: torch.Size) -> Tensor:
    tower = towers.get(site.tower)
    if tower is None or site.name not in tower.sites:
        raise InputError(f"model {model!r} has no site {site.name}; compare models of one architecture")
    weight = effective_weight(tower, tower.sites[site.name])
    if weight.shape != shape:
        raise InputError(
            f"{site.name} is {tuple(weight.shape)} in model {model!r} and {tuple(shape)} in the float model; "
            "compare models of one architecture"
        )
    return weight


def _own_spectrum(results: Results, model: str, site: str, singular: Tensor) -> None:
    common = {"model": model, "set": site, "role": "site"}
    shown = sorted({int(k) for k in np.round(np.geomspace(1, len(singular), min(RANKS_SHOWN, len(singular)))) - 1})
    points: dict[str, list[float]] = {"rank": [*shown], "value": [float(singular[k]) for k in shown]}
    results.add_curve(points, **common, metric="singular_values", n=len(singular))
    if float(singular[0]) == 0:
        return
    for band, value in band_energy(singular).items():
        results.add(**common, **in_band(band), metric="band_energy", value=value)
    results.add(**common, metric="effective_rank", value=effective_rank(singular))
    results.add(**common, metric="stable_rank", value=stable_rank(singular))


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Gain and SQNR of one site of one model, by band, and of every draw of the control."""

    model: str
    site: Site
    values: dict[str, dict[str, float]]  # "gain" / "sqnr" -> band -> value
    white: dict[str, dict[str, np.ndarray]]  # the same -> [seeds]

    def write(self, results: Results) -> None:
        for metric, by_band in self.values.items():
            for band, value in by_band.items():
                common = {"model": self.model, "set": self.site.name, "role": "site"} | in_band(band)
                draws = self.white[metric][band]
                mean, low, high = prediction_interval(draws)
                results.add(**common, metric=metric, value=value)
                results.add(**common, metric=f"{metric}_white", value=mean, low=low, high=high, n=len(draws))


def _beside_white(basis: Basis, residuals: Mapping[str, Tensor], site: Site, seeds: int, seed: int) -> list[_Measured]:
    if not residuals or float(basis.s[0]) == 0:
        return []
    draws: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in residuals}
    norms = {name: residual.norm(dim=1, keepdim=True) for name, residual in residuals.items()}
    shape = (basis.u.shape[0], basis.v.shape[0])
    for direction in white_directions(shape, site.name, seeds, seed):
        projected = direction @ basis.v  # one product serves all models: only the row norms differ
        for name in residuals:
            draws[name].append(basis.response(projected, norms[name]))
    out = []
    for name, residual in residuals.items():
        gain, sqnr = basis.response(residual @ basis.v)
        white = {
            metric: {band: np.array([draw[k][band] for draw in draws[name]]) for band in gain}
            for k, metric in enumerate(("gain", "sqnr"))
        }
        out.append(_Measured(name, site, {"gain": gain, "sqnr": sqnr}, white))
    return out


def _tower_rows(results: Results, measured: list[_Measured], seed: int) -> None:
    by_tower: dict[tuple[str, str, str, str], list[float]] = {}
    for row in results.rows:
        if row["metric"] in ("band_energy", "effective_rank", "stable_rank"):
            key = (row["model"], row["set"].split(".", 1)[0], row["metric"], row["subset"] if row["axis"] else "")
            by_tower.setdefault(key, []).append(row["value"])
    for (model, tower, metric, band), values in by_tower.items():
        where = {"model": model, "set": tower, "role": "tower"} | (in_band(band) if band else {})
        results.add(**where, metric=metric, value=float(np.mean(values)), n=len(values))
    groups: dict[tuple[str, str], list[_Measured]] = {}
    for each in measured:
        groups.setdefault((each.model, each.site.tower), []).append(each)
    for (model, tower), found in groups.items():
        for metric in ("gain", "sqnr"):
            for band in dict.fromkeys(band for each in found for band in each.values[metric]):
                there = [each for each in found if band in each.values[metric]]
                values = np.array([each.values[metric][band] for each in there])
                white = np.array([each.white[metric][band] for each in there])
                common = {"model": model, "set": tower, "role": "tower", "n": len(there)} | in_band(band)
                for row in _over_sites(metric, values, white, generator(seed, f"{tower} {band}")):
                    results.add(**common, **row)


def _over_sites(metric: str, values: np.ndarray, white: np.ndarray, draw: np.random.Generator) -> list[Row]:
    """Means over sites `[S]` and their differences to the control `[S, seeds]`: sites are resampled, and for each a
    draw of the control is picked, so that the spread of both is in the interval."""
    sites = draw.integers(0, len(values), (RESAMPLES, len(values)))
    picked = white[sites, draw.integers(0, white.shape[1], sites.shape)]
    out = []
    for name, reference, mean, drawn in (
        (metric, "", values.mean(), values[sites].mean(1)),
        (f"{metric}_white", "", white.mean(), picked.mean(1)),
        (metric, "white", values.mean() - white.mean(), (values[sites] - picked).mean(1)),
    ):
        low, high = np.quantile(drawn, [0.025, 0.975])
        out.append(
            {"metric": name, "reference": reference, "value": float(mean), "low": float(low), "high": float(high)}
        )
    return out
