"""What a run has come to is said: better, worse, or nothing that is of use."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import qclip
from qclip.training import TrainingError, outcome
from qclip.training.objectives import Features
from tests.small import small_clip
from tests.training.test_trainer import KilledError, killed_at, same, state
from tests.training.world import SETTINGS, pairs


def notes_of(model: torch.nn.Module) -> dict:
    return model.qclip_quantization.provenance["training"]


def test_a_run_that_helps_says_what_was_before() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained = qclip.train(small_clip(), "w4a4-lsq", pairs(), **SETTINGS | {"objective": "mse", "steps": 12})
    untrained = qclip.train(small_clip(), "w4a4-lsq", pairs(), **SETTINGS | {"objective": "mse", "steps": 0})
    found = notes_of(trained)["held_out"]
    assert found["loss"] < found["before"] == notes_of(untrained)["held_out"]["loss"] and "worse" not in notes_of(
        trained
    )


@pytest.mark.parametrize("held_out", [0.2, 0.0])
def test_a_run_that_makes_it_worse_is_marked(held_out: float) -> None:
    given = SETTINGS | {
        "objective": "mse",
        "rate": 2e-3,
        "steps": 3,
        "held_out": held_out,
    }  # a float model is its own teacher
    with pytest.warns(UserWarning, match="training made the model worse: its loss on .* before; lower the rate"):
        trained = qclip.train(small_clip(), "float-continued", pairs(), **given)
    notes = notes_of(trained)
    found = notes["held_out" if held_out else "learned_from"]
    assert notes["worse"].startswith("training made the model worse") and found["loss"] > found["before"]
    assert found["pairs"] == (5 if held_out else 24) and ("held_out" in notes) == bool(held_out)


def test_what_is_destroyed_is_not_exported(tmp_path: Path) -> None:
    told = "training destroyed the model: its loss on 5 held-out pairs is .*, and was .* before, .*lower the rate"
    for _ in range(2):  # nor when it is asked for again
        with pytest.raises(TrainingError, match=told):
            qclip.train(small_clip(), "w4a8-lsq", pairs(), tmp_path, **SETTINGS | {"rate": 10.0})
    assert (tmp_path / "log.csv").is_file()


def features(image: Tensor, text: Tensor, towards: tuple[Tensor, Tensor]) -> Features:
    scale, captions = torch.tensor(9.0), torch.arange(len(image))
    return Features(image, text, scale, *towards, scale, captions)


def test_what_is_left_of_the_float_model() -> None:
    image, text, other = (
        normalize(torch.randn(64, 24, generator=torch.Generator().manual_seed(k)), dim=-1) for k in range(3)
    )
    own = image, text
    assert outcome.kept(features(*own, own)) == pytest.approx(1)
    assert abs(outcome.kept(features(other, text, own))) < 0.1 and abs(outcome.kept(features(image, other, own))) < 0.1
    one = image[:1].expand_as(image)
    assert outcome.kept(features(one, text, own)) == pytest.approx(0, abs=1e-6)
    near = normalize(image + 0.5 * other, dim=-1)
    assert 0.8 < outcome.kept(features(near, text, own)) < 0.95
    common = tuple(normalize(each + 3 * text[:1], dim=-1) for each in (image, near))  # what all share tells nothing
    assert 0.5 < outcome.kept(features(common[1], text, (common[0], text))) < 1.1


def test_a_run_that_was_killed_behind_its_last_step_comes_to_the_same(tmp_path: Path) -> None:
    more = SETTINGS | {"start": 0.5, "ema": 0.5}
    whole = qclip.train(small_clip(), "w2a4-lsq", pairs(), tmp_path / "a", **more)
    with pytest.raises(KilledError):
        qclip.train(small_clip(), "w2a4-lsq", pairs(), tmp_path / "b", progress=killed_at(6), **more)
    again = qclip.train(small_clip(), "w2a4-lsq", pairs(), tmp_path / "b", **more)
    same(state(again), state(whole))
    assert notes_of(again) == notes_of(whole)
