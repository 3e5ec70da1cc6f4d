"""What many people chose, from a file beside a set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qclip.data import load
from qclip.errors import DataError

NAMES = ["ant", "fire engine", "cat"]
COUNTS = np.array([[7, 2, 0], [1, 9, 0], [0, 3, 6], [8, 1, 1], [0, 9, 1], [1, 1, 9]])
LABELS = [0, 1, 2, 0, 1, 2]


@pytest.fixture
def images(tmp_path: Path) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    table = pa.table({"image": [stream.getvalue()] * 6, "label": LABELS, "first": [True] * 3 + [False] * 3})
    pq.write_table(
        table.replace_schema_metadata({"classes": '["ant", "fire engine", "cat"]'}), tmp_path / "set.parquet"
    )
    return f"parquet:{tmp_path / 'set.parquet'}"


def written(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_a_column_per_class_is_found_by_name_and_a_row_by_its_index(images: str, tmp_path: Path) -> None:
    order = [4, 1, 5, 0, 3, 2]
    columns = {"n_Fire_Engine": COUNTS[order, 1], "n_cat": COUNTS[order, 2], "n_ant": COUNTS[order, 0], "index": order}
    file = written(tmp_path / "people.parquet", **columns)
    assert load(f"{images}?counts={file}").counts.tolist() == COUNTS.tolist()
    some = load(f"{images}?counts={file}&where=first")
    assert some.counts.tolist() == COUNTS[:3].tolist()
    drawn = load(f"{images}?counts={file}&samples=4&seed=3")
    assert drawn.counts.tolist() == COUNTS[drawn.rows].tolist()
    classes = tmp_path / "classes.txt"
    classes.write_text("dog\ncat\nfire engine\nant\n")
    named = load(f"{images}?counts={file}", classes_file=classes)
    assert named.counts.tolist() == np.stack([0 * COUNTS[:, 0], *COUNTS.T[[2, 1, 0]]], axis=1).tolist()
    assert load(images).counts is None


def test_a_column_of_lists_is_in_the_order_of_the_classes(images: str, tmp_path: Path) -> None:
    file = written(tmp_path / "people.parquet", counts=COUNTS.tolist())
    assert load(f"{images}?counts={file}").counts.tolist() == COUNTS.tolist()


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"n_ant": [1] * 6, "n_cat": [1] * 6}, "its 2 columns n_NAME are not the 3 of"),
        ({"n_ant": [1] * 6, "n_cat": [1] * 6, "n_fire truck": [1] * 6}, "'fire truck' is not a class"),
        ({"people": [1] * 6}, "has no column 'counts' and none that begins with 'n_'"),
        ({"counts": COUNTS[:, :2].tolist()}, "must hold 3 whole numbers for each image"),
        ({"counts": [[0.5, 0.5, 0.0]] * 6}, "must hold 3 whole numbers for each image"),
        ({"counts": COUNTS[:5].tolist()}, "1 of 6 images of .* have no row in it, the first is row 5"),
        ({"counts": COUNTS.tolist(), "index": [0, 1, 2, 3, 4, 4]}, "an index stands in it twice"),
        ({"counts": COUNTS.tolist(), "index": [0.0] * 6}, "column 'index' .* must hold one whole number"),
        ({"counts": (-COUNTS).tolist()}, "a count is negative"),
        ({"counts": COUNTS[:, [1, 2, 0]].tolist()}, "the label of only 0 % of the images"),
        ({"counts": []}, "has no rows"),
    ],
)
def test_counts_that_do_not_fit_are_refused(images: str, tmp_path: Path, columns: dict, why: str) -> None:
    file = written(tmp_path / "people.parquet", **columns)
    with pytest.raises(DataError, match=f"people.parquet.*{why}"):
        load(f"{images}?counts={file}")


def test_what_is_no_such_file_is_refused(images: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("7, 2, 0")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        load(f"{images}?counts={tmp_path / 'text'}")
    with pytest.raises(DataError, match="nowhere"):
        load(f"{images}?counts={tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="only a Parquet set has rows to count people for"):
        load(f"folder:{tmp_path}?counts={tmp_path / 'text'}")
