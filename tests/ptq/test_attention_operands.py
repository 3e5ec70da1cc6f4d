"""Quantized operands of the products inside attention: the codes, what calibration sees, coverage, artifacts."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip import description, models, recipes
from qclip.calibration.attention import SoftmaxHistogram
from qclip.errors import ArtifactError, NonFiniteError, RecipeError
from qclip.layers import operands
from qclip.layers.operands import AttentionOperands, probabilities, quantize_softmax
from qclip.models.tower import Attention
from qclip.recipes import FLOAT, AttentionTreatment, Recipe, Treatment
from tests.small import IMAGES, TEXTS, small_clip

FLOATS = Treatment(8, FLOAT)  # 8-bit weights of float inputs: next to nothing besides attention


def embed(model):
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


def error(model, other):
    return [float((a - b).norm() / b.norm()) for a, b in zip(embed(model), embed(other), strict=True)]


def softmax_samples(n=400, keys=50, sharpness=3.0):
    return (sharpness * torch.randn(n, keys, generator=torch.Generator().manual_seed(0))).softmax(1)


# -- codes of probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("kind", "scale"), [("uniform", 0.003), ("log-sqrt2", 0.7), ("twin", 2.0**-4)])
def test_codes_are_as_many_as_bits_say_and_rise(kind, scale, bits):
    p = torch.linspace(0, 1, 200_001)
    y = quantize_softmax(p, kind, bits, scale)
    assert len(y.unique()) <= 2**bits + (kind == "log-sqrt2")  # its 0 stands for all codes beyond the last
    assert (y.diff() >= 0).all() and y[0] == 0
    assert torch.allclose(quantize_softmax(y, kind, bits, scale), y, atol=1e-7)


def test_powers_of_a_root_are_near_by_a_fourth_root():
    p = torch.logspace(-3.5, 0, 5000)
    y = quantize_softmax(p, "log-sqrt2", 8, 1.0)
    assert ((y / p).log2().abs() <= 0.25 + 1e-5).all()  # 18.9 % of the value
    assert ((y / p - 1).abs() > 0.15).any()
    wanted = torch.tensor([1.0, 2**-0.5, 0.5, 2**-1.5, 0.25])
    assert torch.allclose(quantize_softmax(wanted, "log-sqrt2", 4, 1.0), wanted)
    assert quantize_softmax(torch.tensor([2.0**-7.5, 2.0**-8]), "log-sqrt2", 4, 1.0).tolist() == pytest.approx(
        [2.0**-7.5, 0.0]
    )


def test_twin_ranges_do_not_add_up():
    """The published code adds what is clamped into either range: 2^-m too much above it."""
    p, m, steps = torch.linspace(0, 1, 999), 2.0**-5, 7
    y = quantize_softmax(p, "twin", 4, m)
    assert ((y - p).abs() <= torch.where(p < m, m / steps / 2, 0.5 / steps) + 1e-7).all()
    brute = torch.cat([torch.arange(steps + 1) * m / steps, torch.arange(steps + 1) / steps])
    assert torch.allclose((y - p).abs(), (p[:, None] - brute).abs().amin(1), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_probabilities_are_the_best_of_those_tried(bits):
    p, histogram = softmax_samples(), SoftmaxHistogram()
    for part in p.split(37):
        histogram.update(part)
    whole = SoftmaxHistogram()
    whole.update(p)
    assert torch.equal(whole.counts, histogram.counts) and whole.zeros == histogram.zeros
    least = {}
    for kind in recipes.SOFTMAX:

        def wrong(scale, kind=kind):
            return float((quantize_softmax(p, kind, bits, scale) - p).square().sum())

        tried = [wrong(scale) for scale in histogram.candidates(kind, bits)]
        least[kind] = wrong(histogram.scale(kind, bits))
        assert least[kind] <= min(tried) * 1.02
    assert least["twin"] <= 1.05 * least["uniform"] if bits == 4 else True
    for percentile in (50, 99.9):
        below, above = (np.percentile(p.numpy(), percentile, method=m) for m in ("lower", "higher"))
        assert 0.998 * below <= histogram.percentile(percentile) <= 1.002 * above


def test_two_ranges_are_better_than_one_on_probabilities():
    for seed in range(3):
        p = (4 * torch.randn(300, 65, generator=torch.Generator().manual_seed(seed))).softmax(1)
        histogram = SoftmaxHistogram()
        histogram.update(p)
        off = {k: (quantize_softmax(p, k, 6, histogram.scale(k, 6)) - p).square().sum() for k in ("twin", "uniform")}
        assert off["twin"] < off["uniform"]


# -- inside a core ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", ["no", "bool", "float", "causal"])
def test_probabilities_are_those_of_torch(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    if masked == "causal":
        k, v = k[:, :5], v[:, :5]
    mask = {"bool": torch.rand(5, 7) > 0.3, "float": torch.randn(2, 1, 5, 7)}.get(masked)
    want = nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, is_causal=masked == "causal", scale=0.3
    )
    got = torch.einsum("bhqk,bkhd->bhqd", probabilities(q, k, mask, masked == "causal", 0.3), v)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("changed", "qkvp")
def test_each_operand_is_rounded_with_its_own_scale(changed):
    """By hand, head by head; all others so finely that only this one counts."""
    torch.manual_seed(0)
    x = dict(zip("qkv", torch.randn(3, 2, 5, 3, 8), strict=True))
    fine, coarse = torch.full((3,), 0.03), torch.tensor([0.5, 0.8, 1.1])
    scales = {name: coarse if name == changed else fine for name in "qkv"}
    layer = AttentionOperands(
        8, "uniform", tuple(scales.values()), None, torch.tensor(0.2 if changed == "p" else 1 / 255)
    )
    got = layer(x["q"], x["k"], x["v"], None, False, None)
    for head in range(3):
        q, k, v = ((x[n][:, :, head] / scales[n][head]).round().clamp(-127, 127) * scales[n][head] for n in "qkv")
        p = (q @ k.mT / 8**0.5).softmax(-1)
        p = (p / layer.softmax_scale).round().clamp(max=255) * layer.softmax_scale
        assert torch.allclose(got[:, :, head], p @ v, atol=1e-5)
    exact = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x.values())).transpose(1, 2)
    assert (got - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("softmax", recipes.SOFTMAX)
@pytest.mark.parametrize(("scale", "grid"), [("tensor", "sym"), ("head", "asym")])
def test_operands_are_simulated_counted_and_saved(softmax, scale, grid, tmp_path):
    model = small_clip()
    recipe = Recipe("x", FLOATS, attention=AttentionTreatment(8, softmax, scale, grid))
    small = qclip.quantize(model, recipe, IMAGES)
    plain = qclip.quantize(model, Recipe("x", FLOATS))
    rows = {row.site: row for row in qclip.coverage(small).rows}
    row = rows["vision.blocks.0.attn.scores"]
    assert (row.state, row.activation_bits, row.weight_bits, row.backend) == ("simulated", 8, None, "torch")
    assert {r.state for r in qclip.coverage(plain).rows if r.kind == "attention"} == {"float"}
    far = error(small, plain)
    assert all(1e-6 < each < (0.3 if softmax == "log-sqrt2" else 0.1) for each in far)
    core = getattr(*models.towers(small)["vision"].blocks[0].attention)
    assert len(core.operands.q_scale) == (core.heads if scale == "head" else 1)
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    for got, want in zip(embed(again), embed(small), strict=True):
        assert torch.equal(got, want)
    for _ in range(3):  # recorded, then replayed
        assert torch.equal(embed(small)[0], embed(again)[0])
    assert again.qclip_quantization.recipe == recipe == Recipe.from_json(recipe.to_json())


def test_fewer_bits_are_worse_and_heads_of_their_own_better():
    model = small_clip()
    with torch.no_grad():  # heads of different size
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight[:32] *= 4
            block.attn.in_proj_weight[64:96] *= 4
    far = {}
    for bits, scale in ((8, "tensor"), (4, "tensor"), (4, "head")):
        recipe = Recipe("x", FLOATS, attention=AttentionTreatment(bits, scale=scale), towers=("vision",))
        far[bits, scale] = error(qclip.quantize(model, recipe, IMAGES), model)[0]
    assert far[8, "tensor"] < 0.3 * far[4, "tensor"] and far[4, "head"] < 0.9 * far[4, "tensor"]


def test_without_rounding_nothing_changes(monkeypatch):
    """The path itself, masks and causality included, is the float model's."""
    monkeypatch.setattr(operands, "quantize_dequantize", lambda x, *_: x.float())
    monkeypatch.setattr(operands, "quantize_softmax", lambda p, *_: p)
    model = small_clip()
    recipe = Recipe("x", FLOATS, exceptions=(("*", "float"), ("*.projection", "w8a16"), ("*.scores", "w8a16")))
    bare = qclip.quantize(model, recipe)
    with_operands = qclip.quantize(
        model, Recipe("x", FLOATS, recipe.exceptions, attention=AttentionTreatment()), IMAGES
    )
    assert max(error(with_operands, bare)) < 1e-5


def test_exceptions_and_towers_are_for_attention_too():
    exceptions = (("vision.blocks.0.*", "float"),)
    recipe = Recipe("x", FLOATS, exceptions, towers=("vision",), attention=AttentionTreatment())
    small = qclip.quantize(small_clip(), recipe, IMAGES)
    states = {row.site: row.state for row in qclip.coverage(small).rows if row.kind == "attention"}
    assert states == {
        "vision.blocks.0.attn.scores": "float",
        "vision.blocks.1.attn.scores": "simulated",
        "text.blocks.0.attn.scores": "float",
        "text.blocks.1.attn.scores": "float",
    }
    assert all(m.operands is None for m in qclip.rewrite.dequantize_(small).modules() if isinstance(m, Attention))


# -- refusals --------------------------------------------------------------------------------------------------------


def test_attention_is_data_of_a_recipe():
    assert Recipe("x").hash == Recipe("y", attention=None).hash and "attention" not in Recipe("x").to_dict()
    recipe = Recipe("x", attention=AttentionTreatment(4, "twin"))
    assert recipe.needs_data and recipe.hash not in (Recipe("x").hash, Recipe("x", attention=AttentionTreatment()).hash)
    assert recipes.SOFTMAX == operands.SOFTMAX
    for fields, word in (
        ({"bits": 16}, "use 2 to 8, or leave it out"),
        ({"softmax": "log2"}, "unknown softmax 'log2'.*'log-sqrt2'"),
        ({"scale": "token"}, "unknown scale"),
        ({"bits": "8"}, "'bits' has the wrong type"),
        ({"bit": 8}, "unknown field 'bit'"),
    ):
        with pytest.raises(RecipeError, match=word):
            Recipe.from_dict({"name": "x", "attention": fields})


def test_what_is_not_finite_is_told_by_name():
    model = small_clip()
    with torch.no_grad():
        model.visual.transformer.resblocks[1].attn.in_proj_weight[:64] *= 1e38
    recipe = Recipe(
        "x", exceptions=(("*", "float"), ("*.scores", "w8a8")), attention=AttentionTreatment(), towers=("vision",)
    )
    with pytest.raises(NonFiniteError, match=r"vision\.blocks\.1\.attn is NaN or Inf"):
        qclip.quantize(model, recipe, IMAGES)
    assert all(getattr(m, "operands", None) is None for m in model.modules())


def test_files_that_contradict_are_refused(tmp_path):
    small = qclip.quantize(small_clip(), Recipe("x", attention=AttentionTreatment(scale="head")), IMAGES)
    path = qclip.save(small, tmp_path / "a")
    whole = json.loads((path / "qclip.json").read_text())
    for change, word in (
        ({"vision.blocks.0": {**whole["attention"]["vision.blocks.0"], "heads": 7}}, "does not fit its architecture"),
        ({"vision.blocks.9": whole["attention"]["vision.blocks.0"]}, "does not fit its architecture"),
        ({"vision.blocks.0": {**whole["attention"]["vision.blocks.0"], "softmax": "log3"}}, "must be one of"),
    ):
        content = whole | {"attention": whole["attention"] | change}
        content["description_sha256"] = qclip.artifact.description_hash(content)
        (path / "qclip.json").write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match=word):
            qclip.load(path)
    assert description.CONTENT["attention"]
    layer = AttentionOperands.from_facts({"bits": 8, "softmax": "twin", "heads": None, "zeros": True})
    for attribute, tensor, word in (
        ("softmax_scale", torch.tensor(2.0), "lies within 0 and 1"),
        ("q_scale", torch.tensor([0.0]), "positive"),
        ("v_zero", torch.tensor([300], dtype=torch.int32), "zero point"),
    ):
        with pytest.raises(ArtifactError, match=word):
            layer.check_tensor(attribute, tensor, "it")
