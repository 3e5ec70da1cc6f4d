from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from qclip.errors import InputError, NonFiniteError
from qclip.results import Results
from qclip.seeds import generator
from qclip.spectral import weight_spectrum
from qclip.spectral.controls import normal
from tests.spectral.towers import Model, power_law, rounded

pytestmark = pytest.mark.usefixtures("fake_towers")
BANDS = ("ranks 0-8", "ranks 8-64", "ranks 64-")


def pick(rows: Results, **wanted: str) -> dict:
    wanted = {"reference": "", "subset": "all"} | wanted
    found = [r for r in rows if all(r[k] == v for k, v in wanted.items()) and r["axis"] != "control"]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def test_a_damped_band_has_the_gain_that_damped_it() -> None:
    weight = power_law()
    u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    damped = u * np.r_[s[:64], 0.8 * s[64:]] @ v
    rows = weight_spectrum(Model([weight]), {"damped": Model([torch.from_numpy(damped)], quantized=True)})
    site = {"model": "damped", "set": "vision.blocks.0.mlp.fc1"}
    assert pick(rows, metric="gain", subset="ranks 64-", **site)["value"] == pytest.approx(0.8, abs=1e-9)
    assert pick(rows, metric="sqnr", subset="ranks 64-", **site)["value"] == pytest.approx(
        -20 * math.log10(0.2), abs=1e-6
    )
    energy = (0.8 * s[64:]) @ (0.8 * s[64:]) / (s[:64] @ s[:64] + (0.8 * s[64:]) @ (0.8 * s[64:]))
    assert pick(rows, metric="band_energy", subset="ranks 64-", **site)["value"] == pytest.approx(energy)


def test_gain_and_sqnr_of_rounding_equal_their_definitions_rank_by_rank() -> None:
    weight = power_law()
    other = rounded(weight, 4)
    rows = weight_spectrum(Model([weight]), {"w4": Model([other], quantized=True)})
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    diagonal = np.diag(u.T @ other.numpy() @ vt.T)
    noise = ((other - weight).numpy() @ vt.T) ** 2
    for band, (low, high) in zip(BANDS, ((0, 8), (8, 64), (64, 96)), strict=True):
        common = {"model": "w4", "set": "vision.blocks.0.mlp.fc1", "subset": band}
        slope = np.linalg.lstsq(s[low:high, None], diagonal[low:high], rcond=None)[0][0]
        assert pick(rows, metric="gain", **common)["value"] == pytest.approx(slope, abs=1e-9)
        sqnr = 10 * math.log10((s[low:high] ** 2).sum() / noise[:, low:high].sum())
        assert pick(rows, metric="sqnr", **common)["value"] == pytest.approx(sqnr, abs=1e-9)
    own = np.linalg.svd(other.numpy(), compute_uv=False)
    shown = rows.curve(model="w4", metric="singular_values", set="vision.blocks.0.mlp.fc1")
    assert shown["value"] == pytest.approx([own[k] for k in shown["rank"]])
    assert (shown["rank"][0], shown["rank"][-1]) == (0, 95)


def test_the_controls_rows_equal_adding_that_noise_by_hand() -> None:
    weight = power_law()
    other = rounded(weight, 4)
    rows = weight_spectrum(Model([weight]), {"w4": Model([other], quantized=True)})
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    norms = np.linalg.norm((other - weight).numpy(), axis=1, keepdims=True)
    gains = []
    for k in range(8):
        drawn = normal(weight.shape, generator(0, f"vision.blocks.0.mlp.fc1 white {k}")).numpy()
        noise = norms * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        diagonal = np.diag(u.T @ (weight.numpy() + noise) @ vt.T)
        gains.append((diagonal[64:] * s[64:]).sum() / (s[64:] ** 2).sum())
    row = pick(rows, model="w4", set="vision.blocks.0.mlp.fc1", metric="gain_white", subset="ranks 64-")
    reach = scipy.stats.t.ppf(0.975, 7) * np.std(gains, ddof=1) * math.sqrt(1 + 1 / 8)
    assert row["value"] == pytest.approx(np.mean(gains), rel=1e-6)
    assert (row["low"], row["high"]) == pytest.approx((np.mean(gains) - reach, np.mean(gains) + reach), rel=1e-3)


def test_tail_energy_rises_under_rounding_although_nothing_is_amplified() -> None:
    """The trap that the float basis is there for (docs/methods.md, Spectra)."""
    weight = power_law(256, 256)
    rows = weight_spectrum(Model([weight]), {"w4": Model([rounded(weight, 4)], quantized=True)})
    site = {"set": "vision.blocks.0.mlp.fc1", "subset": "ranks 64-"}
    before, after = (pick(rows, metric="band_energy", model=m, **site)["value"] for m in ("float", "w4"))
    assert after > 1.02 * before
    assert abs(pick(rows, metric="gain", model="w4", **site)["value"] - 1) < 0.02


def test_tower_rows_are_means_over_the_changed_sites() -> None:
    matrices = [power_law(seed=seed) for seed in range(3)]
    changed = [rounded(matrices[0], 4), rounded(matrices[1], 4), matrices[2]]
    rows = weight_spectrum(Model(matrices), {"w4": Model(changed, quantized=True)})
    by_site = [r["value"] for r in rows if r["metric"] == "gain" and r["at"] == 8 and r["role"] == "site"]
    tower = pick(rows, model="w4", set="vision", metric="gain", subset="ranks 8-64")
    assert len(by_site) == 2 and tower["n"] == 2 and tower["value"] == pytest.approx(np.mean(by_site))
    white = pick(rows, model="w4", set="vision", metric="gain_white", subset="ranks 8-64")
    gap = pick(rows, model="w4", set="vision", metric="gain", subset="ranks 8-64", reference="white")
    assert gap["value"] == pytest.approx(tower["value"] - white["value"]) and gap["low"] <= gap["value"] <= gap["high"]
    assert pick(rows, model="w4", set="vision", metric="effective_rank")["n"] == 3


def test_rows_say_their_band_and_what_they_are_of() -> None:
    matrices = [power_law(seed=1)]
    results = weight_spectrum(Model(matrices), {"w4": Model([rounded(matrices[0], 4)], quantized=True)})
    assert [row["at"] for row in results.where(metric="gain_white", set="vision")] == [0, 8, 64]
    assert {(row["set"], row["role"]) for row in results} == {("vision.blocks.0.mlp.fc1", "site"), ("vision", "tower")}
    assert results.row(model="w4", set="vision", metric="gain", subset="ranks 8-64", at=8) is not None


def test_bad_input_is_refused_by_name() -> None:
    weight = power_law()
    model = Model([weight])
    with pytest.raises(InputError, match="8 or more"):
        weight_spectrum(model, {}, seeds=3)
    with pytest.raises(InputError, match="did you mean 'vision.blocks.0.mlp.fc1'"):
        weight_spectrum(model, {}, sites="vision.blocks.0.mlp.fc3")
    with pytest.raises(InputError, match="one architecture"):
        weight_spectrum(model, {"other": Model([power_law(64, 128)])})
    with pytest.raises(InputError, match="has no site vision.blocks.1"):
        weight_spectrum(Model([weight, weight]), {"other": Model([weight])})
    broken = weight.clone()
    broken[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match="vision.blocks.0.mlp.fc1"):
        weight_spectrum(Model([broken]), {})


def test_sites_are_chosen_by_pattern_and_a_low_rank_tail_is_left_out() -> None:
    weight = power_law()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    s[64:] = 0
    low_rank = u * s @ vt
    rows = weight_spectrum(Model([weight, low_rank]), {"q": Model([weight, rounded(low_rank, 4)])}, sites="*.1.*")
    assert {row["set"] for row in rows} == {"vision.blocks.1.mlp.fc1", "vision"}
    assert {row["at"] for row in rows if row["metric"] == "gain"} == {0, 8}


def test_level_and_shape_are_told_for_every_site_and_each_control() -> None:
    matrices = [power_law(seed=seed) for seed in range(4)]
    results = weight_spectrum(Model(matrices), {"w4": Model([rounded(m, 4) for m in matrices], quantized=True)})
    for site in range(4):
        gains = [pick(results, set=f"vision.blocks.{site}.mlp.fc1", metric="gain", subset=b)["value"] for b in BANDS]
        energy = [sum(r**-1.4 for r in range(a + 1, b + 1)) for a, b in ((0, 8), (8, 64), (64, 96))]
        level = sum(g * e for g, e in zip(gains, energy, strict=True)) / sum(energy)
        where = {"set": f"vision.blocks.{site}.mlp.fc1", "model": "w4"}
        assert pick(results, metric="level", **where)["value"] == pytest.approx(level, abs=1e-9)
        assert pick(results, metric="shape", **where)["value"] == pytest.approx(math.log(gains[2] / gains[0]))
    tower = {"model": "w4", "set": "vision", "metric": "shape"}
    names = {"white", "white_layer", "uniform", "shuffled", "shrink", "truncated"}
    assert {row["at"] for row in results.where(**tower, axis="control")} == names
    assert {row["reference"] for row in results.where(**tower)} == names | {""}
    own, other, gap = (
        results.row(**tower, **more)["value"]
        for more in ({}, {"axis": "control", "at": "truncated"}, {"reference": "truncated"})
    )
    assert gap == pytest.approx(own - other) and other < own
    curve = results.curve(model="w4", set="vision", metric="gain", axis="control", at="shrink")
    assert curve["band"] == [0, 8, 64] and len(set(np.round(curve["value"], 12))) == 1


def test_by_rank_pools_neighbours_and_is_level_with_white_noise_in_expectation() -> None:
    weight = power_law(400, 200)
    rng = np.random.default_rng(3)
    other = weight + 1e-3 * torch.from_numpy(rng.normal(size=(400, 200)))
    results = weight_spectrum(Model([weight]), {"noisy": Model([other], quantized=True)})
    curve = results.curve(model="noisy", metric="by_rank", set="vision.blocks.0.mlp.fc1")
    assert curve["rank"][0] == 0 and curve["sqnr"][0] > curve["sqnr"][-1] + 25  # it falls with rank under any noise
    assert np.abs(curve["excess"]).max() < 0.8  # |E v|^2 of one rank has 400 degrees of freedom: 0.3 dB
    site = {"model": "noisy", "set": "vision.blocks.0.mlp.fc1", "subset": "ranks 64-"}
    assert pick(results, metric="energy_removed", **site)["value"] == pytest.approx(0, abs=0.02)


def test_without_real_steps_the_uniform_control_is_left_out_and_named() -> None:
    matrices = [power_law(seed=seed) for seed in range(2)]
    results = weight_spectrum(Model(matrices), {"tuned": Model([0.99 * m for m in matrices])})
    assert not results.where(axis="control", at="uniform").rows
    assert results.notes == ["tuned: its vision layers tell no steps of a grid, so there is no uniform control"]
