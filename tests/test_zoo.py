"""Names of models: what is unknown is told apart, and what is near it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import qclip
from qclip import errors, zoo
from qclip.errors import InputError, ModelError
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "hint"), [("scene-clean", "'scenes-clean'"), ("vit-b32", "'ViT-B-32'"), ("photo:tag", "'photos'")]
)
def test_an_unknown_name_lists_the_nearest_of_all_kinds(name, hint):
    with pytest.raises(ModelError, match=f"unknown model '{name}'; did you mean [^?]*{hint}") as caught:
        qclip.load_model(name)
    assert str(caught.value).count("did you mean") == 1


def test_a_name_without_neighbours_lists_a_few(tmp_path):
    with pytest.raises(ModelError, match="known: photos, .* and [0-9]+ more") as caught:
        qclip.load_model("???")
    assert len(str(caught.value)) < 1000
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="no model 'ViT-B-33'; did you mean 'ViT-B-32'"):
        qclip.load_model(tmp_path / "x.safetensors", arch="ViT-B-33")


def test_nearest_ignores_case():
    assert errors.nearest("vit-b-32", ["RN50", "ViT-B-32"]) == "did you mean 'ViT-B-32'?"
    assert errors.nearest("x", ["aa", "bb"]) == "known: aa, bb"


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_bad_input(device):
    with pytest.raises(InputError, match=f"device '{device}' cannot be used here") as caught:
        qclip.load_model("scenes-clean", device)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    state = {"visual.proj": torch.eye(3), "token_embedding.weight": torch.ones(2, 4)}
    path = tmp_path / "new"
    zoo.write_checkpoint(path, state, {"name": "one"}, "one\n")
    names = ["README.md", "card.json", "model.safetensors"]
    before = {name: (path / name).read_bytes() for name in names}
    with monkeypatch.context() as patch:
        patch.setattr(zoo.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            zoo.write_checkpoint(path, {"visual.proj": torch.ones(3, 3)}, {"name": "two"}, "two\n")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before and list(tmp_path.iterdir()) == [path]
    zoo.write_checkpoint(path, state, {"name": "two"}, "two\n")
    assert (path / "README.md").read_text() == "two\n" and sorted(p.name for p in path.iterdir()) == names


def test_every_shipped_checkpoint_has_a_card():
    for name, card in zoo.checkpoints().items():
        assert {"data", "architecture", "preprocess", "tokenizer"} <= set(card), name


@pytest.mark.parametrize("name", zoo.checkpoints())
def test_a_card_says_what_was_measured_and_the_sign_of_the_gap_on_a_dev_split(name):
    spec = importlib.util.spec_from_file_location("pack_checkpoint", ROOT / "dev" / "pack_checkpoint.py")
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    card = zoo.checkpoints()[name]
    assert (ROOT / "qclip" / "checkpoints" / name / "README.md").read_text() == pack.readme(card)
    (gap,) = (r for r in card["measured"] if r["metric"] == "signed_gap" and r["set"].endswith("dev"))
    sign = "overconfident" if name == "scenes-clean" else "underconfident"
    assert f"{sign} on {gap['set']} ({100 * gap['value']:+.1f} points)" in pack.readme(card)
    assert gap["low"] > 0 or gap["high"] < 0


def packing(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "dev" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", zoo.variants())
def test_a_variant_is_loaded_and_its_card_says_how_it_was_trained_and_what_was_measured(name):
    card, (base, _, variant) = zoo.variants()[name], name.partition(":")
    folder = ROOT / "qclip" / "checkpoints" / base / variant
    assert (folder / "README.md").read_text() == packing("pack_variant").readme(card)
    assert card["name"] == name and card["base"] == base and card["training"]["settings"]["steps"] > 0
    assert {"top1", "ece", "nll"} <= {row["metric"] for row in card["measured"]}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3 << 20
    model = qclip.load_model(name)
    assert model.qclip_quantization.recipe.name == card["recipe"]
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).isfinite().all()
