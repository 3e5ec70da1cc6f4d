"""Means over runs: intervals that hold images and seeds, p values, and Holm's family."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

import qclip
from qclip.errors import InputError
from qclip.metrics.paired import holm
from qclip.reliability.runs import JUDGED, checked_runs, correct, over_runs, student_p, student_quantile
from qclip.results import Results


@pytest.mark.parametrize("degrees", [1.0, 2.0, 2.7, 10.0, 333.3, 5e5, np.inf])
def test_student_s_distribution_is_scipy_s(degrees: float) -> None:
    for t in (0.0, 0.3, -2.5, 7.0):
        assert student_p(t, degrees) == pytest.approx(2 * scipy.stats.t.sf(abs(t), degrees), rel=2e-5, abs=1e-12)
    assert student_quantile(0.95, degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-5)


def test_intervals_hold_the_mean_of_all_seeds_and_images_as_often_as_they_say() -> None:
    rng, hits, alone, rounds = np.random.default_rng(0), 0, 0, 400
    for _ in range(rounds):
        images = rng.normal(0, 1, 60)  # what all runs share
        seeds = rng.normal(0, 0.25, 3)
        counts = rng.multinomial(60, np.full(60, 1 / 60), 200)
        drawn = [np.concatenate([[(images + s).mean()], counts @ (images + s) / 60]) for s in seeds]
        found = over_runs(drawn, 200)
        hits += found.low <= 0 <= found.high
        low, high = np.quantile(np.mean(drawn, 0)[1:], [0.025, 0.975])
        alone += low <= 0 <= high
    assert 0.92 <= hits / rounds <= 0.985
    assert alone / rounds < 0.9  # which the images alone do not


def test_an_interval_by_hand() -> None:
    """Welch and Satterthwaite: the variance over images, and that over runs divided by their number."""
    values, noise = np.array([0.1, 0.3, 0.2, 0.4]), 0.05 * np.random.default_rng(2).normal(size=500)
    found = over_runs([np.concatenate([[value], value + noise]) for value in values], 500)
    images, runs = noise.var(ddof=1), values.var(ddof=1) / 4
    degrees = (images + runs) ** 2 / (runs**2 / 3)
    half = scipy.stats.t.ppf(0.975, degrees) * np.sqrt(images + runs)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half))


def test_one_run_and_runs_that_agree_have_the_images_alone() -> None:
    rng = np.random.default_rng(1)
    drawn = np.concatenate([[0.3], 0.3 + 0.1 * rng.normal(size=5000)])
    one, same = over_runs([drawn], 5000), over_runs([drawn, drawn, drawn], 5000)
    assert one == same
    assert (one.low, one.high) == pytest.approx((0.3 - 0.196, 0.3 + 0.196), abs=0.005)
    assert one.p == pytest.approx(2 * scipy.stats.norm.sf(3), rel=0.15)
    still = over_runs([np.zeros(101)] * 2, 100)
    assert (still.value, still.low, still.high, still.p) == (0, 0, 0, 1)
    assert np.isnan(over_runs([np.full(101, 0.2)], 100).p)  # it differs by the same everywhere: nothing can be said
    assert np.isnan(over_runs([np.full(101, np.nan), drawn[:101]], 100).value)


def test_holm_s_family_is_what_is_judged() -> None:
    results = Results()
    given = {"top1": 0.01, "ece": 0.03, "auroc": 0.02, "mean_top1": 0.5, "brier": 0.001}
    for name, p in given.items():
        role = {"auroc": "ood", "mean_top1": "corrupted"}.get(name, "id")
        fields = {"set": "s", "role": role, "score": "mcm" if name == "auroc" else "", "reference": "float"}
        fields["corruption"] = "fog" if name == "mean_top1" else ""
        results.add(metric="difference_p", value=p, model="r", axis="metric", at=name, **fields)
        if name == "top1":
            results.add(metric="difference_p", value=p, model="r", axis="metric", at=name, **fields | {"subset": "few"})
    correct(results)
    found = {row["at"]: row["value"] for row in results.where(metric="difference_holm_p")}
    names = [name for name in given if name in JUDGED]
    assert found == dict(zip(names, holm([given[name] for name in names]), strict=True))
    assert "Holm's family is 4 tests" in results.notes[-1]


def test_runs_that_are_none() -> None:
    models = ("float", "a 0", "a 1", "b 0")
    assert checked_runs({"a": ["a 0", "a 1"]}, models) == {"a": ("a 0", "a 1")}
    for runs, told in (
        ({"float": ["a 0"]}, "'float' is a model"),
        ({"a": ["c 0"]}, "the run 'c 0' of 'a' is none of the models"),
        ({"a": ["float"]}, "the run 'float' of 'a' is none"),
        ({"a": ["a 0", "a 0"]}, "each named once"),
        ({"a": []}, "each named once"),
        ({"a": ["a 0", "a 1"], "b": ["b 0"]}, "all must be as many"),
    ):
        with pytest.raises(InputError, match=told):
            checked_runs(runs, models)


def test_means_and_their_differences_stand_in_results() -> None:
    model = qclip.load_model("scenes-clean")
    small = {name: qclip.quantize(model, name) for name in ("w4a8", "w3a8", "w2a8", "w8a8")}
    results = qclip.evaluate(
        {"float": model, **small},
        "scenes:test?samples=60",
        ["scenes:far-ood?samples=30"],
        scores=["mcm"],
        measurements=["clean", "ood"],
        cache=False,
        runs={"few": ["w2a8", "w3a8"], "more": ["w4a8", "w8a8"]},
    )
    for metric, where in (("top1", {}), ("auroc", {"score": "mcm"})):
        (where["set"],) = results.where(metric=metric, model="few").unique("set")
        each = {name: results.value(model=name, metric=metric, **where) for name in small}
        few, more = (each["w2a8"] + each["w3a8"]) / 2, (each["w4a8"] + each["w8a8"]) / 2
        assert results.value(model="few", metric=metric, **where) == pytest.approx(few)
        row = results.row(model="few", metric=metric, reference="more", **where)
        assert row["value"] == pytest.approx(few - more) and row["low"] < row["value"] < row["high"]
        assert results.row(model="more", metric=metric, reference="few", **where) is None
        one = results.row(model="more", metric=metric, reference="float", **where)
        assert one["value"] == pytest.approx(more - results.value(model="float", metric=metric, **where))
        p = results.row(model="few", metric="difference_p", axis="metric", at=metric, reference="more", **where)
        corrected = results.row(
            model="few", metric="difference_holm_p", axis="metric", at=metric, reference="more", **where
        )
        assert 0 < p["value"] <= corrected["value"] <= 1
    assert {row["recipe"] for row in results.where(model="few", metric="top1")} == {"w2a8"}
    assert "Top-1" in qclip.table(results)
