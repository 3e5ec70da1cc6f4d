"""The store keeps whole files under their checksums, and anybody's tools open it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest

from qclip.errors import InputError
from qclip.study import folder
from qclip.study.rows import SCHEMA
from qclip.study.run import Ready, artifacts
from qclip.study.store import ABOUT, StudyStore
from qclip.study.upkeep import compact, gc
from tests.study.small import Told


def rows_of(cell: str, **fields: object) -> pa.Table:
    row = {"cell": cell, "runtime": "r", "variant": "w8a8", "metric": "top1", "value": 0.5} | fields
    return pa.Table.from_pylist([row], SCHEMA)


@pytest.fixture
def copy(small: tuple[Ready, Told], tmp_path: Path) -> StudyStore:
    shutil.copytree(small[0].store.folder, tmp_path / "copy")
    return StudyStore.open(tmp_path / "copy")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = StudyStore.create(tmp_path / "s")
    store.fail("r", "a" * 32, {"error": "boom"})
    store.write("r", "a" * 32, rows_of("a" * 32, value=math.nan, reason="one class"), "{}", None)
    assert store.measured("r") == {"a" * 32} and store.failed("r") == {} and store.details("r", "a" * 32) == "{}"
    (row,) = store.rows().to_pylist()
    assert math.isnan(row["value"]) and row["reason"] == "one class"
    assert len(store.rows(cells={"b" * 32})) == 0 and store.measured("other") == set()


def test_an_edited_file_is_refused_by_name(copy: StudyStore) -> None:
    path = next((copy.folder / "results").rglob("*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="checksum") as caught:
        copy.rows()
    assert path.name in str(caught.value)


def test_a_file_under_another_cell_s_name_is_refused(copy: StudyStore) -> None:
    """Its checksum is right: it tells of the content alone."""
    (runtime,) = copy.measured_under()
    one, other = sorted((copy.folder / "results" / runtime).iterdir())[:2]
    moved = other.with_name(other.name.partition("-")[0] + "-" + one.name.partition("-")[2])
    other.unlink()
    shutil.copy(one, moved)
    found = StudyStore.open(copy.folder)
    with pytest.raises(InputError, match="not hold the rows of its cell; remove it, and run the plan again") as caught:
        found.rows(columns=["value"])
    assert moved.name in str(caught.value)
    moved.unlink()
    copy.write(runtime, "a" * 32, rows_of("a" * 32).slice(1), "{}", None)
    with pytest.raises(InputError, match="not hold the rows of its cell"):
        found.rows(columns=["value"])


def test_a_newer_or_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    store = StudyStore.create(tmp_path / "s")
    (store.folder / ABOUT).write_text(json.dumps({"format": "qclip-study", "version": 2}))
    with pytest.raises(InputError, match="format 2, this version reads up to 1"):
        StudyStore.create(store.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    for open_it in (StudyStore.create, StudyStore.open):
        with pytest.raises(InputError, match="no store of studies"):
            open_it(tmp_path / "other")
    (store.folder / ABOUT).write_text("[]")
    with pytest.raises(InputError, match="does not describe a store"):
        StudyStore.open(store.folder)


def test_compacting_changes_no_row_and_no_cell(copy: StudyStore) -> None:
    def lines(store: StudyStore) -> list[str]:
        return sorted(repr(row) for row in store.rows().to_pylist())

    (runtime,) = (path.name for path in (copy.folder / "results").iterdir())
    before, cells = lines(copy), copy.measured(runtime)
    assert compact(copy) == (6, 1)
    assert lines(copy) == before and StudyStore.open(copy.folder).measured(runtime) == cells
    copy.write(runtime, "f" * 32, rows_of("f" * 32), "{}", None)
    assert compact(copy) == (2, 1) and len(copy.rows()) == len(before) + 1
    assert len(copy.rows(cells={next(iter(cells))})) > 0


def test_what_others_are_removed_for_is_on_the_disk(copy: StudyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = folder.write_atomic, {}

    def writing(path: Path, content: bytes, sync: bool = True) -> None:
        synced[path.name.partition("-")[0]] = sync
        real(path, content, sync)

    monkeypatch.setattr(folder, "write_atomic", writing)
    compact(copy)
    copy.write("r", "a" * 32, rows_of("a" * 32), "{}", None)
    assert synced == {"all": True, "a" * 32: False}


def test_a_cell_that_two_runs_wrote_counts_once(tmp_path: Path) -> None:
    store = StudyStore.create(tmp_path / "s")
    for seconds in (1.0, 2.0):
        store.write("r", "a" * 32, rows_of("a" * 32, seconds=seconds), "{}", None)
    assert len(list((store.folder / "results").rglob("*.parquet"))) == 2 and len(store.rows()) == 1
    compact(store)
    assert len(store.rows()) == 1
    store.write("r", "a" * 32, rows_of("a" * 32, seconds=3.0), "{}", None)  # a third, too late
    assert compact(store) == (2, 1) and len(store.rows()) == 1
    both = pa.concat_tables([rows_of("a" * 32), rows_of("b" * 32)])
    store.write_many("r", both)  # of another run, compacted too
    assert sorted(store.rows(columns=["cell"])["cell"].to_pylist()) == ["a" * 32, "b" * 32]


def test_gc_keeps_what_is_named(copy: StudyStore, small: tuple[Ready, Told]) -> None:
    grid = small[0].grid
    kept = set(grid.blocks[1].cells.values())
    before = len(copy.rows(cells=kept))
    models = {key for key in artifacts(grid).values() if key}
    runtime = small[0].work.runtime
    copy.fail(runtime, "f" * 32, {"error": "of another plan"})
    (copy.folder / "methods").mkdir(exist_ok=True)
    (copy.folder / "methods" / "block").write_text("of a run that was killed")
    files, size = gc(copy, kept, models)
    for kind in ("samples", "details", "results"):
        assert {path.name[:32] for path in (copy.folder / kind / runtime).iterdir()} == kept
    assert copy.failed(runtime) == {}
    assert files > 8 and size > 0 and not (copy.folder / "embeddings").exists()
    assert not (copy.folder / "methods").exists()
    assert {row["variant"] for row in copy.rows().to_pylist()} == {"w8a8"} and len(copy.rows()) == before
    assert len(list((copy.folder / "artifacts").iterdir())) == 2
    compact(copy)
    assert gc(copy, set(), set())[0] >= 1 and len(copy.rows()) == 0
    assert not any((copy.folder / "artifacts").iterdir())


def test_gc_of_a_compacted_store_keeps_what_is_named(copy: StudyStore, small: tuple[Ready, Told]) -> None:
    kept = set(small[0].grid.blocks[1].cells.values())
    before = copy.rows(cells=kept)
    compact(copy)
    gc(copy, set(small[0].grid.cells()), set())
    assert len(copy.rows()) == len(small[0].store.rows())
    gc(copy, kept, set())
    assert set(copy.rows(columns=["cell"])["cell"].to_pylist()) == kept and len(copy.rows()) == len(before)
    gc(copy, set(), set())
    assert not list((copy.folder / "results").rglob("*.parquet"))


def test_nothing_is_removed_while_a_run_uses_the_store(copy: StudyStore) -> None:
    with copy.lock("store", shared=True):
        for remove in (lambda: compact(copy), lambda: gc(copy, set(), set())):
            with pytest.raises(InputError, match="a run is using"):
                remove()
    compact(copy)


def test_anybody_reads_the_rows(small: tuple[Ready, Told]) -> None:
    folder = small[0].store.folder / "results"
    rows = pyarrow.dataset.dataset(folder, format="parquet").to_table()
    assert rows.num_rows == len(small[0].store.rows()) and rows.schema.equals(SCHEMA)


def test_duckdb_reads_the_rows(small: tuple[Ready, Told]) -> None:
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb")
    where = f"read_parquet('{small[0].store.folder}/results/**/*.parquet')"
    asked = f"SELECT variant, avg(value) FROM {where} WHERE metric = 'top1' AND reference = '' GROUP BY 1 ORDER BY 1"
    assert [row[0] for row in duckdb.sql(asked).fetchall()] == ["float", "w4a8", "w8a8"]


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_data_frames_read_the_rows(package: str, small: tuple[Ready, Told]) -> None:
    frames = pytest.importorskip(package, reason=f"needs {package}")
    folder = small[0].store.folder / "results"
    rows = frames.read_parquet(folder if package == "pandas" else f"{folder}/**/*.parquet")
    assert len(rows) == len(small[0].store.rows())
