"""`verify` on a small model: what passes, what fails, what is refused, and who is to blame."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip import Results, data
from qclip.cli import main
from qclip.data import ImageSet
from qclip.errors import InputError
from qclip.metrics.record import OWN
from qclip.models import towers
from qclip.reliability.measurements import MEASUREMENTS
from qclip.rewrite import quantization
from qclip.verification import Requirement, blame, judge, measure, measurements, requirements, worst_first
from tests.small import small_clip

BAD = "vision.blocks.1.mlp.fc2", "vision.blocks.0.attn.v"
RECIPE = {"name": "spoilt", "weight_bits": 8, "activation_bits": 8, "exceptions": dict.fromkeys(BAD, "w2a8")}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def good(model: nn.Module) -> nn.Module:
    return qclip.quantize(model, "w8a8")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return data.load("scenes:test?samples=40")


def test_a_good_model_passes_and_a_bad_one_does_not(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    require = "cosine_mean>=0.99, index_recall@5>=0.5, top1>=-60"
    assert qclip.verify(good, model, require, images, cache=False).passed
    found = qclip.verify(qclip.quantize(model, "w2a8"), model, require, images, cache=False)
    assert not found.passed
    assert [outcome.passed for outcome in found.outcomes][0] is False
    assert found.results.where(metric="top1").rows


def test_unlabelled_images_answer_what_needs_no_label(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    plain = copy.copy(images)
    plain.labels = plain.classes = plain.captions = None
    found = qclip.verify(good, model, "cosine_min>=0.9, text_recall@3>=0.1", plain, texts=["a", "b"], cache=False)
    assert found.passed and {row["role"] for row in found.results if row["set"] == images.name} == {"images"}
    with pytest.raises(InputError, match="needs labelled images, and scenes:test.* has no labels"):
        qclip.verify(good, model, "top1>=-1", plain, cache=False)
    with pytest.raises(InputError, match="texts="):
        qclip.verify(good, model, "text_recall@3>=0.1", plain, cache=False)
    with pytest.raises(InputError, match="needs 41 images or more, .* has 40"):
        qclip.verify(good, model, "index_recall@40>=0.1", plain, cache=False)


def test_few_images_answer_what_needs_no_neighbours(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    found = qclip.verify(good, model, "cosine_mean>=0.9, top1>=-60", images.select(np.arange(7)), cache=False)
    assert found.passed and any("7 images are too few for 10 neighbours" in note for note in found.results.notes)


def test_other_sources_are_refused(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    with pytest.raises(InputError, match="with other weights"):
        qclip.verify(good, small_clip(1), "cosine_mean>=0.9", images, cache=False)
    with pytest.raises(InputError, match="not quantized"):
        qclip.verify(model, model, "cosine_mean>=0.9", images, cache=False)
    assert qclip.verify(qclip.quantize(model, "w6a8"), good, "cosine_mean>=0.9", images, cache=False).passed


def test_what_was_not_measured_is_refused(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    for require in ("worst_group_top1>=-1", "top1(gaussian_noise)>=-1", "top1(nowhere)>=-1"):
        with pytest.raises(InputError, match="was not measured"):
            qclip.verify(good, model, require, images, cache=False)


def test_what_lacks_a_set_says_which_before_anything_is_embedded(
    model: nn.Module, good: nn.Module, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qclip.reliability.engine.Embeddings", lambda *_: pytest.fail("embeds"))
    for require, option, given in (
        ("auroc>=-1", "ood=", {}),
        ("ece_ts<=+1", "dev=", {}),
        ("auroc(knn)>=-1", "train=", {"ood": "scenes:far-ood?samples=10"}),
        ("auroc(neglabel)>=-1", "negatives=", {"ood": "scenes:far-ood?samples=10"}),
    ):
        with pytest.raises(InputError, match=option):
            qclip.verify(good, model, require, images, cache=False, **given)


@pytest.mark.parametrize(
    "require", ["cosine_mean>=0", "index_recall@3>=0", "auroc>=-90", "aupr_in>=-90", "top1>=-90", "ece<=+90"]
)
def test_a_trial_of_one_requirement_measures_what_it_needs_and_no_more(
    model: nn.Module, good: nn.Module, images: ImageSet, require: str
) -> None:
    wanted = requirements(require)
    few = measurements(wanted[0])
    assert few is not None and len(few) < 4
    found = measure(good, model, wanted, images, ood="scenes:far-ood?samples=10", cache=False, measurements=few)
    assert found.passed and found.outcomes[0].value is not None


def test_each_number_of_neighbours_is_judged_by_itself(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    found = qclip.verify(good, model, "index_recall@1>=0, index_recall@7>=0", images, cache=False)
    assert [outcome.requirement.at for outcome in found.outcomes] == [1, 7]
    for outcome in found.outcomes:
        row = found.results.row(
            metric="index_recall", axis="neighbours", at=outcome.requirement.at, reference="reference"
        )
        assert row["value"] == outcome.value


def test_the_whole_set_is_judged_unless_a_group_is_named(model: nn.Module, good: nn.Module) -> None:
    data_ = "scenes:spurious-test?samples=40"
    found = qclip.verify(good, model, "top1>=-90, top1(conflict)>=-90, worst_group_top1>=-90", data_, cache=False)
    whole, group, worst = found.outcomes
    assert whole.where == "scenes-spurious-test" and group.where == "scenes-spurious-test, group conflict"
    assert worst.where == whole.where and worst.requirement.metric == "worst_group_top1"


def test_clean_images_are_judged_unless_a_corruption_is_named(
    model: nn.Module, good: nn.Module, images: ImageSet
) -> None:
    settings = {"corruptions": ["contrast"], "cache": False}
    found = qclip.verify(good, model, "top1>=-90, mean_top1>=-90, top1(contrast)>=-90", images, **settings)
    where = [outcome.where for outcome in found.outcomes]
    assert where[:2] == [images.name, f"{images.name}, contrast"]
    assert where[2:] == [where[1], *(f"{where[1]}, severity {k}" for k in range(1, 6))]


def test_scores_are_mcm_and_those_that_are_named(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    ood = "scenes:far-ood?samples=10"
    found = qclip.verify(good, model, "auroc>=-90, auroc(energy)>=-90", images, ood=ood, cache=False)
    assert {row["score"] for row in found.results if row["metric"] == "auroc"} == {"mcm", "energy"}
    assert not [note for note in found.results.notes if "left out" in note]


def test_undefined_fails_with_its_reason_and_the_judged_score_is_mcm() -> None:
    results = Results()
    common = {"model": "quantized", "set": "far", "role": "ood", "metric": "auroc", "reference": "reference"}
    results.add(**common, score="energy", value=-0.2, low=-0.3, high=-0.1)
    results.add(**common, score="mcm", value=0.0, low=-0.004, high=0.1)
    results.add(model="quantized", set="a", role="id", metric="ece", reference="reference", value=None)
    found = judge(results, requirements("auroc>=-0.5, auroc(energy)>=-0.5, ece<=+1"))
    assert [(each.where, each.passed) for each in found] == [("far, mcm", True), ("far, energy", False), ("a", False)]
    assert found[2].reason == "it is undefined there"


def test_an_interval_that_reaches_past_the_bound_is_said() -> None:
    results = Results()
    results.add(model="quantized", set="a", metric="top1", reference="reference", value=0.0, low=-0.02, high=0.02)
    (found,) = judge(results, requirements("top1>=-1"))
    assert not found.passed and "interval" in found.reason


def test_the_sites_to_blame_are_found(model: nn.Module, images: ImageSet) -> None:
    spoilt = qclip.quantize(model, RECIPE)
    state = {name: tensor.clone() for name, tensor in spoilt.state_dict().items()}
    require = requirements("cosine_min>=0.999")

    def holds(tried: nn.Module) -> bool:
        few = measurements(require[0])
        return measure(tried, model, require, images, cache=False, measurements=few).passed

    assert measurements(require[0]) == ["agreement"]
    assert set(blame(spoilt, model, holds)) == set(BAD)
    assert all(torch.equal(tensor, state[name]) for name, tensor in spoilt.state_dict().items())
    assert blame(qclip.quantize(model, "w8a8"), model, lambda tried: True) == []
    with pytest.raises(InputError, match="every site float"):
        blame(spoilt, model, lambda tried: False)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        next(p for name, p in trained.named_parameters() if "ln_" in name).add_(1)
    with pytest.raises(InputError, match="more than their sites"):
        blame(qclip.quantize(trained, "w8a8"), model, lambda tried: False)


def test_fewest_sites_are_found_also_where_several_act_together() -> None:
    from qclip.verification.bisect import _least

    names = tuple("abcdefghij")
    for guilty in ("a", "j", "ae", "bcj", "abcdefghij"):
        assert "".join(_least(names, (), lambda tried, guilty=guilty: set(guilty) <= set(tried))) == guilty


def test_the_command_exits_with_0_or_1(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["quantize", "scenes-clean", "--output", str(tmp_path / "small")]) == 0
    line = ["verify", str(tmp_path / "small"), "--against", "scenes-clean", "--data", "scenes:test?samples=60"]
    line += ["--no-cache", "--require"]
    capsys.readouterr()
    assert main([*line, "cosine_mean>=0.9, top1>=-50"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 2 and "points [" in out and out.rstrip().endswith("passed")
    assert main([*line, "cosine_mean>=0.99999999", "--json", "--output", str(tmp_path / "out")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False and found["requirements"][0]["bound"] == pytest.approx(0.99999999)
    assert (tmp_path / "out" / "report.html").exists()
    assert main([*line, "top1>=nan"]) == 2
    sensitivity(tmp_path / "s.json", "0")
    asked = [*line, "cosine_mean>=0.99999999", "--sensitivity", str(tmp_path / "s.json")]
    assert main(asked) == 2 and "give both, or neither" in capsys.readouterr().err
    assert main([*asked, "--bisect"]) == 2 and "other weights than those" in capsys.readouterr().err
    assert main(["verify", "scenes-clean", *line[2:], "top1>=-1"]) == 2
    assert "is no artifact" in capsys.readouterr().err


def test_the_verdict_stands_where_no_site_is_to_blame(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A gain that the float model does not have over itself, either: no site can be blamed, and exit is 1, not 2."""
    assert main(["quantize", "scenes-clean", "--output", str(tmp_path / "small")]) == 0
    line = ["verify", str(tmp_path / "small"), "--against", "scenes-clean", "--data", "scenes:test?samples=30"]
    capsys.readouterr()
    assert main([*line, "--no-cache", "--require", "top1>=+99", "--bisect"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  top1>=+99" in out and out.rstrip().endswith("failed")
    assert "note: top1>=+99: the requirement does not hold with every site float either" in out


def test_numbers_are_finite(model: nn.Module, good: nn.Module, images: ImageSet) -> None:
    found = qclip.verify(good, model, "index_recall@3>=0.1", images, cache=False)
    assert all(np.isfinite(outcome.value or np.nan) for outcome in found.outcomes)


@pytest.mark.parametrize("name", [name for names in OWN.values() for name in names])
def test_each_measurement_that_a_metric_needs_is_there(name: str) -> None:
    wanted = Requirement(f"{name}>=0", name, None, "", True, 0.0, False)
    assert set(measurements(wanted) or []) <= set(MEASUREMENTS.names())


def sensitivity(path: Path, source: str, rows: tuple = ((BAD[0], 2, 0.1),), activations: int = 8) -> Path:
    results = Results(meta={"sensitivity": {"source_sha256": source, "activation_bits": activations}})
    for site, bits, value in rows:
        results.add(metric="sensitivity", model=f"w{bits}a8", role="site", set=site, axis="bits", at=bits, value=value)
    return results.to_json(path)


def test_the_worst_sites_of_a_table_are_tried_first(model: nn.Module, tmp_path: Path) -> None:
    spoilt = qclip.quantize(model, RECIPE)
    done = quantization(spoilt)
    source = done.provenance["source_sha256"]
    bad, mild = BAD[0], "text.blocks.0.mlp.fc1"
    rows = (
        *((bad, 2, 0.3), (BAD[1], 2, 0.2), (mild, 8, 0.01)),
        (mild, 2, 0.9),  # at bits that it does not have
        ("vision.blocks.9.mlp.fc1", 8, 1.0),  # of no site
    )
    order = worst_first(sensitivity(tmp_path / "s.json", source, rows), done.plans, source)
    assert order[:3] == [bad, BAD[1], mild] and sorted(order) == sorted(done.plans)
    tried: list[frozenset[str]] = []

    def holds(mixed: nn.Module) -> bool:
        restored = {s.name for tower in towers(mixed).values() for s in tower if not hasattr(s.module, "facts")}
        tried.append(frozenset(restored & set(done.plans)))
        return set(BAD) <= restored

    assert set(blame(spoilt, model, holds, order)) == set(BAD)
    with_table = len(tried)
    tried.clear()
    assert set(blame(spoilt, model, holds)) == set(BAD)
    assert with_table <= 6 < len(tried)  # none, all, 1 and 2 of the worst, and either alone
    tried.clear()
    assert set(blame(spoilt, model, holds, order[::-1])) == set(BAD)  # a table that misleads costs time, nothing else


def test_damage_at_other_activations_or_without_a_value_is_no_measure_of_a_site(
    good: nn.Module, tmp_path: Path
) -> None:
    done = quantization(good)
    source = done.provenance["source_sha256"]
    rows = ((BAD[0], 8, None), (BAD[1], 8, 0.1), (BAD[0], 4, 0.05), (BAD[1], 4, 0.01))
    order = worst_first(sensitivity(tmp_path / "s.json", source, rows), done.plans, source)
    assert order[:2] == [BAD[1], BAD[0]]  # of the other there is only what 4 bits did
    mixed = ((BAD[0], 8, 0.1), (BAD[0], 4, 0.9), (BAD[1], 8, 0.2), (BAD[1], 4, 0.3))
    for activations, first in ((8, BAD[1]), (4, BAD[0])):  # at 4-bit inputs none is the site's own: the worst counts
        path = sensitivity(tmp_path / "s.json", source, mixed, activations)
        assert worst_first(path, done.plans, source)[0] == first


def test_results_of_something_else_are_refused(good: nn.Module, tmp_path: Path) -> None:
    done = quantization(good)
    source = done.provenance["source_sha256"]
    for message, path in {
        "other weights than those": sensitivity(tmp_path / "other.json", "0" * 64),
        "no sensitivities": sensitivity(tmp_path / "none.json", source, ()),
        "none of its rows is about a site": sensitivity(tmp_path / "odd.json", source, (("x", 2, 0.1),)),
        "no sensitivities;": Results().to_json(tmp_path / "empty.json"),
    }.items():
        with pytest.raises(InputError, match=message):
            worst_first(path, done.plans, source)


def test_what_the_command_writes_is_read(model: nn.Module, good: nn.Module, images: ImageSet, tmp_path: Path) -> None:
    qclip.sensitivity(model, images, (2, 8), count=8, cache=False).to_json(tmp_path / "results.json")
    done = quantization(good)
    order = worst_first(tmp_path, done.plans, done.provenance["source_sha256"])
    assert sorted(order) == sorted(done.plans)
