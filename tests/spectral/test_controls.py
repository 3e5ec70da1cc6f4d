from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from qclip.layers.linear import Int4Linear, Int8Linear
from qclip.layers.patch import QuantizedPatch
from qclip.layers.transforms import Hadamard, Scale
from qclip.seeds import generator
from qclip.spectral.basis import Basis
from qclip.spectral.change import Change
from qclip.spectral.controls import CONTROLS
from qkernels.grids import Grid
from qkernels.weights import quantize_weight
from tests.spectral.towers import power_law, rounded


def change(shape: tuple[int, int] = (96, 128), bits: int = 4) -> Change:
    weight = power_law(*shape)
    return Change("site", Basis.of(weight), rounded(weight, bits) - weight, lambda units: 0.02 * units)


def drawn(name: str, of: Change, k: int = 0) -> torch.Tensor:
    return CONTROLS.made(name).residual(of, generator(0, f"{name} {k}")).double()


@pytest.mark.parametrize("name", CONTROLS.names())
def test_gains_are_those_of_the_residual(name: str) -> None:
    of, control = change(), CONTROLS.made(name)
    residual = control.residual(of, generator(0, "draw"))
    assert control.gains(of, generator(0, "draw")) == pytest.approx(of.basis.gains_of(residual), abs=2e-6)
    again = control.residual(of, generator(0, "draw"))
    other = control.residual(of, generator(1, "draw"))
    assert torch.equal(residual, again) and torch.equal(residual, other) != control.random


@pytest.mark.parametrize("name", ["white", "white_layer", "truncated", "shuffled"])
def test_the_norm_is_that_of_the_residual(name: str) -> None:
    of = change()
    assert float(drawn(name, of).norm()) == pytest.approx(float(of.residual.norm()), rel=1e-6)
    rows = drawn(name, of).norm(dim=1) / of.residual.norm(dim=1)
    assert (float((rows - 1).abs().max()) < 1e-6) == (name == "white")


@pytest.mark.parametrize("name", ["white", "white_layer"])
def test_white_noise_has_no_direction(name: str) -> None:
    of = change((60, 300))
    everything = torch.cat([drawn(name, of, k) / of.residual.norm(dim=1, keepdim=True) for k in range(8)]).flatten()
    assert abs(float(everything.mean())) < 0.02 * float(everything.std())
    if name == "white":
        assert abs(scipy.stats.kurtosis(everything.numpy())) < 0.1


def test_uniform_noise_covers_a_step() -> None:
    noise = drawn("uniform", change()).flatten().numpy()
    assert scipy.stats.kstest(noise, scipy.stats.uniform(-0.01, 0.02).cdf).pvalue > 0.01
    weight = power_law()
    assert not CONTROLS.made("uniform").fits(Change("site", Basis.of(weight), rounded(weight, 4) - weight))


def test_shuffling_exchanges_ranks_and_nothing_else() -> None:
    of = change()
    inner = of.basis.u.mT @ drawn("shuffled", of) @ of.basis.v
    np.testing.assert_allclose(inner.diagonal().sort().values, of.shift.sort().values, atol=1e-9)
    assert not torch.allclose(inner.diagonal(), of.shift)


def test_shrink_keeps_the_energy_and_truncation_takes_the_tail() -> None:
    weight = power_law()
    of = Change("site", Basis.of(weight), -0.01 * weight)
    np.testing.assert_allclose(drawn("shrink", of), -0.01 * weight, atol=1e-12)
    of = change(bits=3)
    kept = float(((of.basis.s + of.shift) ** 2).sum())
    assert float((weight + drawn("shrink", of)).norm() ** 2) == pytest.approx(kept)
    s = torch.linalg.svdvals(weight + drawn("truncated", of))
    gone = int((s < 1e-10).sum())
    assert gone > 5 and torch.allclose(s[: 95 - gone], of.basis.s[: 95 - gone])
    assert 0 < float(s[95 - gone]) < float(of.basis.s[95 - gone])  # gives what the budget has left


@pytest.mark.parametrize("kind", ["sym", "midrise", "group", "smooth", "rotated"])
def test_a_layers_steps_are_the_distance_between_its_values(kind: str) -> None:
    weight = power_law(16, 64).float()
    transforms = {"smooth": [Scale(torch.linspace(0.5, 2, 64))], "rotated": [Hadamard(64)]}.get(kind, [])
    folded = weight
    for transform in transforms:
        folded = transform.weight(folded)
    grid = {"midrise": Grid(5, "midrise"), "group": Grid(4, "symfull", 32)}.get(kind, Grid(6, "sym"))
    layer = (Int4Linear if kind == "group" else Int8Linear)(
        quantize_weight(folded, grid), transforms=transforms, grid=grid
    )
    values = layer.quantized.canonical().dequantize()
    least = [values[n, :32].unique().diff().min() for n in range(16)]
    unfolded = layer.from_steps()(torch.ones(16, 64))
    for transform in transforms:
        unfolded = transform.weight(unfolded)
    wanted = torch.stack(least)
    np.testing.assert_allclose(unfolded[:, :32], wanted[:, None].expand(16, 32), rtol=1e-3, atol=1e-6)
    error = (layer.dequantized_weight() - weight).norm()
    uniform = layer.from_steps()(torch.rand(16, 64) - 0.5).norm()
    assert float(uniform / error) == pytest.approx(1, abs=0.1)  # rounding errs by D / sqrt(12), too
    patch = QuantizedPatch(layer, (8, 8))
    assert torch.equal(patch.from_steps()(torch.ones(16, 64)), layer.from_steps()(torch.ones(16, 64)))
