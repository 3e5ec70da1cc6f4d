"""Rotation: the float model stays what it is, inputs get small peaks, outliers of every kind are recovered from."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qclip
from benchmarks.outliers import inject
from qclip import calibration, models, ptq, recipes
from qclip.errors import RecipeError
from qclip.layers import Int8Linear, RandomHadamard, SimulatedLinear
from qclip.ptq.methods.rotation import UNREAD, Options, Rotation, balanced
from qclip.recipes import Recipe, Treatment, step
from tests.models import architectures
from tests.ptq.test_driver import family
from tests.small import IMAGES, TEXTS, small_clip


def embed(model, images=IMAGES):
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(model.tokenizer(TEXTS))


def error(model, reference, images=IMAGES):
    got, want = (embed(each, images)[0] for each in (model, reference))
    return float((1 - F.cosine_similarity(got, want)).mean())


class Folded(nn.Module):
    """What a site computes behind its transforms, in float."""

    def __init__(self, state):
        super().__init__()
        self.state, (self.weight, self.bias) = state, state.folded()

    def forward(self, x):
        return F.linear(self.state.input(x), self.weight, self.bias)

    def __rmatmul__(self, x):
        return self(x)


def rotated(model, data, seed=0):
    """The context of a recipe whose only method is rotation, after it has run."""
    towers, encoders, recipe = models.towers(model), models.encoders(model), recipes.get("w8a8-rotation")
    context = ptq.Context(model, recipe, towers, encoders, data, ptq.states(recipe, towers), {}, seed=seed)
    with torch.no_grad():
        Rotation(Options(outlying=1.5)).prepare(context)  # so that many channels are centred and scaled
    return context


@pytest.mark.filterwarnings("ignore:CoCa")
@pytest.mark.parametrize(
    "name",
    [
        "clip",
        "no_ln_pre_avg",
        "layer_scale",
        "own_attention_all_norms",
        "siglip_text",
        "coca",
        "vit_siglip",
        "convnext",
    ],
)
def test_the_float_model_stays_what_it_is(name):
    model = family(name)
    data = calibration.Samples(architectures.images(4), architectures.tokens(lengths=(5, 9, 7, 5)), {})
    encoders = models.encoders(model)
    with torch.no_grad():
        before = encoders.encode_image(data.images), encoders.encode_text(data.tokens)
        context = rotated(model, data)
        turned = 0
        for tower in context.towers.values():
            for site in tower:
                state = context.states.get(site.name)
                if state is not None and state.transforms:
                    tower.write(site, Folded(state))
                    turned += 1
        after = encoders.encode_image(data.images), encoders.encode_text(data.tokens)
    assert turned > 10 and context.notes["rotation"]["channels_scaled"] > 0
    assert context.notes["rotation"]["channels_centred"] > 0
    for got, want in zip(after, before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_no_channel_sticks_out_behind_it():
    """The largest of d normal numbers is sqrt(2 ln d) times their size; a mixture of all channels is nearly normal."""
    hard = inject(small_clip(), "SV", towers=("vision",))
    encoders = models.encoders(hard)
    context = rotated(hard, calibration.samples(IMAGES, encoders))
    peaks = {}

    def see(state):
        def hook(_, args):
            for what, x in (("before", args[0]), ("after", state.input(args[0]))):
                peaks.setdefault((state.site.kind, what), []).append(
                    (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()
                )

        return hook

    for site in context.towers["vision"]:
        if (state := context.states[site.name]).transforms:
            site.module.register_forward_pre_hook(see(state))
    embed(hard)
    for kind in ("q", "out", "fc1"):
        width = small_clip().visual.transformer.width
        assert max(peaks[kind, "after"]) < 1.3 * math.sqrt(2 * math.log(width)) < min(peaks[kind, "before"])


@pytest.mark.parametrize("kinds", ["S", "V", "O", "H"])
def test_outliers_are_recovered_from(kinds):
    model = small_clip()
    hard = inject(model, kinds, towers=("vision",))
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    clean = error(qclip.quantize(model, "w8a8-rotation", images), model)
    found = error(qclip.quantize(hard, "w8a8-rotation", images), model)
    broken = error(qclip.quantize(hard, "w8a8"), model)
    assert found < 2 * clean and broken > 4 * found


def test_a_factor_on_the_input_and_its_inverse_on_the_weight_cancel():
    x, w = torch.randn(500, 32), torch.randn(16, 32)
    x -= x.mean(0)
    factor, offset = torch.ones(32), torch.zeros(32)
    factor[3], factor[9], offset[5] = 64.0, 500.0, 40.0
    shifts, scales = [], []
    for by, beyond in ((factor, offset), (4 * factor, offset)):
        moments = calibration.observers.Moments()
        for part in (x * by + beyond).split(99):
            moments.update(part)
        shift, scale = balanced(moments, w / by, 4.0)
        shifts, scales = [*shifts, shift], [*scales, scale * by]
    assert (scales[0] != 1).nonzero().flatten().tolist() == [3, 9] and shifts[0].nonzero().flatten().tolist() == [5]
    torch.testing.assert_close(shifts[0][5], torch.tensor(40.0))
    torch.testing.assert_close(scales[0][[3, 9]], torch.ones(2), rtol=0.5, atol=0)  # about as the others
    torch.testing.assert_close(scales[1] / 4, scales[0])
    assert balanced(moments, w * 0, 4.0)[1].min() >= UNREAD


def test_kernels_compute_what_simulation_does_and_it_is_saved(tmp_path):
    done = qclip.quantize(small_clip(), "w8a8-rotation", IMAGES)
    assert qclip.coverage(done).share("simulated") == 0
    for tower in models.towers(done).values():
        for site in tower:
            if not isinstance(layer := site.module, Int8Linear):
                continue
            assert isinstance(layer.transforms[-1], RandomHadamard)
            x = torch.randn(5, layer.shape[1])
            twin = SimulatedLinear(
                layer.quantized.canonical(), layer.bias, layer.transforms, grid=layer.grid, activation_bits=8
            )
            torch.testing.assert_close(layer(x), twin(x), rtol=1e-4, atol=1e-5)
        core = getattr(*tower.blocks[0].attention)
        assert core.shares_input
    again = qclip.load(qclip.save(done, tmp_path / "a"))
    assert all(torch.equal(a, b) for a, b in zip(embed(again), embed(done), strict=True))
    qclip.dequantize_(done)
    assert error(done, small_clip()) < 1e-3  # the weights are in their own basis again


def test_signs_are_drawn_by_the_seed():
    one, same, other = (qclip.quantize(small_clip(), "w8a8-rotation", IMAGES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(embed(one)[0], embed(same)[0]) and not torch.equal(embed(one)[0], embed(other)[0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="outlying must be 1 or more"):
        step("rotation", outlying=0.5)
    only = Recipe(
        "x", Treatment(), exceptions=(("*.blocks.*", "float"), ("*.proj*", "float")), steps=(step("rotation"),)
    )
    with pytest.raises(RecipeError, match="quantizes none that it can turn"):
        qclip.quantize(small_clip(), only, IMAGES)
    with pytest.raises(RecipeError, match="calibration="):
        qclip.quantize(small_clip(), "w8a8-rotation")


def test_scales_of_few_bits_are_clipped_unless_that_is_not_wanted():
    model = small_clip()
    for bits, clip, wanted in ((4, True, "mse"), (2, True, "mse"), (4, False, "min-max"), (8, True, "min-max")):
        recipe = Recipe("x", Treatment(bits, 8), steps=(step("rotation", clip=clip),), towers=("vision",))
        plans = qclip.quantize(model, recipe, IMAGES).qclip_quantization.plans
        assert plans["vision.blocks.0.mlp.fc1"].weight_observer == wanted
        assert plans["vision.patch"].weight_observer == "min-max"


def test_it_comes_behind_transforms_that_are_there():
    """Smoothed first, then turned: the float product stays."""
    model = small_clip()
    recipe = Recipe("x", steps=(step("smoothquant", alpha=0.5), step("rotation")), towers=("vision",))
    small = qclip.quantize(model, recipe, IMAGES)
    layer = models.towers(small)["vision"].sites["vision.blocks.0.mlp.fc1"].module
    kinds = [type(each).__name__ for each in layer.transforms]
    assert kinds[0] == "Scale" and kinds[-1] == "RandomHadamard"
    assert error(small, model) < 2 * error(qclip.quantize(model, "w8a8"), model)


def test_medians_are_taken_of_channels_and_dead_ones_keep_it_finite():
    moments = calibration.observers.Moments()
    x = torch.randn(400, 16)
    x[:, 9:] = 0  # seven of sixteen are dead
    x[:, 3] *= 100
    x -= x.mean(0)
    moments.update(x)
    shift, scale = balanced(moments, torch.randn(8, 16), 4.0)
    assert scale.isfinite().all() and (scale != 1).nonzero().flatten().tolist() == [3] and not shift.any()
    moments = calibration.observers.Moments()
    x[:, 4:] = 0  # most are
    moments.update(x)
    shift, scale = balanced(moments, torch.randn(8, 16), 4.0)
    assert (scale == 1).all() and not shift.any()
