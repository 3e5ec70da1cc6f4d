from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from qclip.errors import InputError, NonFiniteError
from qclip.models.tower import Site, Tower
from qclip.results import Results
from qclip.spectral import controls, verdict, weight_spectrum, weights

BANDS = ("ranks 0-8", "ranks 8-64", "ranks 64-")


def power_law(n: int = 96, k: int = 128, seed: int = 0) -> torch.Tensor:
    """A weight whose singular values fall like 1 / rank^0.7."""
    rng = np.random.default_rng(seed)
    r = min(n, k)
    u, v = (np.linalg.qr(rng.normal(size=(m, r)))[0] for m in (n, k))
    return torch.from_numpy(u * np.arange(1, r + 1) ** -0.7 @ v.T)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(weight / step) * step


class Quantized(nn.Module):
    """As a quantized site: `weight` is no matrix, the effective weight comes from a method."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.effective = torch.empty(0), weight

    def dequantized_weight(self) -> torch.Tensor:
        return self.effective


class Model(nn.Module):
    """Sites vision.blocks.B.mlp.fc1 (and a text embedding), float or "quantized"."""

    def __init__(self, matrices: list[torch.Tensor], quantized: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for matrix in matrices:
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=torch.float64)
            linear.weight = nn.Parameter(matrix.clone())
            self.layers.append(Quantized(matrix.clone()) if quantized else linear)
        self.embedding = nn.Embedding(20, 8)

    def towers(self) -> dict[str, Tower]:
        sites = {}
        for index in range(len(self.layers)):
            name = f"vision.blocks.{index}.mlp.fc1"
            sites[name] = Site(name, "fc1", "norm", name, self.layers, str(index))
        words = Site("text.embedding", "embedding", "raw", "text.embedding", self, "embedding")
        return {"vision": Tower("vision", self, [], sites, 1), "text": Tower("text", self, [], {words.name: words}, 1)}


@pytest.fixture(autouse=True)
def fake_towers(monkeypatch) -> None:
    monkeypatch.setattr("qclip.spectral.weights.qmodels.towers", Model.towers)


def pick(rows: Results, **wanted: str) -> dict:
    found = [r for r in rows if all(r[k] == v for k, v in ({"reference": "", "subset": "all"} | wanted).items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def test_ranks_and_energy_have_their_known_values() -> None:
    one = torch.ones(30, dtype=torch.float64)
    assert weights.effective_rank(one) == pytest.approx(30) and weights.stable_rank(one) == pytest.approx(30)
    first = torch.tensor([5.0, 0, 0], dtype=torch.float64)
    assert weights.effective_rank(first) == pytest.approx(1) and weights.stable_rank(first) == pytest.approx(1)
    share = np.array([0.5, 0.3, 0.2])
    assert weights.effective_rank(torch.from_numpy(share * 7)) == pytest.approx(math.exp(scipy.stats.entropy(share)))
    assert weights.band_energy(torch.ones(80)) == pytest.approx({BANDS[0]: 0.1, BANDS[1]: 0.7, BANDS[2]: 0.2})
    assert list(weights.bands(8)) == ["ranks 0-8"] and weights.bands(5) == {"ranks 0-8": slice(0, 5)}
    assert weights.bands(70)["ranks 64-"] == slice(64, 70)


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


def test_the_white_control_has_the_residuals_norm_in_every_row_and_no_direction() -> None:
    directions = list(controls.white_directions((40, 300), "site", 8))
    assert len(directions) == 8 and not torch.equal(directions[0], directions[1])
    assert torch.equal(directions[3], list(controls.white_directions((40, 300), "site", 8))[3])
    for one in directions:
        np.testing.assert_allclose(one.norm(dim=1), 1, rtol=1e-12)
    everything = torch.cat(directions).flatten() * math.sqrt(300)
    assert abs(everything.mean()) < 0.02 and abs(scipy.stats.kurtosis(everything.numpy())) < 0.1


def test_the_controls_rows_equal_adding_that_noise_by_hand() -> None:
    weight = power_law()
    other = rounded(weight, 4)
    rows = weight_spectrum(Model([weight]), {"w4": Model([other], quantized=True)})
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    norms = np.linalg.norm((other - weight).numpy(), axis=1, keepdims=True)
    gains = []
    for direction in controls.white_directions(tuple(weight.shape), "vision.blocks.0.mlp.fc1", 8):
        diagonal = np.diag(u.T @ (weight.numpy() + norms * direction.numpy()) @ vt.T)
        gains.append((diagonal[64:] * s[64:]).sum() / (s[64:] ** 2).sum())
    row = pick(rows, model="w4", set="vision.blocks.0.mlp.fc1", metric="gain_white", subset="ranks 64-")
    reach = scipy.stats.t.ppf(0.975, 7) * np.std(gains, ddof=1) * math.sqrt(1 + 1 / 8)
    assert row["value"] == pytest.approx(np.mean(gains))
    assert (row["low"], row["high"]) == pytest.approx((np.mean(gains) - reach, np.mean(gains) + reach), rel=1e-3)


@pytest.mark.parametrize("freedom", [7, 9, 15, 100])
def test_students_quantile(freedom: int) -> None:
    assert controls.student_t(0.975, freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=1e-3)


def sentence(change, sites: int = 6) -> str:
    matrices = [power_law(seed=seed) for seed in range(sites)]
    rows = weight_spectrum(Model(matrices), {"q": Model([change(m) for m in matrices], quantized=True)})
    (said,) = verdict(rows)
    return said


def test_damping_is_said_only_of_damping() -> None:
    def tail(gain: float):
        def change(weight: torch.Tensor) -> torch.Tensor:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            s[64:] *= gain
            return u * s @ vt

        return change

    def white(weight: torch.Tensor) -> torch.Tensor:
        noise = torch.from_numpy(np.random.default_rng(int(1e6 * weight[0, 0].abs())).normal(size=weight.shape))
        return weight + 0.02 * weight.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)

    assert ": damping beyond the control" in sentence(tail(0.9))
    assert ": amplification beyond the control" in sentence(tail(1.1))
    assert "cannot be told" in sentence(white)  # its SQNR falls with rank like any noise's, and damps nothing


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


@pytest.mark.parametrize(
    ("gain", "difference", "said"),
    [
        ((0.95, 0.97), (-0.03, -0.01), "damping beyond the control, by 7.8 %"),
        ((0.95, 0.97), (-0.03, 0.01), "cannot be told"),  # the control falls below 1 as well
        ((0.95, 1.02), (-0.03, -0.01), "cannot be told"),
        ((1.03, 1.05), (0.01, 0.03), "amplification beyond the control, by 8.2 %"),
        ((1.03, 1.05), (-0.01, 0.03), "cannot be told"),
        ((0.99, 1.01), (0.01, 0.03), "cannot be told"),
    ],
)
def test_a_claim_needs_both_intervals_clear(gain: tuple, difference: tuple, said: str) -> None:
    def row(metric: str, reference: str, ends: tuple, subset: str = "ranks 64-", at: int = 64) -> dict:
        low, high = ends
        return {
            "model": "q",
            "set": "vision",
            "metric": metric,
            "reference": reference,
            "role": "tower",
            "subset": subset,
            "axis": "band",
            "at": at,
            "value": (low + high) / 2,
            "low": low,
            "high": high,
            "n": 9,
        }

    tail = [row("gain", "", gain), row("gain", "white", difference), row("gain_white", "", (0.96, 1.0))]
    other = [row("gain", r, (0.5, 0.6), "ranks 8-64", 8) for r in ("", "white")]  # not the tail: not asked
    (sentence,) = verdict([*other, *tail, row("sqnr", "white", (-0.1, 0.1))])
    assert sentence.startswith("q, vision tower, ranks 64-: ") and said in sentence
