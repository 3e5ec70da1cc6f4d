"""RepQ-ViT: the float model stays what it is, codes are those of channel-wise quantization, offsets cost nothing."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip import models, ptq, recipes, rewrite
from qclip.errors import NonFiniteError, RecipeError
from qclip.layers import Int4Linear, Int8Linear, Scale, Shift, SimulatedLinear
from qclip.layers.activations import code_range
from qclip.ptq.methods.repq_vit import PERCENTILES, channel_quantizers
from qclip.recipes import AttentionTreatment, Recipe, Treatment, step
from tests.small import IMAGES, TEXTS, small_clip

REPQ = (step("repq-vit"),)


def embed(model):
    with torch.no_grad():
        return model.encode_image(IMAGES)


def distance(model, other):
    return float((1 - nn.functional.cosine_similarity(embed(model), embed(other))).mean())


def lumpy(offset=0.0, scale=1.0):
    """Norms some of whose channels differ, by `offset` standard deviations or a factor; their readers undo that, so the
    float model is the same."""
    model = small_clip()
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            for norm, weight, bias in (
                (block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias),
                (block.ln_2, block.mlp.c_fc.weight, block.mlp.c_fc.bias),
            ):
                norm.weight[3:5] *= scale
                norm.bias[3:5] *= scale
                weight[:, 3:5] /= scale
                norm.bias[3:5] += offset
                bias -= weight[:, 3:5].sum(1) * offset
    return model


def decided(model, recipe, images=IMAGES):
    """The context after the recipe's methods."""
    towers, encoders = models.towers(model), models.encoders(model)
    data = qclip.calibration.samples(images, encoders)
    context = ptq.Context(model, recipe, towers, encoders, data, ptq.driver.states(recipe, towers), {})
    ptq.decide(context)
    return context


def test_channels_have_the_best_of_three_percentiles_each():
    x = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)) ** 3 * torch.logspace(-3, 2, 5) + 7
    for bits in (4, 8):
        scales, zeros = channel_quantizers(x, bits)
        least, most = code_range(bits, "asym")
        for j in range(5):
            column, tried = x[:, j].double().numpy(), []
            for percentile in PERCENTILES:
                low, high = np.percentile(column, [100 - percentile, percentile])
                scale = (high - low) / (most - least)
                zero = least - np.round(low / scale)
                codes = np.clip(np.round(column / scale) + zero, least, most)
                tried.append((float(((codes - zero) * scale - column) ** 2 @ np.ones(3000)), scale, zero))
            _, scale, zero = min(tried)
            assert float(scales[j]) == pytest.approx(scale) and float(zeros[j]) == pytest.approx(zero, abs=1)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_channelwise_quantization_and_the_float_product_stays(bits):
    recipe = Recipe("x", Treatment(8, bits), steps=REPQ, towers=("vision",))
    model = lumpy(offset=30, scale=20)
    context = decided(model, recipe)
    tower = context.towers["vision"]
    rows = []
    state = context.states["vision.blocks.0.mlp.fc1"]
    hook = state.site.module.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    embed(model)
    hook.remove()
    x = torch.cat(rows)
    shift, scale = state.transforms
    assert isinstance(shift, Shift) and isinstance(scale, Scale)
    weight, bias = state.folded()
    with torch.no_grad():
        want = state.source(x)
        got = state.input(x) @ weight.T + bias
        assert (got - want).norm() < 1e-5 * want.norm()  # the offset of 30 deviations included
    # Per tensor behind the transforms, or per channel before them: the same codes.
    least, most = code_range(bits, "asym")
    step_, zero = state.input_scale.double(), state.input_zero.double()
    assert zero == zero.round() and least <= zero <= most
    mine = ((state.input(x).double() / step_).round() + zero).clamp(least, most)
    scales = step_ / scale.factor.double()
    zeros = zero - shift.shift.double() / scales
    assert (zeros - zeros.round()).abs().max() < 1e-2
    per_channel = ((x.double() / scales).round() + zeros.round()).clamp(least, most)
    differ = mine != per_channel
    ties = ((x.double() / scales) % 1 - 0.5).abs() < 1e-3
    assert not (differ & ~ties).any() and len(mine.unique()) > most - least - 3
    decoded = (mine - zero) * step_ @ weight.double().T + bias.double()
    wide = (per_channel - zeros.round()) * scales @ state.float_weight().double().T + state.source.bias.double()
    assert (decoded - wide).norm() < 1e-3 * wide.norm()
    assert tower.sites["vision.blocks.0.attn.q"].module is context.states["vision.blocks.0.attn.q"].source


def test_it_runs_on_kernels_which_give_what_is_simulated(tmp_path):
    model = lumpy(offset=10, scale=8)
    for name in ("w8a8-repq-vit", "w4a8-repq-vit"):
        small = qclip.quantize(model, name, IMAGES)
        assert qclip.coverage(small).share("simulated") == 0
        block = models.towers(small)["vision"].blocks[0]
        assert getattr(*block.attention).shares_input and isinstance(block.sites["q"].module.before[0], Shift)
        simulated = copy.deepcopy(small)
        for site in (site for tower in models.towers(simulated).values() for site in tower):
            layer = site.module
            if isinstance(layer, Int8Linear | Int4Linear):
                parts = (layer.quantized.canonical(), layer.bias, layer.transforms, layer.input_scale, layer.input_zero)
                setattr(site.owner, site.attribute, SimulatedLinear(*parts, grid=layer.grid, activation_bits=8))
        got, want = embed(small), embed(simulated)
        assert (got - want).norm() < 3e-3 * want.norm()  # codes near ties
        for _ in range(3):  # recorded, then replayed
            assert torch.equal(embed(small), got)
        again = qclip.load(qclip.save(small, tmp_path / name))
        assert torch.equal(embed(again), got)
        with torch.no_grad():
            text = model.encode_text(model.tokenizer(TEXTS))
            near = nn.functional.cosine_similarity(small.encode_text(model.tokenizer(TEXTS)), text).min()
        assert near > (0.98 if name == "w8a8-repq-vit" else 0.85)


def test_the_norm_takes_the_shift_in_one_pass():
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(64), torch.randn(9, 64)
    nn.init.normal_(norm.bias)
    site = models.Site("vision.x", "fc1", "norm", "vision.x.in", nn.Module())
    plan = Treatment(8, 8, static=True, activation_grid="asym")
    transforms = [Shift(torch.randn(64)), Scale(torch.rand(64) + 0.5)]
    state = ptq.SiteState(site, nn.Linear(64, 32), plan, transforms, torch.tensor(0.03), torch.tensor(5))
    layer = ptq.build(state)
    rewrite.pack(layer)
    with torch.no_grad():
        fused, scale = layer.quantize(x, norm)
        plain, _ = layer.quantize(norm(x))
    assert (fused - plain).abs().max() <= 1 and (fused != plain).float().mean() < 0.01 and scale is not None
    assert (fused.float().mean() - plain.float().mean()).abs() < 0.01


def test_outlier_channels_cost_nothing():
    """Offsets of a few channels go into z, factors into r."""
    plain, repq = Recipe("s", Treatment(static=True), towers=("vision",)), Recipe("x", steps=REPQ, towers=("vision",))
    clean = distance(qclip.quantize(small_clip(), repq, IMAGES), small_clip())
    for kind in ({"offset": 50.0}, {"scale": 64.0}):
        model = lumpy(**kind)
        broken = distance(qclip.quantize(model, plain, IMAGES), model)
        kept = distance(qclip.quantize(model, repq, IMAGES), model)
        assert kept < 0.1 * broken and kept < 3 * clean, kind


def test_dead_and_constant_channels_keep_their_weights():
    model = small_clip()
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            block.ln_1.weight[:3] = 0
            block.ln_1.bias[:3] = torch.tensor([0.0, 5.0, -1000.0])
            block.ln_2.weight.zero_()  # nothing varies at all
    small = qclip.quantize(model, Recipe("x", steps=REPQ, towers=("vision",)), IMAGES)
    assert embed(small).isfinite().all() and distance(small, model) < 1e-3
    fc1 = models.towers(small)["vision"].blocks[0].sites["fc1"].module
    assert not fc1.before and fc1.input_scale.isfinite()


def test_with_attention_everything_is_quantized(tmp_path):
    attention = AttentionTreatment(8, "log-sqrt2", grid="asym", observer="percentile")
    model = small_clip()
    small = qclip.quantize(model, Recipe("x", steps=REPQ, attention=attention), IMAGES)
    states = {row.state for row in qclip.coverage(small).rows if row.kind == "attention"}
    assert states == {"simulated"}
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    assert torch.equal(embed(again), embed(small))


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (
            "w4a16-repq-vit",
            r"repq-vit changes how inputs are quantized, and that of vision\.\S+ is float \(a16\); use 2",
        ),
        (
            Recipe("x", Treatment(static=True, activation_observer="ema"), steps=REPQ),
            "finds the input range of .* itself; drop activation_observer",
        ),
    ],
)
def test_what_does_not_fit_is_named(recipe, word):
    with pytest.raises(RecipeError, match=word):
        qclip.quantize(small_clip(), recipe, IMAGES)
    with pytest.raises(RecipeError, match="samples must be 1 or more"):
        step("repq-vit", samples=0)
    with pytest.raises(RecipeError, match="needs data"):
        qclip.quantize(small_clip(), "w8a8-repq-vit")
    assert recipes.get("w8a8-repq-vit").method == "repq-vit"


def test_inputs_that_are_not_finite_are_told_by_name():
    model = small_clip()
    with torch.no_grad():
        model.visual.transformer.resblocks[1].mlp.c_fc.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match=r"vision\.\S+ is NaN or Inf"):
        qclip.quantize(model, "w8a8-repq-vit", IMAGES)


def test_a_projection_gets_one_range_of_all_samples():
    """It reads one row of a sample; what its few rows do not show must not be clipped channel by channel."""
    few = Recipe("x", steps=(step("repq-vit", samples=2),), towers=("vision",))
    context = decided(small_clip(), few, torch.cat([IMAGES[:2], 3 * IMAGES]))
    state = context.states["vision.projection"]
    (found,) = context.static_quantizers([state.site]).values()
    assert not state.transforms and torch.equal(state.input_scale, found[0]) and torch.equal(state.input_zero, found[1])
    assert state.plan.activation_observer == "mse" and context.states["vision.blocks.1.mlp.fc1"].transforms


def test_another_rule_for_weights_is_a_contradiction():
    recipe = Recipe("x", Treatment(weight_observer="mse"), steps=REPQ)
    with pytest.raises(RecipeError, match="finds the weight scales of .* by percentiles; drop weight_observer"):
        qclip.quantize(small_clip(), recipe, IMAGES)
    qclip.quantize(small_clip(), "w4a8-rotation+repq-vit", IMAGES)  # what a step before has made of the plan
