"""Controls through a whole model. The metric here is a plain number of each weight, so that what was put where can be
told exactly; `qclip.evaluate` is run once, on generated images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip.errors import InputError
from qclip.results import Results
from qclip.spectral import CONTROLS, Pixels, feature_spectrum, judgements, through_model, weight_spectrum
from qclip.spectral.basis import Basis
from qclip.spectral.change import Change
from qclip.spectral.opened import Vision
from qclip.spectral.replaced import Replaced
from qclip.spectral.sites import effective_weight
from tests.small import small_clip

SITE = "vision.blocks.1.mlp.fc1"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def small(model: nn.Module) -> nn.Module:
    return qclip.quantize(model, "w4a8")


def weight(model: nn.Module) -> torch.Tensor:
    from qclip.models import explicit_form

    with explicit_form(model) as towers:
        return effective_weight(towers["vision"], towers["vision"].sites[SITE])


def measured(models: Mapping[str, nn.Module]) -> Results:
    """The norm of one weight as "top1", the logit scale as the mean confidence, and differences to the first model."""
    results, first = Results(), next(iter(models))
    for name, each in models.items():
        values = {"top1": float(weight(each).norm()), "mean_confidence": qclip.encoders(each).logit_scale / 200}
        for metric, value in values.items():
            common = {"model": name, "set": "images", "role": "id", "metric": metric}
            results.add(**common, value=value, low=value - 1, high=value + 1)
            if name != first:
                results.add(**common, reference=first, value=value - results.value(**common | {"model": first}))
    return results


def test_each_row_is_of_the_weights_that_it_names(model: nn.Module, small: nn.Module) -> None:
    before, own = weight(model), weight(small)
    scale = qclip.encoders(small).logit_scale
    results = through_model(model, {"w4a8": small}, measured, strengths=[0.5, 1.0])
    where = {"model": "w4a8", "set": "images", "metric": "top1"}

    def value(axis: str, at: str | float) -> float:
        return results.value(**where, axis=axis, at=at)

    assert torch.equal(weight(model), before) and torch.equal(weight(small), own)  # nothing was left behind
    assert {row["at"] for row in results.where(axis="control")} == set(CONTROLS.names())
    noisy = math.sqrt(float(before.norm()) ** 2 + float((own - before).norm()) ** 2)
    for name in ("white", "white_layer", "uniform"):
        assert value("control", name) == pytest.approx(noisy, rel=3e-3)
        row = results.row(**where, axis="control", at=name)
        assert row["n"] == 8 and row["low"] < row["value"] < row["high"]
        gap = results.row(**where, reference=name)
        assert gap["value"] == pytest.approx(float(own.norm()) - row["value"], abs=1e-6)
        assert gap["high"] - gap["low"] == pytest.approx(row["high"] - row["low"])
    change = Change(SITE, Basis.of(before), own - before)
    left = float((before + CONTROLS.made("truncated").residual(change, np.random.default_rng(0))).norm())
    row = results.row(**where, axis="control", at="truncated")
    assert row["value"] == pytest.approx(left, rel=1e-5)
    assert (row["low"], row["high"]) == pytest.approx((left - 1, left + 1))  # nothing random: its own interval
    assert 0.9 * float(before.norm()) < value("control", "shrink") < float(before.norm())
    assert results.row(**where, reference="shrink")["value"] == pytest.approx(
        float(own.norm()) - value("control", "shrink")
    )
    assert value("intervention", "weights") == pytest.approx(float(own.norm()), rel=1e-6)
    factor = (before * own).sum(1) / (own**2).sum(1)
    assert value("intervention", "level undone") == pytest.approx(float((own * factor[:, None]).norm()), rel=1e-5)
    s = torch.linalg.svdvals(before)
    for strength in (0.5, 1.0):
        kept = torch.cat([s[:8], (1 - strength) * s[8:]])
        assert value("filter", strength) == pytest.approx(float(kept.norm()), rel=1e-5)
    assert results.row(**where, axis="filter", at=1, reference="float")["value"] < -0.1
    assert results.value(model="w4a8", metric="logit_factor", axis="intervention", at="temperature") == pytest.approx(1)
    assert qclip.encoders(small).logit_scale == scale


@pytest.mark.parametrize("embeds", ["the images", "the first of them", "others first", "nothing"])
def test_a_copy_embeds_once_for_its_features_and_for_what_is_measured(
    model: nn.Module, small: nn.Module, monkeypatch: pytest.MonkeyPatch, embeds: str
) -> None:
    batches = list(torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(32))
    given = {
        "the images": batches,
        "the first of them": batches[:2],
        "others first": [batches[1], batches[0] + 1, *batches],
        "nothing": [],
    }[embeds]
    pixels, passes = Pixels("noise", batches), []

    def evaluate(models: Mapping[str, nn.Module]) -> Results:
        for each in models.values():
            for part in given:
                qclip.encoders(each).encode_image(part)
        return measured(models)

    see = Vision.see
    monkeypatch.setattr(Vision, "see", lambda self, parts: passes.append(len(parts)) or see(self, parts))
    settings = {"controls": ["white", "truncated"], "seeds": 8}
    found = through_model(model, {"w4a8": small}, evaluate, pixels=pixels, interventions=False, **settings)
    left = {"the images": 0, "the first of them": 1, "others first": 0, "nothing": 3}[embeds]
    assert passes == [3, 3] + ([left] * 9 if left else [])  # of the two models, and of nine copies
    rows = [row for row in found.rows if row["set"] == "noise"]
    wanted = feature_spectrum(model, {"w4a8": small}, pixels, **settings).rows
    assert len(rows) == len(wanted) > 20
    for mine, theirs in zip(rows, wanted, strict=True):
        values = [[row.pop(name) for name in ("value", "low", "high")] for row in (mine, theirs)]
        assert mine == theirs
        for one, other in zip(*values, strict=True):
            assert one == other if one is None else one == pytest.approx(other, rel=1e-6, abs=1e-9)
    assert {row["axis"] for row in found.rows if row["set"] == "images"} == {"control", ""}


def test_the_temperature_is_found_that_explains_the_confidence(model: nn.Module, small: nn.Module) -> None:
    def shifted(models: Mapping[str, nn.Module]) -> Results:
        results = measured(models)
        for row in results.rows:
            if row["metric"] == "mean_confidence" and not row["reference"]:
                row["value"] = math.tanh(row["value"]) * (0.9 if row["model"] == "w4a8" else 1)
        return results

    results = through_model(model, {"w4a8": small}, shifted, controls=["shrink"], strengths=[])
    where = {"axis": "intervention", "at": "temperature"}
    found = results.value(model="w4a8", set="images", metric="mean_confidence", **where)
    base = qclip.encoders(model).logit_scale / 200
    assert found == pytest.approx(0.9 * math.tanh(base), abs=1e-5)
    factor = results.value(model="w4a8", metric="logit_factor", **where)
    assert factor == pytest.approx(math.atanh(0.9 * math.tanh(base)) / base, rel=1e-3)


def test_draws_are_all_different_however_few_copies_are_held(
    model: nn.Module, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"controls": ["white"], "seeds": 9, "interventions": False}
    found = []
    for held in (9, 2, 0.5):
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        monkeypatch.setattr("qclip.spectral.interventions.BYTES", int(held * size))
        at_once: list[int] = []

        def watched(models: Mapping[str, nn.Module], at_once: list[int] = at_once) -> Results:
            at_once.append(len(models))
            return measured(models)

        found.append(through_model(model, {"w4a8": small}, watched, **settings).rows)
        assert max(at_once[1:]) == max(1, int(held)) and sum(at_once[1:]) == 9
    assert found[0] == found[1] == found[2]


def test_the_factor_is_that_of_the_last_temperature_that_was_measured(
    model: nn.Module, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tries are too few: what is told is of the second, not of the one that would come next."""
    monkeypatch.setattr("qclip.spectral.interventions.TRIES", 2)
    scales: list[float] = []

    def shifted(models: Mapping[str, nn.Module]) -> Results:
        results = measured(models)
        if "temperature" in models:
            scales.append(qclip.encoders(models["temperature"]).logit_scale)
        for row in results.rows:
            if row["metric"] == "mean_confidence" and not row["reference"]:
                row["value"] = math.tanh(row["value"]) * (0.5 if row["model"] == "w4a8" else 1)
        return results

    found = through_model(model, {"w4a8": small}, shifted, controls=["shrink"], strengths=[])
    factor = found.value(model="w4a8", metric="logit_factor", axis="intervention", at="temperature")
    assert len(scales) == 2 and factor == pytest.approx(scales[-1] / qclip.encoders(model).logit_scale, rel=1e-5)


def test_a_confidence_that_no_temperature_reaches_ends_nothing(model: nn.Module, small: nn.Module) -> None:
    def flat(models: Mapping[str, nn.Module]) -> Results:
        results, tried = measured(models), "temperature" in models
        for row in results.rows:
            if row["metric"] == "mean_confidence" and not row["reference"]:
                row["value"] = 0.9 if row["model"] == "w4a8" else 0.5 if tried else 0.4
        return results

    found = through_model(model, {"w4a8": small}, flat, controls=["shrink"], strengths=[])
    where = {"model": "w4a8", "axis": "intervention", "at": "temperature"}
    assert found.value(metric="mean_confidence", set="images", **where) == 0.5
    assert found.value(metric="logit_factor", **where) > 1


def test_parts_of_a_set_are_not_told_as_the_whole(model: nn.Module, small: nn.Module) -> None:
    def with_groups(models: Mapping[str, nn.Module]) -> Results:
        results = measured(models)
        for name in models:
            for group in ("land", "sea"):
                where = {"set": "images", "role": "id", "axis": "group", "at": group}
                results.add(model=name, metric="top1", value=77.0, **where)
        return results

    found = through_model(model, {"w4a8": small}, with_groups, controls=["shrink"], strengths=[], interventions=False)
    assert found.value(model="w4a8", set="images", metric="top1", axis="control", at="shrink") < 77
    assert 77.0 not in {row["value"] for row in found.rows}


def test_a_model_with_the_same_weights_is_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match="nothing that a control replaces"):
        through_model(model, {"same": small_clip()}, measured)
    with pytest.raises(InputError, match="strength 1.5"):
        through_model(model, {}, measured, strengths=[1.5])
    with pytest.raises(InputError, match="8 or more"):
        through_model(model, {}, measured, seeds=3)
    with pytest.raises(InputError, match="unknown spectral control 'whit'"):
        through_model(model, {}, measured, controls=["whit"])


def edited(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy whose linear weights were changed, all but embeddings."""
    import copy

    from qclip.models import towers

    other = copy.deepcopy(model)
    with torch.no_grad():
        for tower in towers(other).values():
            for site in tower:
                if site.kind != "embedding":
                    held = site.module.weight
                    held.copy_(change(tower.weight(site)).view(held.shape))
    return other


def white(w: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(w.shape[0] + w.shape[1]))
    return w + 0.01 * w.norm() * noise / noise.norm()


def cut(w: torch.Tensor) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    s[8:] *= 0.8
    return u * s @ vt


def test_shrink_noise_and_filter_of_a_whole_model_have_verdicts_of_their_own(model: nn.Module) -> None:
    changes = {"shrunk": lambda w: 0.997 * w, "open": white, "damped": cut}
    found = weight_spectrum(model, {name: edited(model, change) for name, change in changes.items()})
    judged = {(each.model, each.tower): each.finding for each in judgements(found.rows)}
    assert judged == {(name, tower): name for name in changes for tower in ("vision", "text")}


def test_a_control_replaces_every_weight_that_was_changed(model: nn.Module, small: nn.Module) -> None:
    with Replaced(model, small, "w4a8") as work:
        work.put(CONTROLS.made("shrink"))
        found = weight_spectrum(model, {"shrink": work.model})
        assert {each.finding for each in judgements(found.rows)} == {"shrunk"}
        sites = {row["set"] for row in found.where(metric="level", role="site")}
        assert sites == set(work.changes) and "vision.patch" in sites and "text.projection" in sites


@pytest.mark.slow
def test_with_qclips_own_evaluation() -> None:
    model = qclip.load_model("scenes-clean")
    small = qclip.quantize(model, "w4a8")
    evaluate = functools.partial(
        qclip.evaluate, data="scenes:test?samples=40", measurements=["clean"], scores=[], cache=False
    )
    results = through_model(model, {"w4a8": small}, evaluate, controls=["white", "shrink"], strengths=[1.0])
    where = {"model": "w4a8", "set": "scenes-test"}
    assert results.row(**where, metric="ece", axis="control", at="white")["n"] == 8
    whole = results.value(**where, metric="top1", axis="intervention", at="weights")
    assert results.value(**where, metric="top1", axis="filter", at=1) < whole
    temperature = results.row(**where, metric="top1", axis="intervention", at="temperature", reference="float")
    assert temperature["value"] == 0  # a temperature moves no answer
    assert np.isfinite(results.value(**where, metric="ece", reference="shrink"))


def test_weights_run_in_float_and_a_draw_without_a_value_leaves_no_row(model: nn.Module, small: nn.Module) -> None:
    quantized: dict[str, bool] = {}
    calls = 0

    def watched(models: Mapping[str, nn.Module]) -> Results:
        nonlocal calls
        results = measured(models)
        quantized.update({name: any(hasattr(m, "facts") for m in each.modules()) for name, each in models.items()})
        for row in results.rows:
            if row["model"] == "white 3" and row["metric"] == "top1" and not row["reference"]:
                calls += 1
                row["value"] = None
        return results

    results = through_model(model, {"w4a8": small}, watched, controls=["white"], strengths=[])
    assert quantized["w4a8"] and not quantized["weights"] and calls == 1
    control = [row["metric"] for row in results.where(axis="control", at="white")]
    assert control == ["mean_confidence"]  # a mean of seven draws would be another thing than one of eight
