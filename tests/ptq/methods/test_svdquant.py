"""SVDQuant: what its branch takes is the best low-rank part, and its kept error never rises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import qclip
from qclip import models, ptq
from qclip.errors import NonFiniteError, RecipeError
from qclip.layers import SimulatedLinear
from qclip.models import encoders
from qclip.ptq.methods import svdquant
from qclip.recipes import Recipe, Treatment, step
from qclip.rewrite import quantization
from tests.small import IMAGES, small_clip


def group(n: int = 48, k: int = 64, plan: Treatment = Treatment(4, 4, 32)) -> tuple[list[ptq.SiteState], torch.Tensor]:  # noqa: B008
    torch.manual_seed(0)
    out = []
    for name in ("q", "k"):
        source = nn.Linear(k, n)
        with torch.no_grad():
            source.weight += torch.randn(n, 3) @ torch.randn(3, k) * 0.2
        site = models.Site(f"vision.{name}", name, "norm", "vision.in", nn.Module())
        out.append(ptq.SiteState(site, source, plan))
    x = torch.randn(200, k)
    x[:, ::16] *= 10
    return out, x


def trial(rank: int = 4) -> svdquant._Trial:
    states, x = group()
    return svdquant._Trial(states, torch.cat([state.folded()[0] for state in states]), x, rank)


def test_the_first_branch_is_the_best_of_its_rank() -> None:
    """Eckart-Young: the rest's singular values are the tail of the smoothed weight's; q and k share what reads x."""
    mine = trial()
    first = mine.attempt(0.5, 0.5, exact=True)
    smoothed = first.smooth.weight(mine.weight)
    sizes = torch.linalg.svdvals(smoothed)
    rest = smoothed - torch.cat([branch.weight() for branch in first.branches])
    assert torch.allclose(torch.linalg.svdvals(rest)[: len(sizes) - 4], sizes[4:], atol=5e-3 * float(sizes[0]))
    assert float(rest.square().sum()) == pytest.approx(float(sizes[4:].square().sum()), rel=1e-3)
    a, b = (branch.down.float() / branch.down.float().norm(dim=1, keepdim=True) for branch in first.branches)
    assert torch.allclose(a, b, atol=2e-3)
    near = mine.attempt(0.5, 0.5)  # by random projection
    assert near.error == pytest.approx(first.error, rel=0.2)


def test_smoothing_is_the_published_one_and_dead_channels_stay() -> None:
    mine = trial()
    mine.largest_x[3] = mine.largest_w[5] = 0
    s = 1 / mine.attempt(0.3, 0.7).smooth.factor
    want = mine.largest_x.pow(0.3) / mine.largest_w.pow(0.7)
    assert s[3] == s[5] == 1 and torch.allclose(s[6:], want[6:])
    assert svdquant.Options(tried=20).pairs[:2] == [(0, 0), (0.05, 0)] and len(svdquant.Options(tried=20).pairs) == 40


def test_the_kept_error_never_rises_and_the_pair_is_the_best_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    states, x = group()
    errors: dict[tuple[float, float], float] = {}
    rounds: list[float] = []
    attempt, again = svdquant._Trial.attempt, svdquant._Trial.again

    def kept(self, a, b, exact=False):
        found = attempt(self, a, b, exact)
        if exact:
            rounds.append(found.error)
        else:
            errors[a, b] = found.error
        return found

    def once_more(self, last):
        found = again(self, last)
        rounds.append(found.error)
        return found

    monkeypatch.setattr(svdquant._Trial, "attempt", kept)
    monkeypatch.setattr(svdquant._Trial, "again", once_more)
    method = svdquant.SVDQuant(svdquant.Options(rank=4, tried=5))
    method._decide("in", states, x)
    chosen = tuple(method.found["in"]["smoothing"])
    assert errors[chosen] == min(errors.values()) < errors[0.0, 0.0] and len(errors) == 10
    kept_error = error(states, x)
    assert kept_error == pytest.approx(min(rounds), rel=1e-3) and len(rounds) > 2 and rounds[1] < rounds[0]
    plain, _ = group()
    assert kept_error < 0.6 * error(plain, x)  # of rounding to nearest


def error(states: list[ptq.SiteState], x: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(float((ptq.build(s)(x) - s.source(x)).square().sum()) for s in states)


def test_full_rank_leaves_nothing_to_round() -> None:
    states, x = group(plan=Treatment(2, 16))
    svdquant.SVDQuant(svdquant.Options(rank=64, tried=1))._decide("in", states, x)
    for state in states:
        want = state.source.weight.detach()
        assert (ptq.build(state).dequantized_weight() - want).norm() < 2e-3 * want.norm()


def test_rank_by_bits() -> None:
    assert svdquant.Options(bits=1.34).rank_of(768, 768) == 32
    assert svdquant.Options(bits=0.01).rank_of(64, 64) == 1 and svdquant.Options(rank=99).rank_of(64, 32) == 99


def test_sites_of_a_model_are_nearer_to_float_than_rounded_ones(tmp_path: Path) -> None:
    """Behind norms that have channels which are hard to round; in and outside of blocks."""
    model, seen = small_clip(), {}
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            block.ln_1.weight[::20] *= 12
            block.ln_2.weight[::20] *= 12
        with models.explicit_form(model) as towers:
            sites = [site for site in towers["vision"] if site.kind in ("q", "k", "v", "fc1", "projection")]
            for site in sites:
                site.module.register_forward_hook(lambda _, x, y, name=site.name: seen.update({name: (x[0], y)}))
            encoders(model).encode_image(IMAGES)
            for site in sites:
                site.module._forward_hooks.clear()
        coded = qclip.quantize(model, Recipe("mine", Treatment(4, 4, 32), steps=(step("svdquant", tried=4),)), IMAGES)
        rounded = qclip.quantize(model, Recipe("rtn", Treatment(4, 4, 32)))

        def away(quantized: nn.Module) -> dict[str, float]:
            towers = models.towers(quantized)
            layers = {name: towers["vision"].sites[name].module for name in seen}
            return {name: float((layers[name](x) - y).norm() / y.norm()) for name, (x, y) in seen.items()}

        near, far = away(coded), away(rounded)
        assert len(near) == 9 and all(near[name] < (0.9 if "blocks" in name else 1.0) * far[name] for name in far)
        assert sum(near.values()) < 0.7 * sum(far.values())
        told = quantization(coded).provenance["svdquant"]
        assert told["vision.features"]["rank"] == 1 and len(told) == 2 * (4 + 4 + 1)  # two towers of two blocks
        again = qclip.load(qclip.save(coded, tmp_path / "a"))
        assert torch.equal(encoders(again).encode_image(IMAGES), encoders(coded).encode_image(IMAGES))


def test_kernels_give_the_simulated_numbers() -> None:
    mine = Recipe("mine", Treatment(4, 8, 32), steps=(step("svdquant", tried=2, rounds=2),))
    coded = qclip.quantize(small_clip(), mine, IMAGES)
    assert qclip.coverage(coded).share("simulated") == 0
    count = 0
    for tower in models.towers(coded).values():
        for layer in (site.module for site in tower if getattr(site.module, "branch", None) is not None):
            x = torch.randn(5, layer.shape[1])
            want = SimulatedLinear(
                layer.quantized.canonical(), layer.bias, layer.transforms, branch=layer.branch, activation_bits=8
            )(x)
            assert (layer(x) - want).norm() < 1e-4 * want.norm()
            count += 1
    assert count == 26


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: step("svdquant", rank=0), "rank must be 1 or more"),
        (lambda: step("svdquant", bits=0.0), "between 0 and 16"),
        (lambda: step("svdquant", rounds=-1), "rounds must be 0 or more"),
        (lambda: step("svdquant", tried=0), "tried must be 1 or more"),
        (lambda: qclip.recipes.get("w4a4-svdquant+raana"), "both decide the weights"),
        (lambda: qclip.recipes.get("w4a4-svdquant+smoothquant"), "put 'smoothquant' before 'svdquant'"),
        (lambda: qclip.quantize(small_clip(), "w4a4-svdquant"), "needs data"),
    ],
)
def test_refusals(make, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        make()


def test_exceptions_keep_their_grids() -> None:
    mine = Recipe("mine", Treatment(4, 4, 32), steps=(step("svdquant", tried=1, rounds=0),))
    mine = dataclasses.replace(mine, exceptions=(("*.fc2", "float"), ("*.out", "w8a8")))
    coded = qclip.quantize(small_clip(), mine, IMAGES)
    found = {site.name: site.module for tower in models.towers(coded).values() for site in tower}
    assert isinstance(found["vision.blocks.0.mlp.fc2"], nn.Linear) and found["vision.blocks.0.attn.out"].grid.bits == 8


@pytest.mark.parametrize("recipe", [Treatment(4, 8, 32), Treatment(4, 16)])
def test_inputs_that_are_not_finite_name_the_site(recipe: Treatment) -> None:
    model = small_clip()
    with torch.no_grad():
        model.visual.transformer.resblocks[1].mlp.c_fc.weight.mul_(1e38)
    mine = Recipe("mine", recipe, steps=(step("svdquant", tried=1, rounds=1),), towers=("vision",))
    with pytest.raises(NonFiniteError, match=r"vision\.blocks\.1\.mlp\.fc[12]: .*(NaN or infinite|too large|float16)"):
        qclip.quantize(model, mine, IMAGES)


def test_a_few_inputs_smooth_nothing_and_that_is_said() -> None:
    """One image: its values divided by themselves are all alike, which says nothing of any other image."""
    model = small_clip()
    mine = Recipe("mine", Treatment(4, 4, 32), steps=(step("svdquant", tried=4),), towers=("vision",))
    with pytest.warns(UserWarning, match=r"fewer inputs than channels at 9 of 9 .* vision\.features \(1 for 64\)"):
        coded = qclip.quantize(model, mine, IMAGES[:1])
    rounded = qclip.quantize(model, Recipe("rtn", Treatment(4, 4, 32), towers=("vision",)))
    told = quantization(coded).provenance["svdquant"]
    assert {tuple(found["smoothing"]) for found in told.values()} == {(0.0, 0.0)}
    with torch.no_grad():
        want = encoders(model).encode_image(IMAGES[1:])
        near, far = (
            float(1 - torch.cosine_similarity(encoders(each).encode_image(IMAGES[1:]), want).mean())
            for each in (coded, rounded)
        )
    assert near < 1.1 * far
