"""GL-MCM through `evaluate`: patches are read batch by batch, and what was read is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qclip
from qclip import data as qdata
from qclip import models
from qclip.errors import InputError
from qclip.metrics import auroc
from qclip.models.value_path import ValuePath
from qclip.reliability import evaluate
from qclip.reliability.local import unsound
from qclip.reliability.sample import Known, Sample
from qclip.reliability.scores import SCORES
from qclip.results import Results
from qclip.store import Entry
from tests.models.architectures import OPEN_CLIP
from tests.reliability.fakes import CLASSES, Tiny, pictures
from tests.small import small_clip

STRANGE = pictures("noise", 30, seed=3, strange=True)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_it_is_mcm_and_the_surest_patch() -> None:
    rng = np.random.default_rng(0)
    words, features, patches = (unit(rng.normal(size=shape)) for shape in ((7, 5), (11, 5), (11, 9, 5)))
    found = SCORES.made("glmcm").fit(Known(words, 30.0))(Sample(features, features @ words.T, 30.0, patches=patches))
    for i in range(11):
        each = [np.exp(words @ f) / np.exp(words @ f).sum() for f in (features[i], *patches[i])]
        assert found[i] == pytest.approx(each[0].max() + max(p.max() for p in each[1:]), rel=1e-13)


def test_parts_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    words, features, patches = (unit(rng.normal(size=shape)) for shape in ((7, 5), (11, 5), (11, 9, 5)))
    sample, fitted = (
        Sample(features, features @ words.T, 30.0, patches=patches),
        SCORES.made("glmcm").fit(Known(words, 1.0)),
    )
    whole = fitted(sample)
    monkeypatch.setattr("qclip.reliability.scores.glmcm.BLOCK", 2 * 9 * 7)
    np.testing.assert_allclose(fitted(sample), whole, rtol=1e-14)


def run(compared: dict[str, torch.nn.Module], cache: object = False, **options: object) -> Results:
    options = {"scores": ["mcm", "glmcm"], "measurements": ["ood"], "templates": ["a {}"], "batch": 16} | options
    return evaluate(compared, pictures(n=40), ood=STRANGE, cache=cache, **options)


@torch.no_grad()
def by_hand(model: torch.nn.Module, data: qdata.ImageSet) -> np.ndarray:
    encode = models.encoders(model)
    words = unit(encode.encode_text(model.tokenizer([f"a {name}" for name in CLASSES])).double().numpy())
    pixels = next(batch for _, batch in qdata.batches(data, model.preprocess, size=len(data)))
    features = unit(encode.encode_image(pixels).double().numpy())
    patches = unit(models.value_path(model).patches(encode.encode_image, pixels).double().numpy())
    return SCORES.made("glmcm").fit(Known(words, 1.0))(Sample(features, features @ words.T, 1.0, patches=patches))


def test_each_model_is_judged_by_its_own_patches_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = {"float": small_clip(), "w8a8": qclip.quantize(small_clip(), "w8a8")}
    results = run(compared, tmp_path)
    for label, model in compared.items():
        expected = auroc(by_hand(model, pictures(n=40)), by_hand(model, STRANGE))
        assert results.value(model=label, metric="auroc", score="glmcm") == pytest.approx(expected, abs=0.01)
        assert results.value(model=label, metric="auroc", score="mcm") != pytest.approx(expected, abs=0.01)
    assert results.row(model="w8a8", metric="auroc", score="glmcm", reference="float")["low"] is not None
    plain = run(compared, scores=["mcm"])
    where = {"model": "w8a8", "metric": "auroc", "score": "mcm", "reference": ""}
    assert results.value(**where) == plain.value(**where)  # looking at patches changes no embedding

    def never(*args: object) -> None:
        raise AssertionError("patches were embedded again")

    monkeypatch.setattr(ValuePath, "patches", never)
    assert run(compared, tmp_path).rows == results.rows
    with pytest.raises(AssertionError, match="embedded again"):
        run(compared, tmp_path, templates=["one {}"])  # other class embeddings, other values
    monkeypatch.setattr("qclip.reliability.scores.glmcm.GlobalLocal.version", 2, raising=False)
    with pytest.raises(AssertionError, match="embedded again"):
        run(compared, tmp_path)  # another definition


def test_parts_of_the_work_read_patches_too(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, embedded = {"float": small_clip()}, []
    for part in (1, 2):
        run(compared, tmp_path, share=(part, 2))
    whole = ValuePath.patches
    monkeypatch.setattr(ValuePath, "patches", lambda *given: embedded.append(1) or whole(*given))
    assert run(compared, tmp_path).value(metric="auroc", score="glmcm") is not None and not embedded


def test_a_model_whose_patches_have_no_embeddings_is_named() -> None:
    compared = {"small": small_clip(), "avg": OPEN_CLIP["no_ln_pre_avg"]().eval()}
    compared["avg"].preprocess, compared["avg"].tokenizer = compared["small"].preprocess, compared["small"].tokenizer
    with pytest.raises(InputError, match="score 'glmcm' looks at patches, and 'avg' embeds none: .*class token"):
        run(compared)


def test_a_model_of_no_family_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    results = run({"tiny": Tiny()}, scores=None)
    assert any(
        "scores left out: glmcm (each looks at patches, and 'tiny' embeds none" in note for note in results.notes
    )
    assert results.value(model="tiny", metric="auroc", score="mcm") is not None


@torch.no_grad()
def test_patches_that_are_not_finite_leave_their_model_out() -> None:
    compared = {"float": small_clip(), "broken": small_clip()}
    compared["broken"].visual.transformer.resblocks[-1].mlp.c_fc.bias[0] = torch.nan
    results = run(compared)
    assert any("broken: " in note and "all its numbers are undefined" in note for note in results.notes)
    assert results.value(model="float", metric="auroc", score="glmcm") is not None
    assert not results.where(model="broken", metric="auroc").rows


def test_patches_alone_that_are_not_finite_leave_their_model_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = {"float": small_clip(), "broken": small_clip()}
    whole = ValuePath.patches

    def patches(self: ValuePath, encode: object, images: torch.Tensor) -> torch.Tensor:
        found = whole(self, encode, images)
        if self.block is compared["broken"].visual.transformer.resblocks[-1]:
            found[1, 2] = torch.inf
        return found

    monkeypatch.setattr(ValuePath, "patches", patches)
    results = run(compared)
    said = "broken: patch embeddings of 'broken' on pets are NaN, Inf or zero; all its numbers are undefined"
    assert said in results.notes and not results.where(model="broken", metric="auroc").rows
    assert results.value(model="float", metric="auroc", score="glmcm") is not None


@pytest.mark.parametrize(
    ("values", "sound"),
    [
        (np.zeros(4), True),
        (np.zeros(3), False),
        (np.zeros((4, 1)), False),
        (np.zeros(4, np.float32), False),
        (np.array([0, 0, np.nan, 0]), False),
        (None, False),
    ],
)
def test_stored_values_are_as_many_finite_numbers_as_there_are_images(values: np.ndarray | None, sound: bool) -> None:
    found = unsound(Entry({} if values is None else {"glmcm": values}), ["glmcm"], 4)
    assert (found == "") is sound
