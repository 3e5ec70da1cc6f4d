"""Quantizers that round nothing in the end: float continuation and noise, which controls of training are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qclip
from qclip import recipes, rewrite
from qclip.recipes import QUANTIZERS, Treatment
from qclip.training import Pairs, Settings, prepare
from qclip.training.objectives import Features, Objective
from qclip.training.preparation import trained_sites
from qclip.training.processes import Processes
from qclip.training.step import Gradient
from tests.small import IMAGES, small_clip
from tests.training.test_trainer import KilledError, killed_at, log, same, state
from tests.training.world import SETTINGS, pairs

CONTRASTIVE = SETTINGS | {"objective": "contrastive"}


def gradient(recipe: str, **settings) -> tuple[nn.Module, Gradient, Pairs]:
    model = small_clip()
    data = Pairs.of(pairs(), qclip.encoders(model))
    student = prepare(model, recipe, data.samples())
    chosen = Settings(**CONTRASTIVE | settings)
    return student, Gradient(student, model, data, Objective("contrastive"), chosen, Processes()), data


def test_the_gradient_of_float_continuation_is_that_of_the_float_model() -> None:
    student, step, data = gradient("float-continued")
    loss = step(2, 0.0)["loss"]
    model = small_clip()
    rows, captions = data.batch(2, 8, 0)
    image = nn.functional.normalize(model.encode_image(data.pixels(rows)), dim=-1)
    text = nn.functional.normalize(model.encode_text(data.tokens[captions]), dim=-1)
    scale = model.logit_scale.exp()
    wanted = Objective("contrastive")(
        Features(image, text, scale, image, text, scale, torch.from_numpy(captions), None, None)
    )[0]
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted.backward()
    sites = {site.name: module for site, module in trained_sites(student)}
    found = {
        "vision.patch": model.visual.conv1.weight.grad.flatten(1),
        "vision.blocks.1.mlp.fc1": model.visual.transformer.resblocks[1].mlp.c_fc.weight.grad,
        "text.blocks.0.attn.k": model.transformer.resblocks[0].attn.in_proj_weight.grad[32:64],
    }
    for name, expected in found.items():
        torch.testing.assert_close(sites[name].weight.grad, expected, rtol=1e-3, atol=1e-6)


def test_float_continuation_is_a_float_model_that_is_saved_loaded_and_quantized(tmp_path: Path) -> None:
    model = small_clip()
    lookup = model.token_embedding.weight.detach().clone()
    trained = qclip.train(model, "float-continued", pairs(), **CONTRASTIVE)
    assert qclip.coverage(trained).share("float") == 1
    assert not rewrite.is_quantized(trained)
    done = rewrite.quantization(trained)
    assert done is not None and done.recipe.bits == "float" and done.provenance["training"]["settings"]["steps"] == 6
    assert torch.equal(trained.token_embedding.weight, lookup)
    with torch.no_grad():
        moved = 1 - torch.cosine_similarity(trained.encode_image(IMAGES), model.encode_image(IMAGES)).mean()
    assert moved > 1e-4
    again = qclip.load(qclip.save(trained, tmp_path / "float"))
    with torch.no_grad():
        assert torch.equal(again.encode_image(IMAGES), trained.encode_image(IMAGES))
        assert torch.equal(
            again.encode_text(again.tokenizer(["a dog"])), trained.encode_text(model.tokenizer(["a dog"]))
        )
    small = qclip.quantize(again, "w8a8")
    assert qclip.coverage(small).share("real") > 0.8
    assert rewrite.is_quantized(small) and small.qclip_quantization.recipe.name == "w8a8"
    further = qclip.train(again, "w8a8-ste", pairs(), **CONTRASTIVE | {"steps": 1})
    assert rewrite.is_quantized(further)


@pytest.mark.parametrize("recipe", ["float-continued", "w4a8-noise", "w4a8-lsq"])
def test_no_steps_find_scales_alone(recipe: str) -> None:
    model = small_clip()
    found = qclip.train(model, recipe, pairs(), **CONTRASTIVE | {"steps": 0, "logit_scale": "tuned"})
    assert "logit_scale" in found.qclip_quantization.provenance["training"]
    before = dict(model.named_parameters())
    for name in ("positional_embedding", "ln_final.weight"):
        assert torch.equal(found.get_parameter(name), before[name])
    with torch.no_grad():
        off = 1 - torch.cosine_similarity(found.encode_image(IMAGES), model.encode_image(IMAGES)).mean()
    assert (off < 1e-6) == (recipe != "w4a8-lsq")


def noise(name: str, treatment: Treatment, weight: Tensor):
    kind = QUANTIZERS.get(name)
    rounding = kind(kind.options()).weight(weight, treatment)
    rounding.start(weight)
    return rounding


@pytest.mark.parametrize("group", [None, 32])
def test_noise_of_weights_is_as_wide_as_a_step(group: int | None) -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 40)[:, None]
    treatment = Treatment(4, 8, group=group, weight_observer="mse")
    rounding = noise("noise", treatment, weight)
    steps = treatment.grid.fit(weight, "mse")[0].abs().repeat_interleave(group or 100, 1)[:, :100]
    draws = torch.stack([(rounding(weight) - weight) / steps for _ in range(200)])
    assert draws.abs().max() <= 0.5 + 1e-4
    assert float(draws.square().mean()) == pytest.approx(1 / 12, rel=0.01)
    torch.testing.assert_close(draws.square().mean((0, 2)), torch.full((40,), 1 / 12), rtol=0.06, atol=0)
    assert not torch.equal(draws[0], draws[1])
    rounding.begin(5)
    assert torch.equal(rounding(weight), rounding(weight))
    first = rounding(weight)
    rounding.begin(6)
    assert not torch.equal(rounding(weight), first)
    assert torch.equal(rounding.eval()(weight), weight)


def test_measured_noise_has_the_mean_square_of_the_rounding_error() -> None:
    weight = torch.randn(6, 4000, generator=torch.Generator().manual_seed(1))
    treatment = Treatment(2, 8, weight_observer="mse")  # which clips
    rounding = noise("noise-measured", treatment, weight)
    error = (qclip.ptq.base.quantize_weight(weight, treatment).dequantize() - weight).square().mean(1)
    torch.testing.assert_close((rounding(weight) - weight).square().mean(1), error, rtol=0.08, atol=0)
    plain = noise("noise", treatment, weight)
    assert float((plain(weight) - weight).square().mean()) < 0.8 * float(error.mean())  # it knows of no clipping


def test_measured_noise_of_inputs_is_that_of_the_calibration_samples() -> None:
    model = small_clip()
    recipe = recipes.get("w8a3-noise-measured")
    student = prepare(model, recipe, IMAGES)
    site, module = next((s, m) for s, m in trained_sites(student) if s.name == "vision.blocks.0.mlp.fc2")
    plain = prepare(model, "w8a3-noise", IMAGES)
    step = dict((s.name, m) for s, m in trained_sites(plain))[site.name].input_rounding.width * 2
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        student.eval().encode_image(IMAGES)
    handle.remove()
    _, zero = module.input_rounding.grid
    error = qclip.layers.activations.quantize_dequantize(seen[0], 3, step, zero, "asym") - seen[0]
    assert float(module.input_rounding.width) ** 2 / 3 == pytest.approx(float(error.square().mean()), rel=1e-3)


def test_noise_is_shared_by_q_k_and_v_and_none_is_left_in_the_deployed_model() -> None:
    student, _, _ = gradient("w4a8-noise")
    sites = {site.name: module for site, module in trained_sites(student)}
    q, k = sites["vision.blocks.0.attn.q"], sites["vision.blocks.0.attn.k"]
    assert q.input_rounding is k.input_rounding
    student.eval()
    with torch.no_grad():
        wanted = student.encode_image(IMAGES)
        torch.testing.assert_close(wanted, small_clip().encode_image(IMAGES), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(qclip.convert(student, IMAGES).encode_image(IMAGES), wanted, rtol=1e-4, atol=1e-5)


def test_each_step_of_a_run_draws_its_own_noise_and_draws_it_again() -> None:
    student, step, _ = gradient("w4a8-noise", rate=0.0)
    for rounding in (*step.weights, *step.of_inputs):
        rounding.train()
    found = [step(number, 0.0)["loss"] for number in (0, 0, 2, 0)]
    assert found[0] == found[1] == found[3]
    for rounding in (*step.weights, *step.of_inputs):
        rounding.eval()
    assert step(0, 0.0)["loss"] != found[0]


@pytest.mark.parametrize("recipe", ["w4a4-noise", "w4a4-rotation+noise-measured"])
def test_a_run_with_noise_goes_on_to_the_bit(recipe: str, tmp_path: Path) -> None:
    more = CONTRASTIVE | {"start": 0.34, "micro": 3}
    whole = qclip.train(small_clip(), recipe, pairs(), tmp_path / "a", **more)
    with pytest.raises(KilledError):
        qclip.train(small_clip(), recipe, pairs(), tmp_path / "b", progress=killed_at(5), **more)
    torch.manual_seed(9)
    again = qclip.train(small_clip(), recipe, pairs(), tmp_path / "b", **more)
    same(state(again), state(whole))
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert qclip.coverage(again).share("float") == 1
    other = qclip.train(small_clip(), "float-continued", pairs(), **more)
    assert not torch.equal(other.encode_image(IMAGES), again.encode_image(IMAGES))
