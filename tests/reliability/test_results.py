from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qclip.errors import InputError
from qclip.reliability.results import COLUMNS, Results


def example() -> Results:
    results = Results(meta={"threads": 2}, notes=["why"])
    results.add(model="float", set="a", subset="all", metric="top1", value=0.5, low=0.4, high=0.6, n=10)
    results.add(model="w8a8", set="a", subset="all", metric="top1", value=0.4, n=10)
    results.add(model="w8a8", set="a", subset="all", metric="top1", value=-0.1, reference="float", n=10)
    results.add(model="w8a8", set="a", subset="all", metric="top1", corruption="gaussian_noise", severity=3, value=0.2)
    results.add(model="w8a8", set="a", subset="all", metric="temperature", value=math.inf)
    results.add(model="w8a8", set="a", subset="all", metric="ece_ts", value=math.nan)
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
    ],
)
def test_a_malformed_row_is_refused(fields: dict) -> None:
    with pytest.raises(InputError):
        Results().add(**fields)


def test_where_value_unique() -> None:
    results = example()
    assert len(results.where(model="w8a8", metric="top1")) == 3
    assert len(results.where(model=["float", "w8a8"], reference="")) == 5
    assert results.value(model="w8a8", metric="top1") == 0.4
    assert results.value(model="w8a8", metric="top1", reference="float") == -0.1
    assert results.value(model="w8a8", metric="top1", corruption="gaussian_noise", severity=3) == 0.2
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
    ],
)
def test_a_foreign_or_damaged_file_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError):
        Results.from_json(path)
    with pytest.raises(InputError, match="no results file"):
        Results.from_json(tmp_path / "absent.json")
