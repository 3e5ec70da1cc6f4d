"""Singular spectra of weights before and after quantization (docs/methods.md, Spectra).

W = U S V' is the float weight, W^ the quantized one, E = W^ - W. The tail energy of W^'s *own* spectrum rises under any
rounding, and SQNR falls with rank under any noise; so what is asked is the gain on the float basis: its level, common
to all ranks, and its shape, tail against head, both beside the controls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from qclip import models as qmodels
from qclip.errors import InputError
from qclip.models.tower import Site, Tower
from qclip.progress import Progress
from qclip.results import Results

from ..seeds import generator
from . import tower_rows
from .bands import bands, in_band
from .basis import Basis, Spectrum, band_energy, band_gaps, effective_rank, stable_rank
from .change import Change
from .controls import CONTROLS, MIN_SEEDS, Control
from .sites import choose_sites, effective_weight, other_weight, steps_of
from .tower_rows import Response

RANKS_SHOWN = 24  # points in the curves of one site, log-spaced over its ranks


def weight_spectrum(
    float_model: nn.Module,
    quantized_models: Mapping[str, nn.Module],
    sites: str | Sequence[str] | None = None,
    seeds: int = MIN_SEEDS,
    seed: int = 0,
    label: str = "float",
    progress: Progress | None = None,
    controls: Sequence[str] | None = None,
) -> Results:
    """Rows of every chosen site, then of every tower, for the float and the quantized models.

    Own spectrum of each weight: the curve `singular_values` (rank, counted from 0, and value), `band_energy`,
    `band_gap`, `effective_rank`, `stable_rank`. Of a quantized weight on the float basis, by band (`axis` "band", the
    first rank in `at`): `gain`, `energy_removed`, `sqnr` and `sqnr_white` in dB (the latter white noise's expectation),
    `principal_angle` in degrees; `level` and `shape` (`bands.level_of`, `shape_of`); the curve `by_rank`. A site that
    was not changed has none of these.

    Tower rows are means over sites with intervals from their spread. `gain_white` is white noise's, by band; `level`
    and `shape` of each of `controls` (names of `CONTROLS`, default all; `seeds` draws of a random one) have `axis`
    "control" and its name in `at`, with the curve `gain` by band; rows with `reference` a control's name are the paired
    difference to it.

    Raises InputError on fewer than 8 seeds, an unknown control, a pattern that fits no site, or models of different
    shape.
    """
    if seeds < MIN_SEEDS:
        raise InputError(f"{seeds} seeds are too few for the controls; use {MIN_SEEDS} or more")
    chosen = {name: CONTROLS.made(name) for name in (CONTROLS.names() if controls is None else controls)}
    with contextlib.ExitStack() as forms:
        picked = choose_sites(forms.enter_context(qmodels.explicit_form(float_model)), sites)
        others = {name: forms.enter_context(qmodels.explicit_form(m)) for name, m in quantized_models.items()}
        look = partial(_look, label=label, others=others, controls=chosen, seeds=seeds, seed=seed)
        results, responses = Results(), []
        for done, found in enumerate(_each(look, picked)):
            if progress is not None:
                progress(found.site, done + 1, len(picked))
            found.write(results)
            responses += found.responses
        tower_rows.write(results, responses, chosen)
        return results


@dataclasses.dataclass(frozen=True)
class _Looked:
    """What was found at one site: the singular values of each model, and how each changed weight responds."""

    site: str
    singular: dict[str, Tensor]
    responses: list[Response]

    def write(self, results: Results) -> None:
        for model, singular in self.singular.items():
            _own_spectrum(results, model, self.site, singular)
        for each in self.responses:
            each.write(results)


def _each(look: partial[_Looked], picked: list[tuple[Tower, Site]]) -> Iterator[_Looked]:
    """`look` at every site, several at once, each on one thread: decompositions of this size are many times slower
    where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(lambda each: look(*each), picked)
    finally:
        torch.set_num_threads(threads)


def _look(
    tower: Tower,
    site: Site,
    *,
    label: str,
    others: Mapping[str, Mapping[str, Tower]],
    controls: Mapping[str, Control],
    seeds: int,
    seed: int,
) -> _Looked:
    weight = effective_weight(tower, site)
    basis = Basis.of(weight)
    found = _Looked(site.name, {label: basis.s}, [])
    for name, towers in others.items():
        residual = other_weight(towers, site, name, weight.shape) - weight
        if not bool(residual.any()):
            found.singular[name] = basis.s
            continue
        own = Spectrum.of(weight + residual)
        found.singular[name] = own.s
        if float(basis.s[0]) > 0:
            change = Change(site.name, basis, residual, steps_of(towers, site))
            found.responses.append(_response(name, change, own, controls, seeds, seed))
    return found


def _response(
    model: str, change: Change, own: Spectrum, controls: Mapping[str, Control], seeds: int, seed: int
) -> Response:
    ranks, energy = bands(len(change.basis.s)), change.basis.energy
    drawn: dict[str, list[dict[str, float]]] = {}
    for name, control in controls.items():
        if control.fits(change):
            times = seeds if control.random else 1
            drawn[name] = [control.gains(change, generator(seed, f"{change.site} {name} {k}")) for k in range(times)]
    return Response(
        model=model,
        site=change.site,
        energy=energy,
        gains=change.gains,
        controls={n: {b: np.array([gains[b] for gains in found]) for b in energy} for n, found in drawn.items()},
        by_band={
            "energy_removed": change.removed(),
            "sqnr": {band: change.sqnr(ranks[band]) for band in energy},
            "sqnr_white": {band: change.white_sqnr(ranks[band]) for band in energy},
            "principal_angle": {b: float(torch.rad2deg(a[0])) for b, a in change.basis.angles(own).items()},
        },
        by_rank=_by_rank(change),
    )


def _by_rank(change: Change) -> dict[str, list[float | None]]:
    """Gain, SQNR and its excess over white noise, both in dB, of neighbouring ranks together: `rank` is the first. None
    where nothing was added to them."""
    starts = [*_shown(len(change.basis.s)), len(change.basis.s)]
    out: dict[str, list[float | None]] = {"rank": [], "gain": [], "sqnr": [], "excess": []}
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        s, part = change.basis.s[start:end], slice(start, end)
        if float((s**2).sum()) > 0:
            sqnr = change.sqnr(part)
            gain = 1 + float((s * change.shift[part]).sum() / (s**2).sum())
            row = (start, gain, sqnr, sqnr - change.white_sqnr(part))
            for column, value in zip(out.values(), row, strict=True):
                column.append(value if math.isfinite(value) else None)
    return out


def _shown(ranks: int) -> list[int]:
    return sorted({int(k) for k in np.round(np.geomspace(1, ranks, min(RANKS_SHOWN, ranks))) - 1})


def _own_spectrum(results: Results, model: str, site: str, singular: Tensor) -> None:
    common = {"model": model, "set": site, "role": "site"}
    shown = _shown(len(singular))
    points: dict[str, list[float]] = {"rank": [*shown], "value": [float(singular[k]) for k in shown]}
    results.add_curve(points, **common, metric="singular_values", n=len(singular))
    if float(singular[0]) == 0:
        return
    for metric, by_band in (("band_energy", band_energy(singular)), ("band_gap", band_gaps(singular))):
        for band, value in by_band.items():
            results.add(**common, **in_band(band), metric=metric, value=value)
    results.add(**common, metric="effective_rank", value=effective_rank(singular))
    results.add(**common, metric="stable_rank", value=stable_rank(singular))
