"""A trained model stored as its difference to its base: it comes back, is small, and nothing else is taken for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qclip
from qclip import artifact, changes, errors, variants, zoo
from qclip.errors import ArtifactError, ModelError
from tests.hostile.artifacts import read
from tests.small import IMAGES, TEXTS, small_clip
from tests.training.world import SETTINGS, pairs

CHECKPOINTS = Path(zoo.__file__).parent / "checkpoints"
CARD = {"name": "small:x", "data": "noise"}


@pytest.fixture(scope="module", params=["w4a8-lsq", "float-continued"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp("variant")
    trained = qclip.train(small_clip(), request.param, pairs(), **SETTINGS | {"objective": "contrastive"})
    qclip.save(trained, folder / "artifact")
    variants.save(folder / "artifact", small_clip(), folder / "variant", CARD, "# x\n")
    return request.param, folder / "artifact", folder / "variant"


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


def test_it_comes_back(saved: tuple[str, Path, Path]) -> None:
    recipe, whole, path = saved
    model, again = qclip.load(whole), variants.load(path, small_clip())
    for found, wanted in zip(outputs(again), outputs(model), strict=True):
        if recipe == "float-continued":  # changes are rounded to 8 bits, of which a step is small
            moved = (outputs(small_clip())[0] - outputs(model)[0]).norm()
            assert (outputs(again)[0] - outputs(model)[0]).norm() < 0.02 * moved
        else:
            assert torch.equal(found, wanted)
    assert again.qclip_quantization.recipe.name == recipe and again.qclip_source == "small"
    assert again.qclip_quantization.provenance == model.qclip_quantization.provenance
    small, large = (path / variants.FILE).stat().st_size, (whole / artifact.TENSORS).stat().st_size
    assert small < 0.4 * large and not any("token_embedding" in name for name in load_file(path / variants.FILE))


#: A quantized model has few float weights that change.
of_float = pytest.mark.parametrize("saved", ["float-continued"], indirect=True)


@of_float
def test_a_float_model_in_few_bytes(saved: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, whole, path = saved
    trained, base, found = outputs(qclip.load(whole)), outputs(small_clip()), {}
    for size in (6_000, 30_000, 1_000_000):
        again = variants.load(
            variants.save(whole, small_clip(), tmp_path / str(size), CARD, "# x\n", size), small_clip()
        )
        tensors = load_file(tmp_path / str(size) / variants.FILE)
        taken = sum(t.nbytes for name, t in tensors.items() if name.endswith((".factors", ".steps")))
        moved = (trained[0] - base[0]).norm()
        found[size] = float((outputs(again)[0] - trained[0]).norm() / moved)
        assert taken <= size and (taken > 0.8 * size or size == 1_000_000)
    assert found[1_000_000] < found[30_000] < 0.03 < found[6_000] < 0.1, found  # of the way that training went
    assert len((tmp_path / "30000" / variants.FILE).read_bytes()) < 0.6 * (path / variants.FILE).stat().st_size


def test_factors_are_those_of_the_change() -> None:
    left, right = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (90, 70))
    change = left @ right.T  # of rank 3
    (packed, steps) = changes.factored({"x": change}, 10**6).values()
    again = changes._product(packed, steps, change.shape)
    assert float((again - change).norm() / change.norm()) < 0.1 and steps.shape == (2, 70)
    (packed, steps) = changes.factored({"x": change}, 3 * (160 * 5 // 8 + 8)).values()
    assert steps.shape == (2, 3) and packed.numel() == 160 * 3 * 5 / 8
    assert float((changes._product(packed, steps, change.shape) - change).norm() / change.norm()) < 0.1
    picture = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (packed, steps) = changes.factored({"x": picture}, 10**6).values()
    assert float((changes._product(packed, steps, picture.shape) - picture).norm() / picture.norm()) < 0.1


@of_float
def test_factors_that_are_none_are_refused(saved: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, whole, _ = saved
    path = variants.save(whole, small_clip(), tmp_path / "small", CARD, "# x\n", 30_000)
    name = next(name for name in load_file(path / variants.FILE) if name.endswith(".factors"))
    steps = name.replace(".factors", ".steps")

    def of(**tensors: Tensor):
        return lambda held: held.update({{"packed": name, "steps": steps}[key]: t for key, t in tensors.items()})

    refused(changed(path, tmp_path / "short", of(packed=torch.zeros(5, dtype=torch.uint8))), "holds no two factors")
    refused(changed(path, tmp_path / "one", of(steps=torch.zeros(1, 4))), "not two for each of its ranks")
    refused(changed(path, tmp_path / "many", of(steps=torch.zeros(2, 10**6))), "not two for each of its ranks")
    refused(changed(path, tmp_path / "nan", of(steps=torch.full((2, 1), torch.nan))), "holds NaN or Inf")
    refused(changed(path, tmp_path / "type", of(packed=torch.zeros(5, dtype=torch.int8))), "is no change of a tensor")
    refused(changed(path, tmp_path / "none", lambda held: held.pop(steps)), "has no steps")


def changed(path: Path, folder: Path, change) -> Path:
    """A copy with other tensors and every checksum made right again."""
    shutil.copytree(path, folder)
    tensors = load_file(folder / variants.FILE)
    change(tensors)
    save_file(tensors, folder / variants.FILE)
    content = read(folder)
    content["tensors_bytes"] = (folder / variants.FILE).stat().st_size
    content["tensors_sha256"] = artifact.file_hash(folder / variants.FILE)
    content["description_sha256"] = artifact.description_hash(content)
    (folder / "qclip.json").write_text(json.dumps(content))
    return folder


def refused(path: Path, told: str, base: nn.Module | None = None) -> None:
    with pytest.raises(ArtifactError, match=told) as caught:
        variants.load(path, base or small_clip())
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(saved: tuple[str, Path, Path]) -> None:
    _, whole, path = saved
    refused(path, "difference to another model", small_clip(1))
    with pytest.raises(ModelError, match="was not trained from"):
        variants.save(whole, small_clip(1), path.parent / "other", CARD, "")
    assert not (path.parent / "other").exists()


def test_what_is_damaged_or_made_up_is_refused(saved: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, path = saved

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["ln_final.weight"] = torch.full_like(tensors["ln_final.weight"], torch.nan)

    refused(changed(path, tmp_path / "nan", spoil), "'ln_final.weight' in .* holds NaN or Inf")
    refused(changed(path, tmp_path / "more", lambda t: t.update(more=torch.zeros(3))), "does not fit its description")
    no = {"nothing.difference": torch.zeros(3, 4, dtype=torch.int8), "nothing.step": torch.zeros(3)}
    refused(changed(path, tmp_path / "made-up", lambda t: t.update(no)), "is no change of a tensor of the base")
    copy = tmp_path / "cut"
    shutil.copytree(path, copy)
    (copy / variants.FILE).write_bytes((copy / variants.FILE).read_bytes()[:-5])
    refused(copy, "it is truncated or from another artifact")
    with pytest.raises(ArtifactError, match="lacks model.safetensors"):
        qclip.load(path)


@of_float
def test_codes_without_a_step_for_each_row_are_refused(saved: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, path = saved
    name = next(name for name in load_file(path / variants.FILE) if name.endswith(".difference"))
    step = {name.replace(".difference", ".step"): torch.zeros(2)}
    refused(changed(path, tmp_path / "steps", lambda held: held.update(step)), "not one for each row")


def test_names_of_variants(saved: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _, path = saved
    root = tmp_path / "checkpoints"
    zoo.write_checkpoint(
        root / "small",
        small_clip().state_dict(),
        {
            "architecture": qclip.models.config_of(small_clip()),
            "preprocess": {"image_size": 32},
            "tokenizer": {"kind": "clip-bpe", "context_length": 16},
            "data": "noise",
        },
        "",
    )
    monkeypatch.setattr(zoo, "_root", lambda: root)
    base = qclip.load_model("small")
    trained = qclip.train(base, recipe, pairs(), **SETTINGS | {"steps": 1})
    qclip.save(trained, tmp_path / "artifact")
    variants.save(tmp_path / "artifact", base, root / "small" / "one", CARD, "# x\n")
    assert list(zoo.variants()) == ["small:one"] and list(zoo.checkpoints()) == ["small"]
    assert qclip.load_model("small:one").qclip_quantization.recipe.name == recipe
    with pytest.raises(errors.ModelError, match="unknown model 'small:two'; did you mean 'small:one'"):
        qclip.load_model("small:two")


def test_nothing_that_is_shipped_says_where_it_was_made() -> None:
    files = [each for each in CHECKPOINTS.rglob("*") if each.suffix in (".json", ".md")]
    assert len(files) > 8
    for file in files:
        found = re.search(r"""[:"' (]/\w+/""", file.read_text(encoding="utf-8"))
        assert found is None, (file, found)
    content = {"a": [{"source": "parquet:/home/me/x.parquet?samples=3"}, {"source": "scenes:train"}], "source": "M:a/b"}
    assert variants.without_folders(content) == {
        "a": [{"source": "parquet:x.parquet?samples=3"}, {"source": "scenes:train"}],
        "source": "M:a/b",
    }
