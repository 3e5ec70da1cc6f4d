"""Injected outliers: the float model stays what it is, the naive quantized one does not."""

import pytest
import torch

import qclip
from benchmarks.outliers import _norms, inject, scale
from qclip import calibration, models
from tests.small import IMAGES, TEXTS, small_clip


def embed(model, images=IMAGES):
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(model.tokenizer(TEXTS))


@pytest.mark.parametrize("kinds", ["S", "V", "O", "H", "SVOH"])
def test_in_float_nothing_changes_and_no_tower_is_left_out(kinds):
    model = small_clip()
    plain = {site.name: site.module.weight.clone() for tower in models.towers(model).values() for site in tower}
    hard = inject(model, kinds, offset=20.0)
    for got, want in zip(embed(hard), embed(model), strict=True):
        assert torch.equal(got, want) if kinds in ("S", "V") else torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    for tower in models.towers(hard).values():
        for block in tower.blocks:
            changed = {kind for kind, s in block.sites.items() if not same(s.module.weight, plain[s.name])}
            wanted = {"S": {"q", "k", "v", "fc1"}, "V": {"v", "out"}, "O": set(), "H": {"fc1", "fc2"}}
            assert changed == set().union(*(wanted[kind] for kind in kinds))


def same(a, b):
    return a.shape == b.shape and torch.equal(a, b)


def test_a_reader_that_is_forgotten_shows():
    model = small_clip()
    hard = inject(model, "V", factor=1.0)  # a copy
    norm, readers = _norms(models.towers(hard)["vision"].blocks[0])[0]
    with torch.no_grad():
        scale(norm, readers[:1] + readers[2:], torch.tensor([3]), 64.0)
    assert not torch.allclose(embed(hard)[0], embed(model)[0], atol=1e-3)


def test_inputs_have_outlying_channels():
    for kinds, kind in (("S", "q"), ("O", "fc1"), ("V", "out"), ("H", "fc2")):
        hard = inject(small_clip(), kinds)
        towers, encoders = models.towers(hard), models.encoders(hard)
        site = towers["vision"].blocks[1].sites[kind]
        maxima = calibration.channel_maxima(encoders, towers, calibration.samples(IMAGES, encoders), [site])[
            site.shared
        ]
        assert maxima.max() > 10 * maxima.median()


@pytest.mark.slow
def test_a_static_scale_per_tensor_loses_five_points():
    model = qclip.load_model("scenes-clean")
    hard = inject(model, "S", towers=("vision",))
    found = qclip.evaluate(
        {"float": model, "hard": hard, "small": qclip.quantize(hard, "w8a8-static", "scenes:dev?samples=64")},
        "scenes:dev?samples=400",
        measurements=["clean"],
    )
    top1 = {row["model"]: row["value"] for row in found if row["metric"] == "top1" and not row["reference"]}
    assert top1["hard"] == pytest.approx(top1["float"], abs=0.003) and top1["small"] < top1["float"] - 0.05


@pytest.mark.parametrize(
    ("given", "word"),
    [({"kinds": "X"}, "some of SVOH"), ({"kinds": ""}, "some of"), ({"kinds": "S", "factor": 0.0}, "positive")],
)
def test_nonsense_is_refused(given, word):
    with pytest.raises(ValueError, match=word):
        inject(small_clip(), **given)
