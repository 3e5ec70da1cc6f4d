from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qclip.errors import InputError
from qclip.results import COLUMNS, Results


def example() -> Results:
    results = Results(meta={"threads": 2}, notes=["why"])
    results.add(model="float", set="a", role="id", metric="top1", value=0.5, low=0.4, high=0.6, n=10)
    results.add(model="w8a8", set="a", metric="top1", value=0.4, n=10)
    results.add(model="w8a8", set="a", metric="top1", value=-0.1, reference="float", n=10)
    results.add(model="w8a8", set="a", metric="top1", corruption="gaussian_noise", severity=3, value=0.2)
    results.add(model="w8a8", set="a", metric="temperature", value=math.inf)
    results.add(model="w8a8", set="a", metric="ece_ts", value=math.nan)
    results.add(model="w8a8", set="a", metric="top1", axis="group", at="land", value=0.3)
    results.add(
        model="w8a8", set="vision", role="tower", metric="gain", subset="ranks 8-64", axis="band", at=8, value=1
    )
    points = {"fpr": [0, 0.5, 1], "tpr": [0.2, math.nan, math.inf]}
    results.add_curve(points, model="w8a8", set="b", role="ood-far", metric="roc", score="mcm")
    return results


def test_a_row_has_every_column_and_numpy_scalars_become_plain() -> None:
    results = example()
    results.add(metric="x", value=np.float32(0.25), n=np.int64(3), severity=np.int8(2))
    assert all(tuple(row) == COLUMNS for row in results)
    row = results.rows[-1]
    assert (row["value"], row["n"], row["severity"], row["model"], row["low"]) == (0.25, 3, 2, "", None)
    assert type(row["value"]) is float and type(row["n"]) is int


@pytest.mark.parametrize(
    "fields",
    [
        {"metrik": "x"},
        {"value": 1.0},
        {"metric": "x", "value": "1"},
        {"metric": "x", "n": 1.5},
        {"metric": "x", "model": 3},
        {"metric": "x", "value": True},
        {"metric": "x", "axis": "group"},
        {"metric": "x", "at": 3},
        {"metric": "x", "axis": "bin", "at": math.inf},
        {"metric": "x", "axis": "bin", "at": True},
        {"metric": "x", "role": "odd"},
    ],
)
def test_a_malformed_row_is_refused(fields: dict) -> None:
    with pytest.raises(InputError):
        Results().add(**fields)


def test_where_value_unique() -> None:
    results = example()
    assert len(results.where(model="w8a8", metric="top1")) == 4
    assert len(results.where(model=["float", "w8a8"], reference="")) == 7
    assert results.value(model="w8a8", metric="top1") == 0.4
    assert results.value(model="w8a8", metric="top1", reference="float") == -0.1
    assert results.value(model="w8a8", metric="top1", corruption="gaussian_noise", severity=3) == 0.2
    assert results.value(model="w8a8", metric="top1", at="land") == 0.3
    assert results.value(model="w8a8", metric="gain", subset="ranks 8-64", at=8) == 1
    assert results.value(model="nobody", metric="top1") is None
    assert results.unique("model") == ["float", "w8a8"] and results.unique("corruption") == ["gaussian_noise"]
    with pytest.raises(InputError, match="differ in model"):
        results.value(metric="top1")
    with pytest.raises(InputError, match="did you mean 'model'"):
        results.where(modle="float")


def test_json_round_trip_is_strict_json_and_keeps_everything(tmp_path) -> None:
    results = example()
    path = results.to_json(tmp_path / "deep" / "results.json")
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Results.from_json(path)
    assert again.curves == results.curves and again.curves[0]["points"]["tpr"] == [0.2, None, math.inf]
    assert again.rows == results.rows and again.notes == ["why"] and again.meta == {"threads": 2}
    assert again.value(metric="temperature") == math.inf
    assert again.row(metric="ece_ts")["value"] is None
    assert list(path.parent.iterdir()) == [path]
    empty = Results().to_json(tmp_path / "empty.json")
    assert Results.from_json(empty).rows == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = example().to_json(tmp_path / "results.json")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Results().to_json(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "qclip-results", "version": 99, "rows": []}',
        '{"format": "qclip-results", "version": 1, "rows": [1]}',
        '{"format": "qclip-results", "version": 1, "rows": [{"nope": 1}]}',
        '{"format": "qclip-results", "version": 0, "rows": []}',
        '{"format": "qclip-results", "version": true, "rows": []}',
        '{"format": "qclip-results", "version": 2, "rows": [], "curves": [1]}',
        '{"format": "qclip-results", "version": 2, "rows": [], "curves": [{"metric": "roc"}]}',
        '{"format": "qclip-results", "version": 2, "rows": [], "curves": [{"metric": "roc", "points": {"x": 1}}]}',
        '{"format": "qclip-results", "version": 2, "rows": [{"metric": "x", "value": [1]}]}',
        "[" * 100_000,
    ],
)
def test_a_foreign_or_damaged_file_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError):
        Results.from_json(path)
    with pytest.raises(InputError, match="no results file"):
        Results.from_json(tmp_path / "absent.json")


@pytest.mark.parametrize("points", [{}, {"x": [1], "y": [1, 2]}, {"x": ["1"]}, {"x": [True]}])
def test_a_malformed_curve_is_refused(points: dict) -> None:
    with pytest.raises(InputError):
        Results().add_curve(points, metric="roc")


def test_a_curve_is_found_by_the_columns_of_a_row() -> None:
    results = example()
    points = results.curve(metric="roc", model="w8a8", set="b", score="mcm")
    assert points == {"fpr": [0, 0.5, 1], "tpr": [0.2, None, math.inf]}
    assert results.curve(metric="roc", model="float") is None
    assert len(results.where(set="b").curves) == 1 and not results.where(set="a").curves
    assert not results.where(value=1).curves  # curves have no such column


def test_merge_keeps_once_what_both_hold_and_joins_what_each_model_is() -> None:
    one, other = example(), example()
    one.meta = {"threads": 2, "models": {"float": {"source": "a"}}, "command": "x"}
    other.meta = {"threads": 2, "models": {"w8a8": {"source": "b"}}, "command": "y"}
    other.add(model="new", metric="top1", set="a", value=1)
    other.note("another")
    whole = Results.merge(one, other)
    assert len(whole) == len(one) + 1 and len(whole.curves) == 1 and whole.notes == ["why", "another"]
    assert whole.meta == {
        "threads": 2,
        "models": {"float": {"source": "a"}, "w8a8": {"source": "b"}},
        "command": "x",
    }
    whole.rows[0]["value"], whole.meta["models"]["float"] = 9, {}
    assert one.rows[0]["value"] == 0.5 and one.meta["models"]["float"] == {"source": "a"}  # the parts are as they were
    assert Results.merge().rows == []


def test_merge_says_where_facts_differ_and_refuses_two_values_of_one_row() -> None:
    one, other = example(), example()
    other.meta = {"threads": 3}
    assert "threads differ between parts: 2 stands, not 3" in Results.merge(one, other).notes
    other.rows[1]["value"] = 0.41
    with pytest.raises(InputError, match="two results of 'top1' for model 'w8a8' on 'a' differ; rename"):
        Results.merge(one, other)
    other = example()
    other.curves[0]["points"]["tpr"][0] = 0.3
    with pytest.raises(InputError, match="two results of 'roc' for model 'w8a8' on 'b' differ; rename"):
        Results.merge(one, other)


OLD = {
    "format": "qclip-results",
    "version": 1,
    "meta": {"threads": 2},
    "notes": ["why"],
    "rows": [
        {"model": "m", "metric": "model_bytes", "value": 10.0},
        {"model": "m", "metric": "coverage_macs", "subset": "real", "value": 0.9},
        {
            "model": "m",
            "metric": "site_macs",
            "set": "vision.a",
            "subset": "real",
            "score": "cpu",
            "value": 3.0,
            "n": 2,
        },
        {"model": "m", "metric": "top1", "set": "test", "subset": "all", "value": 0.5, "n": 9},
        {
            "model": "m",
            "metric": "top1",
            "set": "test",
            "subset": "all",
            "corruption": "noise",
            "severity": 2,
            "value": 0.4,
        },
        {"model": "m", "metric": "bin_accuracy", "set": "test", "subset": "bin 02", "value": 0.1, "n": 4},
        {"model": "m", "metric": "bin_confidence", "set": "test", "subset": "bin 02", "value": 0.2, "n": 4},
        {"model": "m", "metric": "bin_count", "set": "test", "subset": "bin 02", "value": 4.0, "n": 4},
        {"model": "m", "metric": "bin_accuracy", "set": "test", "subset": "bin 14", "value": 0.9, "n": 5},
        {"model": "m", "metric": "top1", "set": "odd", "subset": "all", "value": 0.3},
        {"model": "m", "metric": "top1", "set": "odd", "subset": "conflict", "value": 0.2},
        {"model": "m", "metric": "worst_group_top1", "set": "odd", "value": 0.2},
        {"model": "m", "metric": "auroc", "set": "far", "subset": "far", "score": "mcm", "value": 0.8},
        {"model": "m", "metric": "roc_tpr", "set": "far", "subset": "fpr 0.050", "score": "mcm", "value": 0.6},
        {"model": "m", "metric": "roc_tpr", "set": "far", "subset": "fpr 1.000", "score": "mcm", "value": "inf"},
        {"model": "m", "metric": "auroc", "set": "mean of 2 OOD sets", "score": "mcm", "value": 0.8},
        {"model": "m", "metric": "singular_value", "set": "vision.a", "subset": "rank 012", "value": 2.0},
        {"model": "m", "metric": "gain", "set": "vision", "subset": "ranks 8-64", "reference": "white", "value": -0.1},
    ],
}


def test_results_of_version_1_are_read_as_rows_and_curves_of_today(tmp_path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(OLD))
    results = Results.from_json(path)
    said = {
        (row["metric"], row["set"], row["role"], row["subset"], row["axis"], row["at"], row["value"]) for row in results
    }
    assert said == {
        ("model_bytes", "", "model", "all", "", None, 10),
        ("coverage_macs", "", "model", "all", "state", "real", 0.9),
        ("site_macs", "vision.a", "site", "all", "state", "real", 3),
        ("top1", "test", "id", "all", "", None, 0.5),
        ("top1", "test", "corrupted", "all", "", None, 0.4),
        ("top1", "odd", "shift", "all", "", None, 0.3),
        ("top1", "odd", "shift", "all", "group", "conflict", 0.2),
        ("worst_group_top1", "odd", "shift", "all", "", None, 0.2),
        ("auroc", "far", "ood-far", "all", "", None, 0.8),
        ("auroc", "mean of 2 OOD sets", "ood-mean", "all", "", None, 0.8),
        ("gain", "vision", "tower", "ranks 8-64", "band", 8, -0.1),
    }
    (site,) = results.where(metric="site_macs")
    assert (site["backend"], site["score"]) == ("cpu", "")
    assert results.curve(metric="reliability", model="m", set="test") == {
        "bin": [2, 14],
        "accuracy": [0.1, 0.9],
        "confidence": [0.2, None],
        "count": [4, None],
    }
    assert results.curve(metric="roc", model="m", set="far", score="mcm") == {"fpr": [0.05, 1], "tpr": [0.6, math.inf]}
    assert results.curve(metric="singular_values", model="m", set="vision.a") == {"rank": [12], "value": [2]}
    assert results.meta == {"threads": 2} and results.notes == ["why"]


def test_a_large_table_is_read_again(tmp_path) -> None:
    """Four models with the spectra of their weights already fill more than the 2 MB that a description may have."""
    results = Results()
    for k in range(12_000):
        results.add(model=f"model {k % 20}", metric="gain", set=f"vision.blocks.{k}.attention.{'q' * 120}", value=1.0)
    path = results.to_json(tmp_path / "results.json")
    assert path.stat().st_size > 2_100_000 and Results.from_json(path).rows == results.rows
