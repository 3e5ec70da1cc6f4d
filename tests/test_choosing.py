"""The recipe that is picked, against the numbers that it is picked by."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import qclip
from qclip import choosing, data
from qclip.cli import main
from qclip.data import ImageSet
from qclip.errors import DataError, RecipeError
from tests.small import small_clip

NAMES = ("w8a8", "w4a8", "w2a8")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return data.load("scenes:test?samples=60")


def choose(model: nn.Module, images: ImageSet, times: dict[str, float], **bounds: float) -> choosing.Choice:
    """With times as given: no test hangs on how fast a machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "_times", lambda contenders: {name: times.get(name, 9.0) for name in contenders})
        return qclip.choose(model, images, NAMES, **bounds)


def test_the_fastest_within_the_bounds_is_taken(model: nn.Module, images: ImageSet) -> None:
    times = {"w8a8": 3.0, "w4a8": 2.0, "w2a8": 1.0}
    found = choose(model, images, times, error=2.0, agreement=0.0)
    assert found.recipe.name == "w2a8"
    errors = {each.recipe.name: each.error for each in found.candidates}
    assert errors["w8a8"][0] < errors["w4a8"][0] < errors["w2a8"][0] and all(a < b for a, b in errors.values())
    between = (errors["w4a8"][1] + errors["w2a8"][0]) / 2
    assert choose(model, images, times, error=between, agreement=0.0).recipe.name == "w4a8"
    just_not = (errors["w4a8"][0] + errors["w4a8"][1]) / 2  # the value is within, the end of the interval is not
    assert choose(model, images, times, error=just_not, agreement=0.0).recipe.name == "w8a8"


def test_agreement_is_a_bound_too(model: nn.Module, images: ImageSet) -> None:
    times = {"w8a8": 3.0, "w4a8": 2.0, "w2a8": 1.0}
    found = choose(model, images, times, error=2.0, agreement=0.0)
    lows = {each.recipe.name: each.agreement[1] for each in found.candidates if each.agreement}
    assert lows["w2a8"] < lows["w8a8"]
    picked = choose(model, images, times, error=2.0, agreement=lows["w8a8"])
    assert picked.recipe.name == next(n for n in ("w2a8", "w4a8", "w8a8") if lows[n] >= lows["w8a8"])


def test_of_equally_fast_ones_the_nearest(model: nn.Module, images: ImageSet) -> None:
    times = {"w8a8": 1.02, "w4a8": 1.0, "w2a8": 1.01}
    assert choose(model, images, times, error=2.0, agreement=0.0).recipe.name == "w8a8"
    times["w8a8"] = 1.1
    assert choose(model, images, times, error=2.0, agreement=0.0).recipe.name == "w4a8"


def test_where_none_fits_the_reasons_say_so(model: nn.Module, images: ImageSet) -> None:
    found = choose(model, images, {"w2a8": 1.0}, error=1e-9)
    assert found.recipe.name == "w8a8" and len(found.reasons) == 5
    assert "NOT within the bounds" in found.reasons[0]
    assert "w2a8 1.00 ms" in found.reasons[4]


def test_images_without_classes_and_too_few(model: nn.Module, images: ImageSet) -> None:
    plain = dataclasses.replace(images, labels=None, classes=None)
    found = choose(model, plain, {}, error=2.0)
    assert all(each.agreement is None for each in found.candidates) and "no class names" in found.reasons[2]
    with pytest.raises(DataError, match="two and more are needed"):
        qclip.choose(model, images.select(np.arange(1)), NAMES)


def test_what_does_not_fit_the_model_is_left_out(model: nn.Module, images: ImageSet) -> None:
    with pytest.MonkeyPatch.context() as patch:
        quantize = choosing.ptq.quantize

        def refusing(model: nn.Module, recipe: qclip.Recipe, *rest: object, **more: object) -> nn.Module:
            if recipe.name == "w4a8":
                raise RecipeError("no such tower")
            return quantize(model, recipe, *rest, **more)

        patch.setattr(choosing.ptq, "quantize", refusing)
        found = choose(model, images, {}, error=2.0, agreement=0.0)
    assert [each.refused for each in found.candidates] == ["", "no such tower", ""]
    assert "w4a8 does not fit" in found.reasons[4]


def test_judging_images_do_not_calibrate(model: nn.Module, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ImageSet] = []
    monkeypatch.setattr(choosing.ptq, "quantize", lambda m, r, images, **__: (seen.append(images), m)[1])
    judged: list[ImageSet] = []
    evaluate = choosing.evaluate
    monkeypatch.setattr(choosing, "evaluate", lambda m, d, **k: (judged.append(d), evaluate(m, d, **k))[1])
    choose(model, images, {})
    one, other = (np.stack([np.asarray(image) for image in part.images(range(30))]) for part in (seen[0], judged[0]))
    assert not any((a == b).all() for a in one for b in other)


def test_the_fastest_is_brought_nearer_where_it_errs_too_much(model: nn.Module, images: ImageSet) -> None:
    times = {"w8a8": 3.0, "w4a8": 1.0, "w2a8": 2.0}
    found = choose(model, images, times, error=2.0, agreement=0.0)
    assert [each.recipe.name for each in found.candidates] == list(NAMES)  # it does not: no GPTQ
    errors = {each.recipe.name: each.error for each in found.candidates}
    nearer = choose(model, images, times, error=errors["w4a8"][0], agreement=0.0)
    last = nearer.candidates[-1]
    assert last.recipe.name == "w4a8-gptq" and last.ms == 1.0 and last.error[0] < errors["w4a8"][0]
    fits = last.error[1] <= errors["w4a8"][0]
    assert nearer.recipe.name == ("w4a8-gptq" if fits else "w8a8")


def test_the_command_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "_times", lambda contenders: dict.fromkeys(contenders, 1.0))
        patch.setattr(choosing, "CANDIDATES", ("w8a8", "w2a8"))
        patch.setattr(choosing.choose, "__defaults__", (("w8a8", "w2a8"),))
        line = ["quantize", "scenes-clean", "--calibration", "scenes:dev?samples=40", "--output", str(tmp_path / "q")]
        assert main(line) == 0
    said = capsys.readouterr().err
    assert "1 - cosine" in said and "threads" in said and "beside it: w2a8" in said


def test_times_are_medians_of_batches_of_each_contender(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is called by itself, on a whole batch, in turns; what is told is milliseconds of one image."""
    small, calls = qclip.quantize(model, "w8a8"), []
    names = {id(model): "float", id(small): "w8a8"}
    encoders = choosing.models.encoders

    def watched(contender: nn.Module):
        found = encoders(contender)
        inner, name = found.encode_image, names[id(contender)]
        found.encode_image = lambda x: calls.append((name, tuple(x.shape))) or inner(x)
        return found

    seconds = iter([s for turn in range(choosing.ROUNDS) for s in (0.016 * (1 + turn), 9.0 if turn == 3 else 0.008)])
    timed: list[str] = []

    def clock(call, count: int) -> float:
        call()
        timed.append(calls[-1][0])
        return next(seconds)

    monkeypatch.setattr(choosing.models, "encoders", watched)
    monkeypatch.setattr(choosing, "timed", clock)
    assert choosing._times({"float": model, "w8a8": small}) == pytest.approx({"float": 4.0, "w8a8": 0.5})
    assert timed == ["float", "w8a8"] * choosing.ROUNDS
    assert {shape for _, shape in calls} == {(choosing.BATCH, 3, 32, 32)}
    assert calls[:6] == [("float", calls[0][1])] * 3 + [("w8a8", calls[0][1])] * 3  # what is recorded, before


def test_where_none_fits_the_nearest_is_taken_whatever_it_costs(model: nn.Module, images: ImageSet) -> None:
    found = choose(model, images, {"w8a8": 9.0, "w4a8": 1.0, "w2a8": 5.0}, error=1e-9)
    errors = {each.recipe.name: each.error[0] for each in found.candidates}
    assert found.recipe.name == min(errors, key=lambda name: errors[name]) != "w4a8"
    assert "9.00 ms an image, float 9.00 ms (1.00 times as fast)" in found.reasons[3]
