"""The engine and the spectra on open_clip models and image sets as users have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qclip import models as qmodels
from qclip import quantize
from qclip.reliability import evaluate
from qclip.results import Results
from qclip.spectral import verdict, weight_spectrum

pytestmark = pytest.mark.slow  # the shipped models over their data

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
IMAGES = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    torch.manual_seed(0)
    model = qmodels.create_from_config({"family": "open_clip", "class": "CLIP", "config": CONFIG})
    return qmodels.attach(model, IMAGES, {"kind": "clip-bpe", "context_length": 16}, "random").eval()


@pytest.fixture(scope="module")
def compared(clip: nn.Module) -> dict[str, nn.Module]:
    return {"float": clip, "w8a8": quantize(clip, "w8a8"), "w4a4": quantize(clip, "w4a4")}


def test_scenes_with_quantized_models(compared: dict[str, nn.Module], tmp_path: Path) -> None:
    def run() -> Results:
        ood = ["scenes:near-ood?samples=24", "scenes:far-ood?samples=24"]
        shift, dev = "scenes:spurious-test?samples=24", "scenes:dev?samples=24"
        return evaluate(compared, "scenes:test?samples=48", ood, shift, dev, cache=tmp_path)

    results = run()
    where = {"set": "scenes-test", "subset": "all", "reference": "float"}
    close, coarse = (results.value(model=name, metric="cosine_mean", **where) for name in ("w8a8", "w4a4"))
    assert 0.999 < close <= 1 and 0.5 < coarse < close
    assert results.value(model="w8a8", metric="agreement", **where) > 0.7
    kinds = {(row["set"], row["role"]) for row in results.where(metric="auroc", reference="").rows}
    assert {("scenes-near-ood", "ood-near"), ("scenes-far-ood", "ood-far")} < kinds
    groups = [
        results.row(model="w4a4", set="scenes-spurious-test", axis="group", at=g, metric="top1")
        for g in ("aligned", "conflict")
    ]
    assert sum(row["n"] for row in groups) == 24
    assert results.value(model="w4a4", set="scenes-spurious-test", metric="group_gap") is not None
    for metric in ("coverage_macs", "coverage_params"):
        shares = {
            state: results.value(model="w4a4", metric=metric, axis="state", at=state)
            for state in ("real", "simulated", "float")
        }
        assert sum(shares.values()) == pytest.approx(1) and shares["simulated"] > 0.05
    assert results.value(model="w8a8", metric="model_bytes") < 0.3 * results.value(model="float", metric="model_bytes")
    row = results.row(model="w8a8", set="scenes-test", subset="all", metric="nll")
    assert (row["recipe"], row["bits"], row["method"]) == ("w8a8", "8/8", "rtn")
    assert run().rows == results.rows  # from the cache, times included
    path = results.to_json(tmp_path / "results.json")
    assert Results.from_json(path).rows == results.rows


def test_spectra_of_quantized_models(compared: dict[str, nn.Module]) -> None:
    others = {name: model for name, model in compared.items() if name != "float"}
    results = weight_spectrum(compared["float"], others, sites=["vision.blocks.0.*", "text.blocks.0.*"])
    assert len(results.where(model="float", metric="effective_rank", set="vision.blocks.0.mlp.fc1")) == 1
    for band in ("ranks 0-8", "ranks 8-64"):
        fine, coarse = (
            results.value(model=m, metric="sqnr", set="vision", axis="band", subset=band) for m in ("w8a8", "w4a4")
        )
        assert 30 < fine < 60 and coarse == pytest.approx(fine - 20 * np.log10(127 / 7), abs=2.5)  # 17 times the step
    starts = {sentence.split(":")[0] for sentence in verdict(results)}
    assert starts == {
        "w8a8, vision tower, ranks 8-64",
        "w4a4, vision tower, ranks 8-64",
        "w8a8, text tower, ranks 8-64",
        "w4a4, text tower, ranks 8-64",
    }


def test_photographs(shared_data: Path, compared: dict[str, nn.Module], tmp_path: Path) -> None:
    def named(file: str, samples: int) -> str:
        return f"parquet:{shared_data}/{file}.parquet?samples={samples}"

    models = {name: compared[name] for name in ("float", "w8a8")}
    ood = {"near": named("imagenet_near_64", 20), "far": [named("mnist_test", 20), named("dtd10_64", 20)]}
    shift, dev = named("cinic10_shift_32", 20), named("cifar10_dev", 20)
    results = evaluate(models, named("cifar10_test", 40), ood, shift, dev, cache=False)
    assert results.row(model="w8a8", set="cifar10_test", subset="all", metric="top1")["n"] == 40
    assert results.row(model="w8a8", set="cinic10_shift_32", subset="all", metric="ece")["n"] == 20
    sets = {"imagenet_near_64", "mnist_test", "dtd10_64", "mean of 3 OOD sets"}
    assert set(results.where(metric="auroc").unique("set")) == sets
    assert results.value(model="float", set="mnist_test", score="energy", metric="auroc") is not None
