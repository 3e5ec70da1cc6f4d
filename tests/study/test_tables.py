"""Tables show what was measured, with its difference to float, and what there is not."""

from __future__ import annotations

import csv
import io
import math
import shutil
from pathlib import Path

import pytest

import qclip
from qclip.errors import InputError
from qclip.metrics import metric
from qclip.reporting import units
from qclip.study import formats, tables
from qclip.study.found import Asked, find
from qclip.study.run import Ready
from qclip.study.store import StudyStore
from tests.study.small import DATA, OOD, Told


@pytest.fixture
def copy(small: tuple[Ready, Told], tmp_path: Path) -> StudyStore:
    shutil.copytree(small[0].store.folder, tmp_path / "copy")
    return StudyStore.open(tmp_path / "copy")


def test_markdown_shows_value_difference_and_interval(small: tuple[Ready, Told]) -> None:
    ready = small[0]
    found = find(ready.grid, ready.store)
    text = formats.markdown(tables.printed(found, ready.store), found.notes)
    (row,) = (r for r in ready.store.rows().to_pylist() if _is(r, "w4a8", "top1", "float"))
    (own,) = (r for r in ready.store.rows().to_pylist() if _is(r, "w4a8", "top1", ""))
    top1 = units.metric("top1")
    gap = f"{top1.difference(row['value'])} {top1.difference_interval(row['low'], row['high'])}"
    cell = f"{top1.value(own['value'])} ({gap})"
    line = next(line for line in text.splitlines() if line.startswith("| w4a8"))
    assert cell in line and "4/8" in line
    assert f"### scenes-clean on {DATA}\n" in text and "means over severities" in text
    (means,) = (each for each in tables.printed(found, ready.store) if "means over" in each.title)
    assert means.columns[3:] == [f"{metric(name).label} gaussian_noise" for name in ("mean_top1", "mean_ece")]
    assert text.count("| float") == 2 and "scenes-far-ood" in text.splitlines()[2]


def _is(row: dict, variant: str, metric: str, reference: str) -> bool:
    return (row["variant"], row["metric"], row["reference"], row["corruption"]) == (variant, metric, reference, "")


def test_csv_is_exact_and_holds_no_host_unless_asked(small: tuple[Ready, Told]) -> None:
    ready = small[0]
    found = find(ready.grid, ready.store)
    lines = list(csv.DictReader(io.StringIO(formats.comma_separated(found))))
    assert list(lines[0]) == list(formats.COLUMNS)
    stored = {
        (r["variant"], r["metric"], r["set"], r["corruption"], str(r["severity"])): r["value"]
        for r in ready.store.rows().to_pylist()
        if not r["reference"] and r["metric"] in ("top1", "ece") and not r["axis"]
    }
    read = [line for line in lines if line["metric"] in ("top1", "ece")]
    assert len(read) == len(stored)
    for line in read:
        key = tuple(line[name] for name in ("variant", "metric", "set", "corruption", "severity"))
        assert float(line["value"]) == stored[key]
        assert (line["difference"] == "") == (line["variant"] == "float")
    with_host = list(csv.DictReader(io.StringIO(formats.comma_separated(found, Asked(where=True)))))
    assert with_host[0]["host"] and float(with_host[0]["seconds"]) > 0


def test_one_corruption_is_shown_at_each_severity(small: tuple[Ready, Told]) -> None:
    asked = Asked(corruption="gaussian_noise", metrics=("top1",))
    found = find(small[0].grid, small[0].store, asked)
    (one,) = tables.printed(found, small[0].store, asked)
    assert one.title.endswith("under gaussian_noise") and len(one.rows) == 3
    top1, mean = (metric(name).label for name in ("top1", "mean_top1"))
    assert [column.replace(" scenes-test", "") for column in one.columns[3:]] == [
        f"{top1} uncorrupted",
        f"{top1} severity 3",
        mean,
    ]


def test_latex_escapes_what_would_be_commands(small: tuple[Ready, Told]) -> None:
    text = formats.latex([tables.Printed("t", ["a_b", "c & d"], [["71.3 %", f"{units.MINUS}1"]], ["note"])])
    assert r"a\_b & c \& d \\" in text and r"71.3 \% & $-$1 \\" in text and text.count(r"\hline") == 3


def test_joint_wins_are_those_of_evaluate(small: tuple[Ready, Told]) -> None:
    """The same count, and about the chance, of models that are evaluated together."""
    model = qclip.load_model("scenes-clean")
    group = {"float": model} | {name: qclip.quantize(model, name) for name in ("w8a8", "w4a8")}
    said = {
        "scores": ["mcm"],
        "measurements": ["ood"],
        "corruptions": (),
        "cache": False,
        "replicates": 50,
        "batch": 32,
    }
    results = qclip.evaluate(group, DATA, {"far": [OOD]}, **said)  # type: ignore[arg-type]
    found = find(small[0].grid, small[0].store)
    (wins,) = (t for t in tables.printed(found, small[0].store) if t.title.endswith("joint wins"))
    assert wins.rows[0][:2] == ["2", f"{results.value(metric='wins', score='mcm', reference='float'):.0f}"]
    chance = results.value(metric="wins_expected", score="mcm", reference="float")
    assert chance is not None and float(wins.rows[0][2]) == pytest.approx(chance, abs=0.35)


def test_what_is_missing_and_what_is_undefined_is_said(copy: StudyStore, small: tuple[Ready, Told]) -> None:
    grid, runtime = small[0].grid, small[0].work.runtime
    cell = grid.blocks[1].cells[""]
    next((copy.folder / "results" / runtime).glob(f"{cell}-*")).unlink()
    missing = find(grid, copy)
    text = formats.markdown(tables.printed(missing, copy), missing.notes)
    assert "1 cells are not measured yet" in text and "missing" in next(x for x in text.splitlines() if "w8a8" in x)
    rows = small[0].store.rows(cells={cell}).to_pylist()
    for row in rows:
        if row["metric"] == "ece" and not row["reference"]:
            row |= {"value": math.nan, "low": None, "high": None, "reason": "it is of one class"}
    import pyarrow as pa

    from qclip.study.rows import SCHEMA

    copy.write(runtime, cell, pa.Table.from_pylist(rows, SCHEMA), "{}", None)
    found = find(grid, copy)
    text = formats.markdown(tables.printed(found, copy), found.notes)
    assert "undefined: it is of one class" in text and ",nan," in formats.comma_separated(found)


def test_cells_of_two_runtimes_are_not_mixed_unsaid(copy: StudyStore, small: tuple[Ready, Told]) -> None:
    grid, runtime = small[0].grid, small[0].work.runtime
    folder = copy.folder / "results"
    cell = grid.blocks[1].cells[""]
    (folder / "other").mkdir()
    path = next((folder / runtime).glob(f"{cell}-*"))
    rows = small[0].store.rows(cells={cell}).to_pylist()
    import pyarrow as pa

    from qclip.study.rows import SCHEMA

    path.unlink()
    copy.write("other", cell, pa.Table.from_pylist([r | {"runtime": "other"} for r in rows], SCHEMA), "{}", None)
    found = find(grid, copy)
    assert found.runtimes == [runtime, "other"] and "2 runtimes" in found.notes[0]
    assert formats.comma_separated(found) == formats.comma_separated(find(grid, small[0].store))


def test_an_unknown_metric_names_the_nearest(small: tuple[Ready, Told]) -> None:
    with pytest.raises(InputError, match="'top1'"):
        find(small[0].grid, small[0].store, Asked(("topp1",)))
