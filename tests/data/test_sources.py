"""Data names, Parquet files and folders: what they give, and what they refuse."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qclip.data import UnreadableImage, decoding, load, parquet, parquet_columns
from qclip.errors import DataError


def encoded(value: int, side: int = 8, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (value, 2 * value % 256, 7)).save(stream, kind)
    return stream.getvalue()


def write(path, n=12, metadata=None, row_group_size=5, **columns):
    columns = {"image": [encoded(i) for i in range(n)], **columns}
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({k: json.dumps(v) for k, v in metadata.items()})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture
def file(tmp_path):
    return write(
        tmp_path / "set.parquet",
        metadata={"classes": ["a", "b", "c"]},
        label=[i % 3 for i in range(12)],
        captions=[[f"c{i}", "x"] for i in range(12)],
        good=[i % 4 == 0 for i in range(12)],
        place=["land" if i < 6 else "water" for i in range(12)],
        split=["train" if i < 9 else "test" for i in range(12)],
    )


def values(data) -> list[int]:
    return [data.image(i).getpixel((0, 0))[0] for i in range(len(data))]


# -- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_gives_every_column(file):
    data = load(f"parquet:{file}")
    assert len(data) == 12 and data.name == "set" and data.classes == ["a", "b", "c"]
    assert data.labels.dtype == np.int64 and data.labels.tolist() == [i % 3 for i in range(12)]
    assert data.captions[3] == ["c3", "x"]
    assert data.groups["good"].dtype == bool and data.groups["place"].tolist() == ["land"] * 6 + ["water"] * 6
    assert values(data) == list(range(12)) and data.image(0).mode == "RGB"
    assert [data.image(i).getpixel((0, 0))[0] for i in (11, 0, 7)] == [11, 0, 7]  # across row groups, any order


def test_where_split_and_samples_select_rows(file):
    good = load(f"parquet:{file}?where=good")
    assert values(good) == [0, 4, 8] and good.labels.tolist() == [0, 1, 2] and good.name == "set-good"
    assert good.captions[1] == ["c4", "x"] and good.groups["place"].tolist() == ["land", "land", "water"]
    assert values(load(f"parquet:{file}?split=test")) == [9, 10, 11]
    some = load(f"parquet:{file}?samples=5&seed=1")
    assert len(some) == 5 and sorted(set(values(some))) == values(some)
    assert values(some) == values(load(f"parquet:{file}?samples=5&seed=1"))
    assert any(values(load(f"parquet:{file}?samples=5&seed={s}")) != values(some) for s in (2, 3))


def test_digest_is_of_the_content_and_the_selection(file, tmp_path):
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(file.read_bytes())
    whole = load(f"parquet:{file}")
    assert load(f"parquet:{copy}").digest == whole.digest
    assert whole.select(np.arange(12)).digest == whole.digest
    parts = whole.select([1, 2]), whole.select([2, 1]), load(f"parquet:{file}?where=good")
    others = {whole.digest, *(p.digest for p in parts)}
    changed = write(tmp_path / "changed.parquet", n=11)
    assert len({*others, load(f"parquet:{changed}").digest}) == 5


def test_select_and_sample_check_what_they_get(file):
    data = load(f"parquet:{file}")
    assert values(data.select(np.array([True] * 2 + [False] * 10))) == [0, 1]
    assert values(data.select([3, 1]).select([1])) == [1]
    with pytest.raises(DataError, match="mask of shape"):
        data.select(np.array([True, False]))
    with pytest.raises(DataError, match="13 images were asked for, but it has 12"):
        data.sample(13)


def test_hugging_face_struct_and_single_captions(tmp_path):
    images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(3)]
    path = write(tmp_path / "hf.parquet", n=3, image=images, captions=["one", "two", None])
    data = load(f"parquet:{path}")
    assert values(data) == [0, 1, 2] and data.captions == [["one"], ["two"], []] and data.labels is None


def test_text_with_many_values_is_no_group(tmp_path):
    n = parquet_columns.MOST_GROUP_VALUES + 1
    path = write(tmp_path / "names.parquet", n=n, file=[str(i) for i in range(n)], index=list(range(n)))
    assert load(f"parquet:{path}").groups == {}


def test_damaged_images_are_named_and_the_rest_is_read(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(stream, "PNG")
    images = [encoded(0), b"", b"not an image", stream.getvalue()[:400], None, encoded(5)]
    path = write(tmp_path / "bad.parquet", n=6, image=images)
    found = list(load(f"parquet:{path}").read(range(6)))
    assert [isinstance(f, UnreadableImage) for f in found] == [False, True, True, True, True, False]
    assert "bad.parquet row 2: cannot be decoded" in str(found[2]) and "row 4: no image" in str(found[4])
    with pytest.raises(UnreadableImage, match="bad.parquet row 1"):
        load(f"parquet:{path}").image(1)


def test_a_picture_that_claims_a_huge_size_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")  # 10 kB that would decode to 243 MB
    assert len(bomb.getvalue()) < 20_000
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("was decoded"))
    path = write(tmp_path / "bomb.parquet", n=1, image=[bomb.getvalue()])
    assert "9000 x 9000 pixels" in str(next(iter(load(f"parquet:{path}").read([0]))))
    monkeypatch.setattr(decoding, "LARGEST_BYTES", 5)
    assert "bytes are more than" in str(next(iter(load(f"parquet:{path}").read([0]))))


def test_parquet_refusals(tmp_path, monkeypatch, file):
    def refused(match, path):
        with pytest.raises(DataError, match=match):
            load(f"parquet:{path}")

    (tmp_path / "no.parquet").write_bytes(b"PAR1 this is not one PAR1")
    refused("not a readable Parquet file", tmp_path / "no.parquet")
    (tmp_path / "cut.parquet").write_bytes(file.read_bytes()[:-100])
    refused("not a readable Parquet file", tmp_path / "cut.parquet")
    (tmp_path / "empty.parquet").write_bytes(b"")
    refused("not a readable Parquet file", tmp_path / "empty.parquet")
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "column.parquet")
    refused("no column 'image'; it has picture", tmp_path / "column.parquet")
    refused("'image' holds string", write(tmp_path / "text.parquet", n=1, image=["x"]))
    refused("'label' holds double", write(tmp_path / "float.parquet", n=1, label=[0.5]))
    refused("1 labels are missing, the first in row 1", write(tmp_path / "null.parquet", n=2, label=[0, None]))
    refused("`classes`.*not a JSON list", write(tmp_path / "meta.parquet", n=1, metadata={"classes": {"a": 1}}))
    none = write(tmp_path / "none.parquet", n=0, image=pa.array([], pa.binary()))
    refused("has 0 images, but 1 were asked for", none)
    monkeypatch.setattr(parquet, "LARGEST_ROW_GROUP", 100)
    refused("row group 0 needs", file)


def test_labels_and_classes_must_fit_when_they_are_asked_for(tmp_path, file):
    labels, classes = load(f"parquet:{file}").labelled()
    assert labels.max() == 2 and classes == ["a", "b", "c"]
    ood = write(tmp_path / "ood.parquet", n=3, metadata={"classes": ["a", "b"]}, label=[0, 900, 1])
    with pytest.raises(DataError, match="1 labels are outside its 2 classes, the first is 900 at image 1"):
        load(f"parquet:{ood}").labelled()
    with pytest.raises(DataError, match="no class names; give a classes file"):
        load(f"parquet:{write(tmp_path / 'u.parquet', n=2, label=[0, 1])}").labelled()
    one = write(tmp_path / "one.parquet", n=2, metadata={"classes": ["a"]}, label=[0, 0])
    assert load(f"parquet:{one}").labelled()[1] == ["a"]  # what is undefined then, each metric says


# -- folders ----------------------------------------------------------------------------------------------------------


def fill(root, layout: dict[str, list[int]]):
    for name, pictures in layout.items():
        (root / name).mkdir(parents=True)
        for value in pictures:
            (root / name / f"{value:03}.png").write_bytes(encoded(value))
    return root


def test_sub_folders_are_classes(tmp_path):
    root = fill(tmp_path / "pets", {"dog": [2, 1], "cat": [3]})
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "dog" / ".hidden.png").write_bytes(encoded(9))
    data = load(f"folder:{root}")
    assert data.name == "pets" and data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 1, 1]
    assert values(data) == [3, 1, 2]


def test_numbered_folders_sort_as_numbers(tmp_path):
    root = fill(tmp_path / "v2", {str(i): [i] for i in range(12)})
    data = load(f"folder:{root}")
    assert data.labels.tolist() == list(range(12)) and values(data) == list(range(12))


def test_classes_file_names_or_orders_the_sub_folders(tmp_path):
    root = fill(tmp_path / "set", {"n01": [1], "n02": [2]})
    names = tmp_path / "classes.txt"
    names.write_text("tabby cat\n\n beagle \n")
    data = load(f"folder:{root}", names)
    assert data.classes == ["tabby cat", "beagle"] and data.labels.tolist() == [0, 1]
    names.write_text("n02\nn03\nn01\n")
    assert load(f"folder:{root}", names).labels.tolist() == [2, 0]
    names.write_text("one\ntwo\nthree\n")
    with pytest.raises(DataError, match="2 classes .*but the classes file names 3"):
        load(f"folder:{root}", names)


def test_a_flat_folder_has_images_without_labels(tmp_path):
    root = fill(tmp_path, {"own": [5, 6]}) / "own"
    names = tmp_path / "classes.txt"
    names.write_text("a\nb\n")
    data = load(f"folder:{root}", names)
    assert data.labels is None and data.classes == ["a", "b"] and values(data) == [5, 6]


def test_folder_digest_is_of_names_and_content(tmp_path):
    one, two = (fill(tmp_path / n, {"a": [1], "b": [2]}) for n in ("one", "two"))
    digest = load(f"folder:{one}").digest
    assert load(f"folder:{two}").digest == digest
    os.utime(two / "a" / "001.png", (1, 1))
    assert load(f"folder:{two}").digest == digest
    (two / "a" / "001.png").write_bytes(encoded(77))
    assert load(f"folder:{two}").digest != digest


def test_folder_splits_and_refusals(tmp_path):
    root = fill(tmp_path / "set", {"train/a": [1], "test/a": [2], "test/b": [3]})
    assert values(load(f"folder:{root}?split=test")) == [2, 3]
    with pytest.raises(DataError, match="no split 'tets'; did you mean 'test'"):
        load(f"folder:{root}?split=tets")
    (root / "test" / "loose.png").write_bytes(encoded(1))
    with pytest.raises(DataError, match="1 images lie beside the class folders"):
        load(f"folder:{root}?split=test")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no images"):
        load(f"folder:{tmp_path / 'void'}")
    (root / "train" / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UnreadableImage, match="a/broken.jpg"):
        load(f"folder:{root}?split=train").image(1)


# -- names ------------------------------------------------------------------------------------------------------------


def test_bad_names_say_what_is_near(file, tmp_path):
    cases = {
        "parkett:x": "did you mean 'parquet'",
        "scense:test": "did you mean 'scenes'",
        str(file): "did you mean 'parquet:",
        str(tmp_path): "did you mean 'folder:",
        "far-ood": "did you mean 'scenes:far-ood'",
        f"parquet:{tmp_path}/sett.parquet": "does not exist; did you mean 'set.parquet'",
        f"folder:{file}": "is a file",
        "parquet:": "no path",
        "parquet:/nowhere/at/all.parquet": "check the path",
        f"parquet:{file}?sample=3": "unknown option 'sample'; did you mean 'samples'",
        f"parquet:{file}?samples=": "has no value",
        f"parquet:{file}?samples=1&samples=2": "given twice",
        f"parquet:{file}?samples=-1": "not a whole number",
        f"parquet:{file}?samples=0": "at least one",
        f"parquet:{file}?samples=99": "has 12 images, but 99 were asked for",
        f"parquet:{file}?where=god": "no bool column 'god'; did you mean 'good'",
        f"parquet:{file}?where=place": "no bool column 'place'",
        f"parquet:{file}?split=tset": "no split 'tset'; did you mean 'test'",
        f"parquet:{file}?side=32": "only scenes are drawn",
    }
    for spec, match in cases.items():
        with pytest.raises(DataError, match=match):
            load(spec)
    with pytest.raises(DataError, match="12 images, but 20 were asked for"):
        load(f"parquet:{file}", need=20)


def test_a_path_may_hold_a_question_mark(tmp_path):
    named = fill(tmp_path, {"what?/cat": [1, 2], "what?/dog": [3], "what/cat": [4], "50%3F/ant": [5], "50?/ant": [6]})
    assert values(load(f"folder:{named}/what?")) == [1, 2, 3]  # as it is written, where it exists so
    assert values(load(f"folder:{named}/what??samples=3")) == [1, 2, 3]
    assert values(load(f"folder:{named}/what%3F?samples=3")) == [1, 2, 3]
    assert values(load(f"folder:{named}/what%3f")) == [1, 2, 3]
    assert values(load(f"folder:{named}/what?samples=1")) == [4]
    assert values(load(f"folder:{named}/50%3F")) == [5] and values(load(f"folder:{named}/50%253F")) == [5]
    write(tmp_path / "a?b&c=1.parquet", n=2)
    for name in ("a?b&c=1.parquet", "a%3Fb%26c=1.parquet", "a%3Fb&c=1.parquet"):
        assert values(load(f"parquet:{tmp_path}/{name}?samples=2")) == [0, 1]
    with pytest.raises(DataError, match="unknown option 'b"):
        load(f"parquet:{tmp_path}/a?b&c=2.parquet")


@pytest.mark.parametrize("path", ["%00", "x" * 5000, "a/" * 3000, "%ff%fe", "~nobody-is-called-this/x", "a%0ab"])
def test_paths_that_no_file_system_has_do_not_exist(path, tmp_path):
    for kind in ("folder", "parquet"):
        with pytest.raises(DataError, match="does not exist") as error:
            load(f"{kind}:{tmp_path}/{path}")
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "query, match",
    [
        ("side=0", "cannot be drawn 0 pixels wide"),
        ("side=-8", "side=-8 is not a whole number"),
        ("side=32.0", "side=32.0 is not a whole number"),
        ("side=1e3", "side=1e3 is not a whole number"),
        ("side=1000000000", "cannot be drawn 1000000000 pixels wide"),
        ("side=" + "9" * 5000, "side has 5000 digits"),
        ("side=\u0663\u0662", "is not a whole number"),
        ("samples=0", "at least one"),
        ("samples=-1", "samples=-1 is not a whole number"),
        ("samples=x", "samples=x is not a whole number"),
        ("samples=1000000000000", "ask for at most"),
        ("seed=x", "seed=x is not a whole number"),
        ("seed=-1", "seed=-1 is not a whole number"),
        ("seed=1.5", "seed=1.5 is not a whole number"),
        ("sed=1", "unknown option 'sed'; did you mean 'seed'"),
        ("size=1", "unknown option 'size'; did you mean 'side'"),
        ("image=x", "only a Parquet file and a saved data set have columns"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(query, match):
    with pytest.raises(DataError, match=match):
        load(f"scenes:test?{query}")


def test_real_sets_load(shared_data):
    data = load(f"parquet:{shared_data / 'cifar10_test.parquet'}?where=lossless")
    assert len(data) == 1000 and data.classes[3] == "cat" and data.image(0).size == (32, 32)
    assert len(data.labelled()[0]) == 1000
    near = load(f"parquet:{shared_data / 'imagenet_near_64.parquet'}?samples=5")
    assert near.image(4).size == (64, 64)
    captions = load(f"parquet:{shared_data / 'flickr8k_dev_64.parquet'}?samples=3").captions
    assert [len(c) for c in captions] == [5, 5, 5]
