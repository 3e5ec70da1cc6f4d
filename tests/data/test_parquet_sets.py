"""Parquet as Hugging Face writes it: class names in metadata, columns by option, shards, structs; and hostile ones."""

from __future__ import annotations

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qclip.data import UnreadableImage, load, parquet
from qclip.errors import DataError


def encoded(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(path, n=4, metadata=None, features=None, start=0, row_group_size=2, **columns):
    """`features`: label columns and their names, as `datasets` writes them."""
    columns = {"image": [encoded(start + i) for i in range(n)], **columns}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    metadata = dict(metadata or {})
    if features is not None:
        described = {name: {"names": names, "_type": "ClassLabel"} for name, names in features.items()}
        metadata["huggingface"] = {"info": {"features": {"image": {"_type": "Image"}, **described}}, "fingerprint": "x"}
    if metadata:
        table = table.replace_schema_metadata({k: json.dumps(v) for k, v in metadata.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def values(data) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in data.read(range(len(data)))]


def structs(n, **path):
    return [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(n)]


def test_class_names_of_hugging_face(tmp_path):
    path = write(
        tmp_path / "x.parquet", image=structs(4), label=[0, 1, 2, 0], features={"label": ["ant", "bee", "cow"]}
    )
    data = load(f"parquet:{path}")
    assert data.classes == ["ant", "bee", "cow"] and data.labels.tolist() == [0, 1, 2, 0]
    assert values(data) == [0, 1, 2, 3] and data.label_notes == []


def test_columns_by_option(tmp_path):
    names = {"fine_label": ["ant", "bee", "cow"], "coarse_label": ["insect", "mammal"]}
    columns = {"img": structs(3), "fine_label": [2, 1, 0], "coarse_label": [1, 0, 0], "text": ["x", "y", "z"]}
    path = write(tmp_path / "x.parquet", n=3, image=None, features=names, **columns)
    fine = load(f"parquet:{path}?image=img&label=fine_label&captions=text")
    assert fine.classes == names["fine_label"] and fine.labels.tolist() == [2, 1, 0] and values(fine) == [0, 1, 2]
    assert fine.captions == [["x"], ["y"], ["z"]]
    coarse = load(f"parquet:{path}?image=img&label=coarse_label")
    assert coarse.classes == names["coarse_label"] and coarse.labels.tolist() == [1, 0, 0]
    assert coarse.digest == fine.digest  # the same pictures
    for query, match in (
        ("", r"no column 'image'; it has img, .*name another with \?image=NAME"),
        ("?image=img&label=fine", "no column 'fine'"),
        ("?image=text", "'text' holds string, not the bytes"),
        ("?images=img", r"unknown option 'images'; did you mean 'image'"),
    ):
        with pytest.raises(DataError, match=match):
            load(f"parquet:{path}{query}")
    with pytest.raises(DataError, match="only a Parquet file and a saved data set have columns"):
        load(f"folder:{tmp_path}?label=x")


def test_two_image_columns_are_two_sets(tmp_path):
    path = write(tmp_path / "x.parquet", n=2, other=[encoded(9), encoded(8)])
    one, two = load(f"parquet:{path}"), load(f"parquet:{path}?image=other")
    assert values(two) == [9, 8] and one.digest != two.digest


def test_shards_of_a_folder_or_a_pattern_are_read_in_natural_order(tmp_path):
    for number in range(11):
        write(
            tmp_path / f"part-{number}.parquet", n=2, start=2 * number, label=[number] * 2, metadata={"classes": NAMES}
        )
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    (tmp_path / "README.md").write_text("")
    for spec in (
        f"parquet:{tmp_path}",
        f"parquet:{tmp_path}/part-*.parquet",
        f"parquet:{tmp_path}/part-[0-9]*.parquet",
    ):
        data = load(spec)
        assert values(data) == list(range(22)) and data.labels.tolist() == [i // 2 for i in range(22)]
        assert data.classes == NAMES and values(data.select([21, 3, 4])) == [21, 3, 4]
    assert load(f"parquet:{tmp_path}/part-1*.parquet").labels.tolist() == [1, 1, 10, 10]
    assert len({load(f"parquet:{tmp_path}/{name}").digest for name in ("part-*", "part-1*", "part-1.parquet")}) == 3
    with pytest.raises(DataError, match="no file matches"):
        load(f"parquet:{tmp_path}/none*.parquet")


NAMES = [f"class {k}" for k in range(11)]


def test_splits_are_found_by_the_names_of_shards(tmp_path):
    for number in range(2):
        write(tmp_path / "data" / f"train-0000{number}-of-00003.parquet", n=2, start=2 * number)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", n=1, start=9)
    assert values(load(f"parquet:{tmp_path}/data?split=test")) == [9]
    train = load(f"parquet:{tmp_path}/data?split=train")
    assert values(train) == [0, 1, 2, 3]
    assert train.notes == [f"{tmp_path}/data: 1 of 3 shards are not there, and their images are left out"]
    for query, match in (("", "holds the splits test, train; choose"), ("?split=trian", "did you mean 'train'")):
        with pytest.raises(DataError, match=match):
            load(f"parquet:{tmp_path}/data{query}")
    with pytest.raises(DataError, match="a folder without .parquet files; it has the folders data"):
        load(f"parquet:{tmp_path}")


def test_shards_that_do_not_fit_each_other_are_refused(tmp_path):
    write(tmp_path / "a.parquet", label=[0] * 4, features={"label": ["x", "y"]})
    other = tmp_path / "b.parquet"
    for columns, match in (
        ({"label": [0] * 4, "features": {"label": ["y", "x"]}}, "b.parquet: its class names differ from"),
        ({"label": [0.5] * 4}, "b.parquet: column 'label' holds double, but int64 in"),
        ({}, "b.parquet: column 'label' holds nothing, but int64"),
        ({"label": [0] * 4, "more": [1] * 4}, "b.parquet: column 'more' holds int64, but nothing"),
    ):
        write(other, **columns)
        with pytest.raises(DataError, match=match):
            load(f"parquet:{tmp_path}")
    other.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="b.parquet: not a readable Parquet file"):
        load(f"parquet:{tmp_path}")


def test_only_the_row_groups_that_are_needed_are_held(tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path / f"{number}.parquet", n=6, start=6 * number)
    asked: list[tuple[str, int]] = []
    read = pq.ParquetFile.read_row_group

    def counted(self, group, columns):
        asked.append((columns[0], group))
        return read(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    data = load(f"parquet:{tmp_path}")
    assert asked == []
    assert values(data.select([2, 3, 14])) == [2, 3, 14]
    assert asked == [("image", 1), ("image", 1)]


def test_paths_without_bytes_are_named_and_refused_where_there_is_nothing_else(tmp_path):
    mixed = [
        {"bytes": encoded(0), "path": None},
        {"bytes": None, "path": "a/b.png"},
        {"bytes": None, "path": None},
        None,
    ]
    data = load(f"parquet:{write(tmp_path / 'mixed.parquet', image=mixed)}")
    found = list(data.read(range(4)))
    assert [isinstance(image, UnreadableImage) for image in found] == [False, True, True, True]
    assert str(found[1]) == "mixed.parquet row 1: names the file 'a/b.png' and holds no bytes of it."
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    paths = pa.array([{"bytes": None, "path": "a.png"}] * 4, kind)
    with pytest.raises(DataError, match="'image' holds paths and no bytes; .* folder:PATH"):
        load(f"parquet:{write(tmp_path / 'paths.parquet', image=paths)}")
    with pytest.raises(DataError, match="'image' holds struct<path: string>"):
        load(f"parquet:{write(tmp_path / 'only.parquet', image=[{'path': 'a.png'}] * 4)}")


def test_labels_that_are_texts_are_classes(tmp_path):
    for number, labels in enumerate(
        (["dog", "ant", "dog", "cow"], pa.array(["dog", "ant", "dog", "cow"]).dictionary_encode())
    ):
        data = load(f"parquet:{write(tmp_path / f'{number}.parquet', label=labels)}")
        assert data.classes == ["ant", "cow", "dog"] and data.labels.tolist() == [2, 0, 2, 1]
        assert "column 'label' holds texts" in data.label_notes[0]
    file = tmp_path / "classes.txt"
    file.write_text("Dog\nCow\nAnt\n")
    data = load(f"parquet:{tmp_path / '0.parquet'}", file)
    assert data.classes == ["Dog", "Cow", "Ant"] and data.labels.tolist() == [0, 2, 0, 1]


def test_a_classes_file_follows_the_names_of_the_metadata(tmp_path):
    path = write(tmp_path / "x.parquet", label=[0, 1, 2, 0], metadata={"classes": ["ant", "bee", "cow"]})
    file = tmp_path / "classes.txt"
    file.write_text("cow\nant\nbee\n")
    assert load(f"parquet:{path}", file).labels.tolist() == [1, 2, 0, 1]
    file.write_text("cow\nant\nbeee\n")
    with pytest.raises(DataError, match="class 'bee' is not a class of .*did you mean 'beee'"):
        load(f"parquet:{path}", file)
    file.write_text("x\ny\nz\n")
    data = load(f"parquet:{path}", file)
    assert data.labels.tolist() == [0, 1, 2, 0] and "by position: 'ant' is 'x'" in data.label_notes[0]
    bare = load(f"parquet:{write(tmp_path / 'bare.parquet', label=[0, 1, 2, 0])}", file)
    assert bare.classes == ["x", "y", "z"] and "names no classes" in bare.label_notes[0]


@pytest.mark.parametrize(
    "columns, match",
    [
        ({"image": [[b"x"]] * 4}, "'image' holds list<element: binary>|'image' holds list"),
        ({"image": [1, 2, 3, 4]}, "'image' holds int64"),
        ({"image": ["a.png"] * 4}, "'image' holds string"),
        ({"label": [[0], [1], [0], [1]]}, "'label' holds list.*, not one integer or one name for each image"),
        ({"label": [True, False, True, True]}, "'label' holds bool"),
        ({"label": [0, None, 1, None]}, "2 labels are missing, the first in row 1"),
        ({"label": ["a", None, "b", "c"]}, "1 labels are missing, the first in row 1"),
        ({"captions": [[1], [2], [3], [4]]}, "'captions' holds list.*, not texts or lists of texts"),
        ({"captions": [1, 2, 3, 4]}, "'captions' holds int64"),
        ({"metadata": {"classes": "ant"}}, "`classes` in the schema metadata is not a JSON list"),
        ({"label": [0] * 4, "features": {"label": [1, 2]}}, "`huggingface`: the names of 'label' in the schema"),
    ],
)
def test_hostile_columns_are_named(tmp_path, columns, match):
    with pytest.raises(DataError, match=match):
        load(f"parquet:{write(tmp_path / 'x.parquet', **columns)}")


def test_odd_metadata_is_no_fault_or_named(tmp_path):
    for odd in ([], {"info": None}, {"info": {"features": {"label": {"_type": "Value"}}}}, "x"):
        path = write(tmp_path / "x.parquet", label=[0] * 4, metadata={"huggingface": odd, "classes": ["a", "b"]})
        assert load(f"parquet:{path}").classes == ["a", "b"]
    table = pq.read_table(path)
    for bad in (b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
        pq.write_table(table.replace_schema_metadata({b"huggingface": bad}), path)
        with pytest.raises(DataError, match="`huggingface` in the schema metadata is not JSON"):
            load(f"parquet:{path}")


def test_labels_out_of_range_are_named_when_they_are_asked_for(tmp_path):
    big = pa.array([0, 1, 2**64 - 1, 1], pa.uint64())
    data = load(f"parquet:{write(tmp_path / 'x.parquet', label=big, metadata={'classes': ['a', 'b']})}")
    with pytest.raises(
        DataError, match="1 labels are outside its 2 classes, the first is 9223372036854775807 at image 2"
    ):
        data.labelled()


def test_captions_may_be_missing(tmp_path):
    path = write(tmp_path / "x.parquet", captions=[["a", None, "b"], None, [], ["c"]])
    assert load(f"parquet:{path}").captions == [["a", "b"], [], [], ["c"]]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([encoded(0)]), pa.array([encoded(1)])], names=["image", "image"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="2 columns are called 'image'"):
        load(f"parquet:{tmp_path / 'x.parquet'}")


def test_a_damaged_row_group_is_named_row_by_row(tmp_path):
    path = write(tmp_path / "x.parquet", n=6)
    content = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = at.dictionary_page_offset or at.data_page_offset
    content[start : start + at.total_compressed_size] = bytes(at.total_compressed_size)
    path.write_bytes(content)
    found = list(load(f"parquet:{path}").read(range(6)))
    assert [isinstance(image, UnreadableImage) for image in found] == [False, False, True, True, False, False]
    assert "x.parquet row 2: row group 1 is damaged" in str(found[2])


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    for spec in (f"parquet:{tmp_path}/pipe.parquet", f"parquet:{tmp_path}", f"parquet:{tmp_path}/*.parquet"):
        with pytest.raises(DataError, match="pipe.parquet is a pipe"):
            load(spec)
    with pytest.raises(DataError, match="is a device"):
        load("parquet:/dev/zero")


def test_long_text_columns_are_not_read_for_groups(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", place=["a", "b", "a", "b"])
    assert load(f"parquet:{path}").groups["place"].tolist() == ["a", "b", "a", "b"]
    monkeypatch.setattr(parquet, "LARGEST_TEXTS", 10)
    assert load(f"parquet:{path}").groups == {}


def test_the_names_of_one_label_column_are_not_those_of_another(tmp_path):
    columns = {"label": [0, 1, 0, 1], "metadata": {"classes": ["ant", "bee"]}}
    data = load(f"parquet:{write(tmp_path / 'two.parquet', other=[1, 1, 0, 0], **columns)}?label=other")
    assert data.classes is None and data.labels.tolist() == [1, 1, 0, 0]
    only = write(tmp_path / "one.parquet", y=[1, 1, 0, 0], metadata={"classes": ["ant", "bee"]})
    assert load(f"parquet:{only}?label=y").classes == ["ant", "bee"]


def test_too_many_rows_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", label=[0] * 4)
    monkeypatch.setattr(parquet, "LARGEST_ROWS", 3)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *a, **k: pytest.fail("was read"))
    with pytest.raises(DataError, match="its rows are more than the 3"):
        load(f"parquet:{path}")


def test_paths_that_are_no_text_are_no_fault(tmp_path):
    names = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"b.png"]).buffers())
    images = pa.StructArray.from_arrays([pa.array([None, encoded(3)], pa.binary()), names], ["bytes", "path"])
    first, second = load(f"parquet:{write(tmp_path / 'x.parquet', n=2, image=images)}").read(range(2))
    assert "x.parquet row 0: is damaged" in str(first) and second.getpixel((0, 0)) == (3, 0, 0)
