"""HQQ against what it claims: the kept error falls, it lies below round-to-nearest's, and kernels compute with it."""

import dataclasses

import pytest
import torch

import qclip
from qclip.errors import NonFiniteError, RecipeError
from qclip.layers import Int4Linear, Int8Linear, SimulatedLinear
from qclip.models import towers
from qclip.ptq.methods import hqq
from qclip.recipes import Recipe, Treatment, step
from qkernels.grids import Grid
from qkernels.weights import quantize_weight
from tests.small import IMAGES, small_clip

PLAN = Treatment(4, 8, 64, weight_grid="floatzero")
OPTIONS = hqq.Options()


def heavy(n: int = 24, k: int = 200) -> torch.Tensor:
    """A weight with tails: Student's t with 3 degrees of freedom; its last group is a short one."""
    torch.manual_seed(3)
    return torch.distributions.StudentT(3.0).sample((n, k)) * 0.02


def error(weight: torch.Tensor, quantized, p: float = 0.7) -> torch.Tensor:
    """`|W - W^|^p` in steps of the scales, summed by groups of 64, `[N, groups]`."""
    off = (weight - quantized.dequantize()).abs()
    scales = quantized.scales.float().abs().repeat_interleave(64, dim=1)[:, : weight.shape[1]]
    off = torch.nn.functional.pad((off / scales) ** p, (0, -weight.shape[1] % 64))
    return off.unflatten(1, (-1, 64)).sum(2)


def test_the_kept_error_of_every_group_falls_and_is_that_of_the_result():
    seen, weight = [], heavy()
    found = hqq.quantize(weight, PLAN, OPTIONS, seen.append)
    assert len(seen) > 3 and all((after <= before).all() for before, after in zip(seen, seen[1:], strict=False))
    start = quantize_weight(weight, PLAN.grid)
    torch.testing.assert_close(seen[0], error(weight, start), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[-1], error(weight, found), rtol=1e-4, atol=1e-4)
    assert seen[-1].sum() < 0.98 * seen[0].sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("observer", ["min-max", "mse"])
def test_it_errs_less_than_round_to_nearest_where_weights_have_tails(bits, observer):
    weight, plan = heavy(64, 256), dataclasses.replace(PLAN, weight_bits=bits, weight_observer=observer)
    found = hqq.quantize(weight, plan, OPTIONS)
    for kind in ("asym", "symfull"):  # of one range with it; with the scales of round to nearest at these bits
        grid = Grid(bits, kind, 64)
        nearest = quantize_weight(weight, grid, *grid.fit(weight, observer))
        assert (weight - found.dequantize()).abs().pow(0.7).sum() < (weight - nearest.dequantize()).abs().pow(0.7).sum()


def test_setting_outliers_aside_is_better_than_the_mere_mean():
    weight = heavy(64, 256)
    mean = dataclasses.replace(OPTIONS, beta=1e-9)  # every error is shrunk to 0
    found, plain = (error(weight, hqq.quantize(weight, PLAN, options)).sum() for options in (OPTIONS, mean))
    assert found < 0.99 * plain


def test_what_fills_up_a_short_group_counts_for_nothing():
    whole, last = (hqq.quantize(weight, PLAN, OPTIONS) for weight in (heavy(), heavy()[:, 192:]))
    same = (whole.zeros[:, 3:] - last.zeros).abs() < 0.01  # sums are not taken in the same order
    assert same.all()


def test_weights_a_thousand_times_smaller_get_the_same_codes():
    """The shrinkage sees errors in steps, not as they are; else it would set none apart from small weights."""
    big, small = (hqq.quantize(heavy() * factor, PLAN, OPTIONS) for factor in (256.0, 0.25))
    assert torch.equal(big.unpacked_codes(), small.unpacked_codes()) and torch.equal(big.zeros, small.zeros)


def test_constant_groups_are_exact():
    weight = torch.full((3, 128), 0.9375)  # a scale of 1/16, which float16 holds
    weight[1], weight[2, 64:] = -1.875, 0.0
    assert torch.equal(hqq.quantize(weight, PLAN, OPTIONS).dequantize(), weight)
    other = hqq.quantize(weight * 0.7, PLAN, OPTIONS).dequantize()
    torch.testing.assert_close(other, weight * 0.7, rtol=2**-10, atol=0)  # the scale's rounding


@pytest.mark.parametrize("recipe", ["w4a16-hqq", "w4a8-hqq", "w3a8-hqq"])
def test_kernels_compute_what_simulation_does_and_it_is_saved(recipe, tmp_path):
    model = small_clip()
    done = qclip.quantize(model, recipe)
    assert qclip.coverage(done).share("simulated") == 0
    for tower in towers(done).values():
        sites = [site.module for site in tower if site.kind not in ("patch", "embedding")]
        assert sites and all(type(site) is Int4Linear and site.grid.kind == "floatzero" for site in sites)
        for site in sites:
            x = torch.randn(5, site.shape[1])
            bits = 8 if site.takes_codes() else None
            twin = SimulatedLinear(site.quantized.canonical(), site.bias, grid=site.grid, activation_bits=bits)
            torch.testing.assert_close(site(x), twin(x), rtol=1e-4, atol=1e-5)
    again = qclip.load(qclip.save(done, tmp_path / "a"))
    assert torch.equal(again.encode_image(IMAGES), done.encode_image(IMAGES))


def test_sites_of_more_bits_stay_rounded_to_nearest():
    recipe = Recipe("mixed", Treatment(4, 8, 128), exceptions=(("*.v", "w8a8"),), steps=(step("hqq"),))
    done = qclip.quantize(small_clip(), recipe)
    kinds = {site.kind: type(site.module) for site in towers(done)["vision"]}
    assert kinds["v"] is Int8Linear and kinds["q"] is Int4Linear
    assert done.qclip_quantization.provenance["hqq_sites"] == 2 * 2 * 5 + 2


def test_what_it_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="hqq moves the zero points.*up to 4 bits.*w4a16-hqq"):
        qclip.quantize(small_clip(), "w8a8-hqq")
    for options in ({"p": 0.0}, {"p": 1.1}, {"beta": 0.0}, {"growth": 0.9}, {"rounds": 0}):
        with pytest.raises(RecipeError, match=r"method 'hqq': (p|beta|rounds) must"):
            step("hqq", **options)
    huge = small_clip()
    with torch.no_grad():
        huge.visual.transformer.resblocks[1].mlp.c_fc.weight.fill_(1e7)
    with pytest.raises(NonFiniteError, match="vision.blocks.1.mlp.fc1: scales of an Int4Weight"):
        qclip.quantize(huge, "w4a8-hqq")


def test_another_grid_is_a_contradiction():
    for kind in ("sym", "asym"):
        recipe = Recipe("x", Treatment(4, 8, 64, weight_grid=kind), steps=(step("hqq"),))
        with pytest.raises(RecipeError, match=f"hqq puts weights on the grid 'floatzero', and .* is to be '{kind}'"):
            qclip.quantize(small_clip(), recipe)
    done = qclip.quantize(small_clip(), Recipe("x", PLAN, steps=(step("hqq"),)))
    assert done.qclip_quantization.provenance["hqq_sites"] == 26
