"""Sets that are listed in text files, and CounterAnimal's folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qclip.data import load
from qclip.errors import DataError


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


def value(data, index: int) -> int:  # noqa: ANN001
    return data.image(index).getpixel((0, 0))[0]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    rows = [  # y, split, place
        (0, 0, 0), (1, 0, 1), (0, 1, 0), (0, 2, 0), (1, 2, 0), (1, 2, 1), (0, 2, 1), (1, 2, 0), (0, 2, 0),
    ]  # fmt: skip
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    for k, (y, split, place) in enumerate(rows):
        lines.append(f'{k},"00{k}.Bird, small/{k}.png",{y},{split},{place},/a/b.jpg')
        image(tmp_path / f"00{k}.Bird, small/{k}.png", k)
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


def test_waterbirds_has_a_group_for_each_bird_and_place(birds: Path) -> None:
    data = load(f"waterbirds:{birds}")
    assert data.classes == ["landbird", "waterbird"] and data.labels.tolist() == [0, 1, 1, 0, 1, 0]
    assert [value(data, k) for k in range(6)] == [3, 4, 5, 6, 7, 8]
    assert data.groups["group"].tolist() == [
        "landbird on land", "waterbird on land", "waterbird on water", "landbird on water", "waterbird on land",
        "landbird on land",
    ]  # fmt: skip
    train = load(f"waterbirds:{birds}?split=train")
    assert train.labels.tolist() == [0, 1]
    assert any("2 of 4 groups have no image: landbird on water, waterbird on land" in note for note in train.notes)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("img_filename", "file", "no column 'img_filename'"),
        ('small/4.png",1,2', 'small/4.png",x,2', "y is 'x' of an image; it must be 0 or 1"),
        ('"004.Bird', '"/004.Bird', "is no path below"),
        ('"004.Bird', '"../004.Bird', "is no path below"),
        ('small/4.png",1,2,0,/a/b.jpg', 'small/4.png",1,2', "line 6 ends before its last column"),
        ('"004.Bird', "x" * 200_000 + '"004.Bird', "is no table of comma-separated values"),
    ],
)
def test_what_is_odd_about_waterbirds_is_refused(birds: Path, old: str, new: str, why: str) -> None:
    file = birds / "metadata.csv"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(DataError, match=f"metadata.csv.*{why}"):
        load(f"waterbirds:{birds}")


def test_a_split_that_is_not_there_and_one_without_images_are_refused(birds: Path) -> None:
    with pytest.raises(DataError, match="no split 'tset'.*test"):
        load(f"waterbirds:{birds}?split=tset")
    file = birds / "metadata.csv"
    file.write_text(
        "\n".join(line for line in file.read_text().splitlines() if ",1,0," not in line or "2.png" not in line)
    )
    with pytest.raises(DataError, match="no image of that split"):
        load(f"waterbirds:{birds}?split=val")


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    flags = [(1, -1), (-1, -1), (1, 1), (-1, 1), (-1, -1)]  # blond, male
    splits = [2, 2, 2, 0, 2]
    attributes = ["5", "Bald Blond_Hair Male"]
    partition = []
    for k, ((blond, male), split) in enumerate(zip(flags, splits, strict=True)):
        attributes.append(f"00{k}.jpg  -1 {blond:>2} {male:>2}")
        partition.append(f"00{k}.jpg {split}")
        image(tmp_path / "img_align_celeba" / f"00{k}.jpg")
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(attributes))
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(partition))
    return tmp_path


def test_celeba_has_groups_of_hair_and_sex(faces: Path) -> None:
    data = load(f"celeba:{faces}")
    assert data.labels.tolist() == [1, 0, 1, 0] and data.classes == ["not blond", "blond"]
    assert data.groups["group"].tolist() == ["blond woman", "not blond woman", "blond man", "not blond woman"]
    assert "{}" in data.prompts[0] and data.image(3).size == (4, 4)
    assert load(f"celeba:{faces}?split=train").groups["group"].tolist() == ["not blond man"] and not data.notes[1:]


def test_a_celeba_that_is_cut_off_is_named_and_counted(faces: Path) -> None:
    file = faces / "list_attr_celeba.txt"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    data = load(f"celeba:{faces}")
    assert len(data) == 3 and any("the first line says 5 images, 4 follow" in note for note in data.notes)


@pytest.mark.parametrize(
    ("name", "old", "new", "why"),
    [
        ("list_attr_celeba.txt", "Blond_Hair", "Hair", "names no Blond_Hair and Male"),
        ("list_attr_celeba.txt", "002.jpg  -1", "002.jpg", "002.jpg has 2 values for 3 attributes"),
        ("list_attr_celeba.txt", "002.jpg  -1  1", "002.jpg  -1  0", "Blond_Hair is '0' of an image"),
        ("list_eval_partition.txt", "004.jpg 2", "", "004.jpg is in no split"),
        ("list_eval_partition.txt", "004.jpg 2", "004.jpg", "'004.jpg' is no file name and split"),
    ],
)
def test_what_is_odd_about_celeba_is_refused(faces: Path, name: str, old: str, new: str, why: str) -> None:
    assert old in (faces / name).read_text()
    (faces / name).write_text((faces / name).read_text().replace(old, new))
    with pytest.raises(DataError, match=why):
        load(f"celeba:{faces}")


def test_counteranimal_has_common_and_counter_images(tmp_path: Path) -> None:
    for k, name in enumerate(
        ("polar bear/common-snow", "polar bear/counter-grass", "ibex/Common rocks", "ibex/counter")
    ):
        for n in range(k + 1):
            image(tmp_path / name / f"{n}.png", 10 * k + n)
    data = load(f"counteranimal:{tmp_path}")
    assert data.classes == ["ibex", "polar bear"]
    found = {(data.classes[y], g): n for y, g, n in zip(data.labels, data.groups["group"], range(99), strict=False)}
    assert {key: value(data, n) // 10 for key, n in found.items()} == {
        ("polar bear", "common"): 0, ("polar bear", "counter"): 1, ("ibex", "common"): 2, ("ibex", "counter"): 3,
    }  # fmt: skip
    assert np.unique(data.groups["group"], return_counts=True)[1].tolist() == [4, 6] and not data.notes
    classes = tmp_path.parent / "classes.txt"
    classes.write_text("dog\nPolar_Bear\nibex\n")
    named = load(f"counteranimal:{tmp_path}", classes_file=classes)
    assert named.classes == ["dog", "Polar_Bear", "ibex"] and np.unique(named.labels).tolist() == [1, 2]
    image(tmp_path / "seal" / "common-ice" / "0.png")
    assert any(
        "1 of 3 classes have images on one side only: seal" in note for note in load(f"counteranimal:{tmp_path}").notes
    )
    image(tmp_path / "seal" / "beach" / "0.png")
    with pytest.raises(DataError, match="seal has the folder 'beach'; .* begin with common or counter"):
        load(f"counteranimal:{tmp_path}")


def test_a_list_of_openood_names_images_and_labels(tmp_path: Path) -> None:
    for k in range(4):
        image(tmp_path / "images" / f"a {k}.png" if k == 9 else tmp_path / "images" / f"{k}.png", k)
    (tmp_path / "test_far.txt").write_text("2.png -1\n0.png -1\n")
    data = load(f"list:{tmp_path / 'test_far.txt'}?root={tmp_path / 'images'}")
    assert data.labels is None and data.name == "test_far" and [value(data, k) for k in range(2)] == [2, 0]
    (tmp_path / "images" / "test_id.txt").write_text("3.png  1\n1.png -1\n0.png 0\n")
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\n")
    data = load(f"list:{tmp_path / 'images' / 'test_id.txt'}", classes_file=classes)
    assert data.labels.tolist() == [1, 0] and data.classes == ["cat", "dog"]
    assert len(data) == 2 and [value(data, k) for k in range(2)] == [3, 0]
    assert any("1 of 3 images are of no class (-1)" in note for note in data.notes)
    for line in ("3.png", "3.png one", f"3.png {2**63}", "3.png 1.0", "/3.png 1", "../3.png 1"):
        (tmp_path / "images" / "bad.txt").write_text(f"0.png 0\n{line}\n")
        with pytest.raises(DataError, match="line 2 is no path, space, label|is no path below"):
            load(f"list:{tmp_path / 'images' / 'bad.txt'}")


def test_options_that_a_kind_has_not_are_refused(tmp_path: Path) -> None:
    for spec, why in (
        (f"folder:{tmp_path}?root=x", "only a list names images below another folder"),
        (f"list:{tmp_path}?split=test", "a list has no splits"),
        (f"folder:{tmp_path}?among=some", "among=some"),
    ):
        with pytest.raises(DataError, match=why):
            load(spec)


def test_a_classes_file_with_wordnet_ids_names_folders_that_are_called_by_them(tmp_path: Path) -> None:
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02012849 crane\nn03126707 crane\n")
    for wnid in ("n03126707", "n01440764"):
        image(tmp_path / "r" / wnid / "0.png")
    data = load(f"folder:{tmp_path / 'r'}", classes_file=file)
    assert data.classes == ["tench", "goldfish", "crane", "crane"] and data.labels.tolist() == [0, 3]
    own = load(f"folder:{tmp_path / 'r'}?among=own", classes_file=file)
    assert own.own_classes and own.narrowed().classes == ["tench", "crane"] and own.narrowed().labels.tolist() == [0, 1]
    assert data.narrowed() is data
