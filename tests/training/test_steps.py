"""What a step changes, and by how much: rates, norms, penalties, the average, the logit scale."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import qclip
from qclip.training import Pairs, Settings, outcome, preparation
from qclip.training.objectives import Objective
from qclip.training.processes import Processes
from qclip.training.quantizer import fitted_scales
from qclip.training.step import Gradient
from qclip.training.trainer import Trainer
from tests.small import small_clip
from tests.training.world import SETTINGS, pairs


def run(recipe: str = "w4a4-lsq", **settings) -> Trainer:
    """A run whose steps are taken one by one."""
    model, chosen = small_clip(), Settings(**SETTINGS | {"objective": "contrastive+mse"} | settings)
    if chosen.logit_scale == "learned":
        model.logit_scale.data.fill_(math.log(100) + 1)
    data = Pairs.of(pairs(), qclip.encoders(model))
    student = preparation.prepare(model, recipe, data.samples()).eval()
    student.logit_scale.requires_grad_(chosen.logit_scale == "learned")
    found = Gradient(student, model, data, Objective(chosen.objective), chosen, Processes())
    return Trainer(student, found, chosen, Processes())


def test_rates_rise_and_fall_by_a_cosine() -> None:
    settings = Settings(steps=100, warmup=0.1)
    shares = [settings.share(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1, rel=1e-3) and shares[4] == pytest.approx(0.5, rel=0.01)
    for step in (9, 30, 50, 99):
        assert shares[step] == pytest.approx((1 + math.cos(math.pi * step / 100)) / 2)
    assert shares[9:] == sorted(shares[9:], reverse=True) and 0 < shares[99] < 1e-3
    assert Settings(steps=5, warmup=0).share(0) == 1


def test_each_group_has_its_rate_and_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, tuple[float, float]]] = []

    def look(optimizer: torch.optim.AdamW) -> None:
        found = {}
        for kind in ("weights", "scales"):
            groups = [group for group in optimizer.param_groups if group["kind"] == kind]
            grads = [p.grad.flatten() for group in groups for p in group["params"] if p.grad is not None]
            (rate,) = {group["lr"] for group in groups}
            found[kind] = (rate, float(torch.cat(grads).norm()))
        seen.append(found)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    plain = run(rate=0.5, scale_rate=0.25, clip=0.0, warmup=0.0)
    plain._step()
    clipped = run(rate=0.5, scale_rate=0.25, clip=1e-3, warmup=0.0)
    clipped._step()
    assert {kind: rate for kind, (rate, _) in seen[0].items()} == {"weights": 0.5, "scales": 0.25}
    for kind in ("weights", "scales"):
        assert seen[1][kind][1] == pytest.approx(1e-3, rel=1e-2) and seen[0][kind][1] > 2e-3
        assert clipped.log.last(f"norm_{kind}") == pytest.approx(seen[0][kind][1], rel=1e-4)  # as it was


def test_the_average_follows_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(ema=0.75, steps=6)
    wanted = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    for _ in range(3):
        trainer._step()
        wanted = {name: 0.75 * wanted[name] + 0.25 * p.detach() for name, p in trainer.parameters.items()}
    for name, average in trainer.average.items():
        torch.testing.assert_close(average, wanted[name], msg=name)
    assert any(not torch.equal(average, trainer.parameters[name]) for name, average in trainer.average.items())


@pytest.mark.parametrize("better", ["average", "last"])
def test_the_better_of_last_and_average_is_deployed(better: str) -> None:
    trainer = run(ema=0.5, steps=2)
    held = Pairs.of(pairs(8), qclip.encoders(trainer.student))
    judge = outcome.Judge(trainer.gradient, small_clip(), held, held)
    trainer.run()
    last = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    spoiled = trainer.average if better == "last" else trainer.parameters
    with torch.no_grad():
        for name, tensor in spoiled.items():
            if "log" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * tensor.std() * 0.5)
    average = {name: tensor.clone() for name, tensor in trainer.average.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "LEAST_KEPT", -math.inf)
        notes = judge.finish(trainer)
    assert notes["deployed"] == better
    found = notes["held_out"]
    assert (found["loss_of_average"] < found["loss"]) == (better == "average")
    wanted = average if better == "average" else last
    assert all(torch.equal(p, wanted[name]) for name, p in trainer.parameters.items())


def test_rounding_begins_late_with_scales_found_then(monkeypatch: pytest.MonkeyPatch) -> None:
    step, rounding = Trainer._step, []

    def look(trainer: Trainer) -> None:
        rounding.append({module.rounds for _, module in trainer.sites})
        for site, module in trainer.sites if trainer.done == 2 else ():
            wanted = fitted_scales(module.weight.detach(), module.plan)
            torch.testing.assert_close(module.rounding.scales(module.weight).detach(), wanted, msg=site.name)
        step(trainer)

    monkeypatch.setattr(Trainer, "_step", look)
    run("w8a8-lsq", start=0.5, steps=4).run()
    assert rounding == [{False}, {False}, {True}, {True}]


def test_a_learned_logit_scale_stays_below_100() -> None:
    trainer = run(logit_scale="learned", rate=1e-6)
    trainer._step()
    assert float(trainer.student.logit_scale.exp().detach()) == pytest.approx(100, rel=1e-5)


def recipe(name: str, **options) -> qclip.recipes.Recipe:
    found = qclip.recipes.get(name)
    return dataclasses.replace(found, trained=qclip.recipes.trained_by(found.trained[0], **options))


def gradients(recipe: qclip.recipes.Recipe | str, learning: bool = False, **settings) -> dict[str, Tensor]:
    trainer = run(recipe, **settings)
    trainer._learning(learning)
    trainer.gradient(1, 0.5)
    return {name: p.grad for name, p in trainer.parameters.items() if p.grad is not None}


def test_pact_draws_each_bound_together_once() -> None:
    """`decay alpha²`, whose gradient by log alpha is `2 decay alpha²`, and once where q, k and v share a bound."""
    decay = 3.0
    plain, drawn = (gradients(recipe("w8a8-pact", decay=each)) for each in (0.0, decay))
    student = run("w8a8-pact").student
    bounds, shared = {}, 0
    for name, module in student.named_modules(remove_duplicate=False):
        if isinstance(module, preparation.InputRounding) and hasattr(module, "learned"):
            shared += id(module) in {id(m) for m, _ in bounds.values()}
            bounds[name] = module, float(module.learned().detach()) * module.high
    assert shared
    looked = 0
    for name, gradient in drawn.items():
        module, bound = bounds.get(name.removesuffix(".learned.log"), (None, 0.0))
        more = 2 * decay * bound**2 if module is not None else 0.0
        torch.testing.assert_close(gradient - plain[name], torch.full_like(gradient, more), rtol=1e-3, atol=2e-3)
        looked += module is not None
    assert looked > 8


def test_blocks_that_run_again_draw_the_same_noise() -> None:
    wanted, found = (gradients("w4a4-noise", True, checkpointing=again) for again in (False, True))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=2e-5, msg=name)
    quiet = gradients("w4a4-noise", False)
    assert any(not torch.allclose(quiet[name], wanted[name], rtol=0.05, atol=1e-4) for name in wanted)


def test_no_weight_is_held_behind_a_step() -> None:
    trainer = run()
    trainer._step()
    sites = [module for _, module in trainer.sites]
    assert all(module.held is None for module in sites) and isinstance(sites[0], nn.Module)
