"""Post-training methods against their papers' properties, and what quantize refuses."""

import copy
import itertools
import math
import warnings

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import qclip
from qclip import calibration, models, ptq, recipes, rewrite
from qclip.errors import DataError, ModelError, NonFiniteError, RecipeError
from qclip.layers import Int8Linear, QuantizedAttention, QuantizedSite
from qclip.models.tower import Attention
from qkernels import smooth_scale
from tests.kernels.tiers import force
from tests.models import architectures
from tests.small import IMAGES, TEXTS, small_clip


@pytest.fixture
def model():
    return small_clip()


def embed(model, images=IMAGES):
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(model.tokenizer(TEXTS))


def cosine(a, b):
    return float(F.cosine_similarity(a.float(), b.float()).mean())


@pytest.mark.parametrize(
    ("recipe", "least"),
    [
        ("w8a8", 0.9995),
        ("w8a8-static", 0.999),
        ("w8a8-smoothquant", 0.9995),
        ("w4a8", 0.9),
        ("w4a8-mixed", 0.9),
        ("w4a16", 0.9),
        ("w6a8", 0.995),
        ("w4a4", 0.8),
    ],
)
def test_every_preset_is_near_float(model, recipe, least):
    before = embed(model)
    small = qclip.quantize(model, recipe, calibration=IMAGES)
    after = embed(small)
    for got, want in zip(after, before, strict=True):
        assert cosine(got, want) > least and not torch.equal(got, want)
    assert type(small) is type(model) or isinstance(small, type(model))
    assert all(torch.equal(a, b) for a, b in zip(embed(model), before, strict=True))  # the float model is untouched


def test_fewer_bits_cost_more(model):
    want = embed(model)[0]
    errors = [1 - cosine(embed(qclip.quantize(model, r))[0], want) for r in ("w8a8", "w6a8", "w4a8", "w3a8", "w2a8")]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 100


def test_in_place_is_the_same_object_and_comes_out_again(model):
    mine = copy.deepcopy(model)
    assert qclip.quantize_(mine, "w8a8") is mine
    block = mine.visual.transformer.resblocks[0]
    assert any(isinstance(m, QuantizedAttention) for m in block.modules())
    small = embed(mine)
    qclip.dequantize_(mine)
    assert not any(isinstance(m, QuantizedSite | QuantizedAttention) for m in mine.modules())
    assert rewrite.quantization(mine) is None
    assert cosine(embed(mine)[0], small[0]) > 0.9995
    qclip.quantize_(mine, "w8a8")  # and in again
    assert cosine(embed(mine)[0], small[0]) > 0.9995


def test_exceptions_and_towers(model):
    recipe = recipes.Recipe(
        "mine", towers=("vision",), exceptions=(("vision.blocks.0.attn.k", "float"), ("vision.blocks.1.mlp.*", "w4a8"))
    )
    small = qclip.quantize(model, recipe)
    towers = models.towers(small)
    states = {row.site: (row.state, row.weight_bits) for row in small.qclip_quantization.coverage.rows}
    assert states["vision.blocks.0.attn.k"] == ("float", None)
    assert states["vision.blocks.1.mlp.fc1"] == ("real", 4)
    assert all(state == "float" for name, (state, _) in states.items() if name.startswith("text."))
    assert isinstance(towers["vision"].sites["vision.blocks.0.attn.k"].module, nn.Linear)
    assert cosine(embed(small)[0], embed(model)[0]) > 0.9


def test_coverage_counts_everything(model):
    small = qclip.quantize(model, "w8a8")
    coverage = small.qclip_quantization.coverage
    shares = [coverage.share(state) for state in ("real", "simulated", "float")]
    assert math.isclose(sum(shares), 1) and shares[0] > 0.8 and shares[1] == 0
    assert qclip.coverage(small) == coverage
    assert qclip.quantize(model, "w4a4").qclip_quantization.coverage.share("simulated") > 0.8
    # Parameters, counted against the model itself.
    total = sum(row.parameters for row in qclip.coverage(model).rows)
    known = sum(p.numel() for n, p in model.named_parameters() if n != "logit_scale")
    assert total == known == sum(row.parameters for row in coverage.rows)
    # One site by hand: 16 patches + class token, 64 x 256 and back.
    fc1 = next(row for row in coverage.rows if row.site == "vision.blocks.0.mlp.fc1")
    assert fc1.macs == 17 * 64 * 256 and fc1.parameters == 64 * 256 + 256


def test_coverage_names_the_kernel_for_few_bits(model, monkeypatch):
    force(monkeypatch, "avx2")
    for bits, kernel in {4: ", 8 pair sums", 5: ", 4 pair sums", 6: ", 2 pair sums", 7: ", 1 pair sum", 8: ""}.items():
        small = qclip.quantize(model, recipes.Recipe("mine", recipes.Treatment(bits, 8)))
        rows = [row for row in qclip.coverage(small).rows if row.kind not in ("embedding", "patch")]
        assert {row.backend for row in rows if row.state == "real"} == {f"cpu:avx2{kernel}"}
        force(monkeypatch, "scalar")
        assert {row.backend for row in qclip.coverage(small).rows if row.state == "real"} <= {"cpu:scalar", "torch"}
        force(monkeypatch, "avx2")


def test_coverage_counts_convolutions_that_are_no_sites():
    """A ConvNeXt of 48 px: stem 12 x 12, then 6, 3 and 1 positions a side; its depthwise convolutions stay float."""
    widths, sides = (8, 16, 24, 32), (12, 6, 3, 1)
    trunk = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=widths, num_classes=0)
    model = architectures.with_trunk(trunk, "linear")
    model.visual.image_size = (48, 48)
    small = qclip.quantize(model, "w8a8")
    coverage = small.qclip_quantization.coverage
    found = [row for row in coverage.rows if row.kind == "convolution"]
    depths = [(c, s) for c, s, n in zip(widths, sides, (1, 1, 2, 1), strict=True) for _ in range(n)]
    assert [(row.macs, row.parameters) for row in found] == [(49 * c * s * s, 49 * c + c) for c, s in depths]
    assert all(row.state == "float" for row in found)
    assert coverage == qclip.coverage(small) and coverage.share("real") < 1
    assert sum(row.parameters for row in coverage.rows) == sum(
        p.numel() for name, p in model.named_parameters() if name != "logit_scale"
    )


def test_counting_a_convolutional_stem_changes_no_batch_norm():
    model = architectures.with_trunk(architectures.TIMM["vit_conv_stem"](), width=10).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    found = [row.macs for row in qclip.coverage(model).rows if row.kind == "convolution"]
    assert found == [8 * 8 * 6 * 3 * 16, 4 * 4 * 6 * 6 * 4, 2 * 2 * 24 * 6 * 4]
    assert norms and all(norm.training and norm.num_batches_tracked == 0 for norm in norms)


# -- SmoothQuant ---------------------------------------------------------------------------------------------------


def with_outliers(model, factor=64.0, channels=(3, 40)):
    """Outlier type S (scale): a few inputs of q, k, v and fc1 `factor` times larger, their weight columns smaller."""
    model = copy.deepcopy(model)
    index = list(channels)
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            for norm, weights in ((block.ln_1, [block.attn.in_proj_weight]), (block.ln_2, [block.mlp.c_fc.weight])):
                norm.weight[index] *= factor
                norm.bias[index] *= factor
                for weight in weights:
                    weight[:, index] /= factor
    return model


def test_outliers_change_nothing_in_float_and_break_round_to_nearest(model):
    hard = with_outliers(model)
    assert torch.allclose(embed(hard)[0], embed(model)[0], atol=1e-5)
    clean = 1 - cosine(embed(qclip.quantize(model, "w8a8"))[0], embed(model)[0])
    broken = 1 - cosine(embed(qclip.quantize(hard, "w8a8"))[0], embed(model)[0])
    assert broken > 20 * clean


def test_smoothquant_undoes_scale_outliers(model):
    """s_j absorbs a scale: the smoothed model with outliers is the smoothed clean model, up to rounding of pow()."""
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    want = embed(model, images)[0]
    clean = embed(qclip.quantize(model, "w8a8-smoothquant", calibration=images), images)[0]
    hard = embed(qclip.quantize(with_outliers(model), "w8a8-smoothquant", calibration=images), images)[0]
    assert 1 - cosine(hard, want) < 1.5 * (1 - cosine(clean, want)) + 1e-6


def test_smoothquant_balances_maxima():
    x, w = torch.rand(32) * 10 + 0.1, torch.rand(32) + 0.1
    s = smooth_scale(x, w, 0.5)
    assert torch.allclose(x / s, w * s, rtol=1e-5)


def test_smoothquant_search_never_chooses_worse_than_off(model):
    small = qclip.quantize(with_outliers(model), "w8a8-smoothquant", calibration=IMAGES)
    chosen = small.qclip_quantization.provenance["smoothquant_alpha"]
    assert any(alpha is not None for key, alpha in chosen.items() if key.startswith("vision"))
    assert set(chosen) >= {site.shared for site in models.towers(small)["vision"].blocks[0].sites.values()}


def test_smoothquant_with_static_scales_searches_with_static_scales(model, monkeypatch):
    tried = []

    def noting(state):
        tried.append(state.input_scale)
        return ptq.build(state)

    monkeypatch.setattr(ptq.driver, "build", noting)
    small = qclip.quantize(with_outliers(model), "w8a8-static-smoothquant", calibration=IMAGES)
    assert tried and all(scale is not None for scale in tried)
    assert cosine(embed(small)[0], embed(model)[0]) > 0.999
    tried.clear()
    qclip.quantize(model, "w8a8-smoothquant", calibration=IMAGES)
    assert tried and all(scale is None for scale in tried)


def test_smoothquant_leaves_what_follows_gelu_alone_where_scales_are_static(model):
    """Units that hardly fire in calibration fire elsewhere: made large, a static scale would clip them."""
    for recipe, smoothed in (("w8a8-smoothquant", True), ("w8a8-static-smoothquant", False)):
        small = qclip.quantize(with_outliers(model), recipe, calibration=IMAGES)
        chosen = small.qclip_quantization.provenance["smoothquant_alpha"]
        assert any(key.endswith("mlp.hidden") for key in chosen) is smoothed
        fc2 = models.towers(small)["vision"].sites["vision.blocks.0.mlp.fc2"].module
        assert smoothed or not fc2.transforms


# -- static scales -------------------------------------------------------------------------------------------------


def test_static_scales_are_stored_and_shared(model):
    small = qclip.quantize(model, "w8a8-static", calibration=IMAGES)
    towers = models.towers(small)
    block = towers["vision"].blocks[0]
    scales = {kind: float(site.module.input_scale) for kind, site in block.sites.items()}
    assert scales["q"] == scales["k"] == scales["v"] and len({scales[k] for k in ("q", "out", "fc1", "fc2")}) == 4
    core = getattr(*block.mlp)
    assert core.codes_between  # fc1 writes codes for fc2
    patch = towers["vision"].sites["vision.patch"].module
    assert patch.site.input_scale is None  # pixels stay dynamic per patch row


# -- calibration ---------------------------------------------------------------------------------------------------


def test_text_statistics_see_no_position_behind_eot(model):
    encoders = models.encoders(model)
    data = calibration.samples(IMAGES, encoders)
    for tokens in data.token_batches(encoders):
        assert len(tokens.argmax(-1).unique()) == 1
    assert sum(len(t) for t in data.token_batches(encoders)) == len(data.tokens)


def coca():
    """CoCa, whose text tower runs to the end of the padding, with a wild value where no caption reaches."""
    torch.manual_seed(0)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CoCa(
        embed_dim=32,
        vision_cfg={
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_queries": 4,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        text_cfg=text | {"embed_cls": True, "output_tokens": True},
        multimodal_cfg=text,
    ).eval()
    with torch.no_grad():
        model.text.cls_emb.normal_()
        model.text.text_projection.normal_(std=0.1)
        model.text.positional_embedding[15, 5] = 1e4
    return models.attach(model, {"image_size": 32}, {"kind": "clip-bpe", "context_length": 16}, source="coca")


@pytest.mark.filterwarnings("ignore:CoCa")
def test_padding_that_coca_computes_enters_no_statistic(monkeypatch):
    monkeypatch.setattr("qclip.calibration.captions.CAPTIONS", TEXTS)
    model = coca()
    towers, encoders = models.towers(model), models.encoders(model)
    data = calibration.samples(IMAGES, encoders)
    text = {name: site for name, site in towers["text"].sites.items() if site.kind != "embedding"}
    read = encoders.text_positions(data.tokens)
    assert read.shape == (3, 17) and read[:, -1].all() and read[2].sum() < read[1].sum() < 17
    seen = {}

    def keep(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0])

    handles = [site.module.register_forward_pre_hook(keep(name)) for name, site in text.items()]
    with torch.no_grad():
        encoders.encode_text(data.tokens)
    for handle in handles:
        handle.remove()
    maxima = calibration.channel_maxima(encoders, towers, data, list(text.values()))
    for name, site in text.items():
        (x,) = seen[name]
        assert torch.allclose(maxima[site.shared], (x[read] if x.ndim == 3 else x).flatten(0, -2).abs().amax(0))
    (x,) = seen["text.blocks.0.attn.q"]
    assert x[..., 5].abs().amax() > 1.5 * maxima["text.blocks.0.attn.in"][5]  # what padding would have done


def test_channel_maxima_against_a_hook(model):
    mine = copy.deepcopy(model)
    towers = models.towers(mine)
    encoders = models.encoders(mine)
    data = calibration.samples(IMAGES, encoders)
    site = towers["vision"].sites["vision.blocks.1.mlp.fc2"]
    seen = []
    handle = site.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        mine.encode_image(IMAGES)
    handle.remove()
    got = calibration.channel_maxima(encoders, towers, data, [site])[site.shared]
    assert torch.equal(got, torch.cat(seen).flatten(0, -2).abs().amax(0))


@pytest.mark.parametrize("kind", ["tensor", "loader", "tuples", "set"])
def test_calibration_takes_what_users_have(model, kind):
    data = {
        "tensor": IMAGES,
        "loader": [IMAGES[:2], IMAGES[2:]],
        "tuples": [(IMAGES, torch.zeros(6))],
        "set": "scenes:dev?samples=8",
    }[kind]
    small = qclip.quantize(model, "w8a8-static", calibration=data)
    facts = small.qclip_quantization.provenance["calibration"]
    assert facts["images"] == (8 if kind == "set" else 6) and len(facts["sha256"]) == 64


def test_same_calibration_same_model(model):
    a, b = (qclip.quantize(model, "w8a8-static", calibration=IMAGES).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


# -- refusals ------------------------------------------------------------------------------------------------------


def poisoned(model, where):
    model = copy.deepcopy(model)
    with torch.no_grad():
        dict(model.named_parameters())[where].view(-1)[:6].fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("where", "site"),
    [
        ("visual.transformer.resblocks.1.mlp.c_fc.weight", "vision.blocks.1.mlp.fc1"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "vision.blocks.0.attn.q"),
        ("transformer.resblocks.0.mlp.c_proj.bias", "text.blocks.0.mlp.fc2"),
        ("token_embedding.weight", "text.embedding"),
    ],
)
def test_nan_in_weights_names_the_layer(model, where, site):
    with pytest.raises(NonFiniteError, match=site):
        qclip.quantize(poisoned(model, where), "w8a8")


@pytest.mark.parametrize("where", ["visual.transformer.resblocks.1.ln_1.bias", "positional_embedding", "logit_scale"])
def test_nan_outside_the_sites_names_the_parameter(model, where):
    for recipe in ("w8a8", "w8a8-static"):
        with pytest.raises(NonFiniteError, match=where):
            qclip.quantize(poisoned(model, where), recipe, calibration=IMAGES)


def test_a_weight_that_no_scale_can_hold_names_the_site(model):
    huge = copy.deepcopy(model)
    with torch.no_grad():
        huge.visual.transformer.resblocks[1].mlp.c_fc.weight.fill_(1e7)
    with pytest.raises(NonFiniteError, match="vision.blocks.1.mlp.fc1: scales of an Int4Weight are float16"):
        qclip.quantize(huge, "w4a8")


@pytest.mark.parametrize("recipe", ["w8a8-smoothquant", "w8a8-static"])
def test_infinity_that_arises_in_calibration_names_the_site(model, recipe):
    huge = copy.deepcopy(model)
    with torch.no_grad():
        huge.visual.transformer.resblocks[1].ln_1.weight.fill_(3e38)  # finite, but what it makes is not
    with pytest.raises(NonFiniteError, match="the input of vision.blocks.1.attn"):
        qclip.quantize(huge, recipe, calibration=IMAGES)


def test_calibration_images_that_repeat_each_other_are_told(model):
    encoders = models.encoders(model)
    with pytest.warns(UserWarning, match="18 of 20 calibration images repeat another one, so statistics are of 2"):
        calibration.samples(IMAGES[[0, 1] * 10], encoders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration.samples(IMAGES[[0, 1, 2, 0]], encoders)


def test_nan_calibration_images_are_named(model):
    images = IMAGES.clone()
    images[4, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match="image 4"):
        qclip.quantize(model, "w8a8-static", calibration=images)


def test_a_tower_that_calibration_cannot_reach_gets_no_scale_made_up(model, monkeypatch):
    model.tokenizer = None
    monkeypatch.setattr(models.FAMILIES.get("open_clip"), "tokenizer_config", lambda _: {"kind": "unknown"})
    with pytest.raises(DataError, match="text.*saw nothing during calibration.*model.tokenizer"):
        qclip.quantize(model, "w8a8-static", calibration=IMAGES)


def test_unreadable_calibration_images_are_named_and_counted(model, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 of 3 calibration images cannot be read.*broken.png"):
        small = qclip.quantize(model, "w8a8-static", calibration=f"folder:{tmp_path}")
    said = small.qclip_quantization.provenance["calibration"]
    assert said["images"] == 2 and said["unreadable"] == 1


def test_strict_stops_at_an_unreadable_calibration_image(model, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken.png"):
        qclip.quantize(model, "w8a8-static", calibration=f"folder:{tmp_path}", strict=True)


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("w8a8", ["rounding"]),
        ("w8a8-static-smoothquant", ["calibration", "SmoothQuant search", "calibration", "rounding"]),
    ],
)
def test_progress_of_every_stage_runs_from_0_to_its_end(model, recipe, stages):
    told = []
    qclip.quantize(model, recipe, calibration=IMAGES, progress=lambda *row: told.append(row))
    assert [what for what, done, _ in told if done == 0] == stages
    assert [what for what, done, total in told if done == total] == stages
    for (what, done, total), (then, more, whole) in itertools.pairwise(told):
        assert more == 0 if then != what else (more > done or more == 0) and whole == total


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda m: qclip.quantize(m, "w8a8-smoothquant"), RecipeError, "calibration="),
        (lambda m: qclip.quantize(m, "w8a8-static", calibration=torch.zeros(0, 3, 32, 32)), DataError, "non-empty"),
        (lambda m: qclip.quantize(m, "w8a8-static", calibration=[]), DataError, "no batch"),
        (lambda m: qclip.quantize(m, "w8a8-static", calibration=7), DataError, "not int"),
        (lambda m: qclip.quantize(m, "w8a8-static", calibration=[1, 2]), DataError, "gives int"),
        (lambda m: qclip.quantize(m, "w8a8-static", calibration=(IMAGES * 50).byte()), DataError, "floating point"),
        (
            lambda m: qclip.quantize(m, "w8a8-static", calibration=torch.zeros(2, 3, 48, 48)),
            DataError,
            r"\(3, 48, 48\), but the model takes \(3, 32, 32\)",
        ),
        (lambda m: qclip.quantize(m, "w8a8-static", calibration=torch.zeros(2, 1, 32, 32)), DataError, "takes"),
        (
            lambda m: qclip.quantize(m, "w8a8-static", calibration=[IMAGES, IMAGES[..., :8]]),
            DataError,
            r"\(3, 32, 32\) and of shape \(3, 32, 8\)",
        ),
        (lambda m: qclip.quantize(qclip.quantize(m, "w8a8"), "w4a8"), ModelError, "already"),
        (lambda m: qclip.quantize(nn.Linear(2, 2), "w8a8"), ModelError, "Linear"),
    ],
)
def test_refusals(model, call, error, word):
    with pytest.raises(error, match=word):
        call(model)


def test_a_refused_model_still_computes_the_same(model):
    mine = copy.deepcopy(model)
    before = embed(mine)
    with pytest.raises(RecipeError):
        qclip.quantize_(mine, "w8a8-static")
    with pytest.raises(DataError):
        qclip.quantize_(mine, "w8a8-static", calibration=torch.full((2, 3, 32, 32), float("nan")))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(embed(mine), before, strict=True))
    core = getattr(*models.towers(mine)["vision"].blocks[0].attention)
    assert type(core) is Attention and not isinstance(core.q, Int8Linear)


def test_an_exception_that_fits_no_site_is_told(model):
    for pattern, told in (("vision.nothing.*", True), ("vision.*.fc1", False)):
        recipe = recipes.Recipe("mine", exceptions=((pattern, None),))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            qclip.quantize(model, recipe)
        assert any(f"the exception {pattern!r} fits no site" in str(each.message) for each in seen) is told
