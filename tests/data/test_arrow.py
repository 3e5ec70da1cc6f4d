"""Hugging Face data sets: objects (a stand-in that answers as `datasets.Dataset` does) and saved folders."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qclip import data
from qclip.data.parquet_columns import Columns
from qclip.data.sources import load
from qclip.errors import DataError

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 10, 20)).save(stream, "PNG")
    return stream.getvalue()


def table(shades: list[int], **more: Any) -> pa.Table:
    cells = [{"bytes": png(shade), "path": None} for shade in shades]
    return pa.table({"image": pa.array(cells, IMAGE), **more})


class Feature:
    def __init__(self, names: list[str]) -> None:
        self.names = names


class Dataset:
    """What is asked of `datasets.Dataset`, over one table."""

    split, info = "test", type("Info", (), {"dataset_name": "pets"})()

    def __init__(self, of: pa.Table, names: list[str] | None = None) -> None:
        self.table, self.features = of, {} if names is None else {"label": Feature(names)}
        self.column_names = of.column_names
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.table.num_rows

    def select_columns(self, names: list[str]) -> Dataset:
        found = Dataset(self.table.select(names))
        found.asked = self.asked
        return found

    def with_format(self, kind: str) -> Dataset:
        assert kind == "arrow"
        return self

    def __getitem__(self, key: int | slice) -> pa.Table:
        if isinstance(key, int):
            self.asked.append(key)
            return self.table.slice(key, 1)
        return self.table


def save(folder: Path, *tables: pa.Table, names: list[str] | None = None) -> None:
    folder.mkdir(parents=True)
    files = [f"data-{k:05d}-of-{len(tables):05d}.arrow" for k in range(len(tables))]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    for file, each in zip(files, tables, strict=True):
        each = each.replace_schema_metadata(metadata)
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, each.schema) as writer:
            writer.write_table(each)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))


def test_an_object_is_read_by_columns_and_its_images_only_when_asked_for() -> None:
    given = Dataset(table([1, 2, 3], label=[1, 0, 1], captions=[["a"], ["b", "c"], []]), ["cat", "dog"])
    found = data.from_dataset(given)
    assert (found.name, found.classes, found.labels.tolist()) == ("pets-test", ["cat", "dog"], [1, 0, 1])
    assert found.captions == [["a"], ["b", "c"], []] and given.asked == []
    assert [image.getpixel((0, 0)) for image in found.images([2, 0])] == [(3, 10, 20), (1, 10, 20)]
    assert given.asked == [2, 0]
    other = data.from_dataset(Dataset(table([1, 2, 4], label=[1, 0, 1]), ["cat", "dog"]))
    assert other.select([0, 1]).digest == found.select([0, 1]).digest != found.select([1, 0]).digest
    assert other.digest != found.digest


def test_texts_are_classes_flags_are_subsets_and_columns_have_names() -> None:
    given = table([1, 2], kind=["dog", "cat"], indoors=[True, False]).rename_columns(["picture", "kind", "indoors"])
    found = data.from_dataset(Dataset(given), Columns(image="picture", label="kind"))
    assert found.classes == ["cat", "dog"] and found.labels.tolist() == [1, 0]
    assert found.groups["indoors"].tolist() == [True, False] and "are classes" in found.label_notes[0]


def test_images_without_bytes_are_read_from_the_users_own_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "gone.png")] + [None]
    given = pa.table({"image": pa.array(cells, IMAGE)})
    found = list(data.from_dataset(Dataset(given)).read([0, 1, 2]))
    assert found[0].getpixel((0, 0)) == (7, 10, 20)
    assert "gone.png: cannot be read (No such file" in str(found[1]) and "row 2: no image" in str(found[2])
    save(tmp_path / "saved", given)
    assert "holds no bytes of it" in str(next(iter(load(f"hf:{tmp_path / 'saved'}").read([0]))))


def test_what_is_no_set_is_refused() -> None:
    with pytest.raises(DataError, match="of a DatasetDict give one split"):
        data.from_dataset({"train": 1})
    with pytest.raises(DataError, match="no column 'image'"):
        data.from_dataset(Dataset(pa.table({"img": [1]})))


def test_evaluate_and_calibration_take_an_object() -> None:
    from qclip.reliability.sets import evaluated_sets
    from qclip.results import Results

    given = Dataset(table([1, 2], label=[1, 0]), ["cat", "dog"])
    sets = evaluated_sets(Results(), given, (), given, (), None, None, None, (), None, None)
    assert [(each.name, each.role) for each in sets] == [("pets-test", "id"), ("pets-test (2)", "ood")]
    assert data.is_set(given) and not data.is_set([given]) and not data.is_set(np.zeros(3))


def test_a_saved_folder_and_its_splits(tmp_path: Path) -> None:
    save(tmp_path / "all" / "train", table([5], label=[0]), names=["cat", "dog"])
    save(tmp_path / "all" / "test", table([1, 2], label=[1, 0]), table([3], label=[1]), names=["cat", "dog"])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = load(f"hf:{tmp_path / 'all'}")
    assert (found.name, found.classes, found.labels.tolist()) == ("test", ["cat", "dog"], [1, 0, 1])
    assert [image.getpixel((0, 0))[0] for image in found.images([2, 0])] == [3, 1]
    assert len(load(f"hf:{tmp_path / 'all'}?split=train")) == len(load(f"hf:{tmp_path / 'all' / 'train'}")) == 1
    with pytest.raises(DataError, match="no split 'val'; known: train, test"):
        load(f"hf:{tmp_path / 'all'}?split=val")
    with pytest.raises(DataError, match="holds one split"):
        load(f"hf:{tmp_path / 'all' / 'train'}?split=train")


def test_a_saved_folder_without_its_image_column_is_named(tmp_path: Path) -> None:
    one = table([1], label=[0])
    save(tmp_path / "set", one.rename_columns(["img", "label"]))
    with pytest.raises(DataError, match="no column 'image'; .*img"):
        load(f"hf:{tmp_path / 'set'}")
    assert len(load(f"hf:{tmp_path / 'set'}?image=img")) == 1
    save(tmp_path / "twice", one.append_column("image", one["image"]))
    with pytest.raises(DataError, match="no column 'image'|image"):
        load(f"hf:{tmp_path / 'twice'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state.json": None}, "no state.json"),
        ({"state.json": b"{}"}, "'_data_files' is no list"),
        ({"state.json": b'{"_data_files": [{"filename": "../test.arrow"}]}'}, "is no name of a file in it"),
        ({"state.json": b'{"_data_files": ["x"]}'}, "is no name of a file in it"),
        ({"data-00000-of-00001.arrow": b"ARROW?"}, "not a readable Arrow file"),
        ({"data-00000-of-00001.arrow": None}, "not a readable Arrow file"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    save(tmp_path / "set", table([1, 2], label=[1, 0]), names=["cat", "dog"])
    for name, content in change.items():
        (tmp_path / "set" / name).unlink()
        if content is not None:
            (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(f"hf:{tmp_path / 'set'}")


def test_offsets_that_lead_out_of_the_file_are_refused(tmp_path: Path) -> None:
    """Arrow follows them unasked: what is read from there is of somebody else, or ends the process."""
    save(tmp_path / "set", table([1, 2], captions=["abcd", "efgh"]))
    assert load(f"hf:{tmp_path / 'set'}").captions == [["abcd"], ["efgh"]]
    file = tmp_path / "set" / "data-00000-of-00001.arrow"
    content, offsets = file.read_bytes(), struct.pack("<3i", 0, 4, 8)
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, struct.pack("<3i", 0, 4, 2**30)))
    with pytest.raises(DataError, match="not a readable Arrow file"):
        load(f"hf:{tmp_path / 'set'}")


def test_a_file_cut_in_the_middle_is_named(tmp_path: Path) -> None:
    save(tmp_path / "set", table([1] * 50, label=[0] * 50), names=["cat"])
    file = tmp_path / "set" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match="not a readable Arrow file"):
        load(f"hf:{tmp_path / 'set'}")
