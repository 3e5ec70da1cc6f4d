"""torchvision's sets in their own layouts on disk, and the refusals with their reasons."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qclip.data.sources import load
from qclip.data.torchvision_sets import ARRAYS, FILES, PAIRS, READ, REFUSED
from qclip.errors import DataError


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(path, "PNG")  # whatever it is called


def idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def mnist(root: Path, name: str = "MNIST") -> None:
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = np.arange(count * 784, dtype=np.uint32).reshape(count, 28, 28) % 251
        idx(root / name / "raw" / f"{part}-images-idx3-ubyte", pixels)
        idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(count)[::-1])


def test_mnist(tmp_path: Path) -> None:
    mnist(tmp_path)
    found = load(f"torchvision:{tmp_path}?set=MNIST")
    assert (found.name, found.labels.tolist()) == ("mnist-test", [1, 0])
    assert found.classes[:3] == ["zero", "one", "two"]
    image = found.image(1)
    assert image.mode == "RGB" and image.getpixel((3, 0)) == (787 % 251,) * 3
    train = load(f"torchvision:{tmp_path}?set=MNIST&split=train")
    assert len(train) == 3 and train.select([0, 1]).digest == found.digest != train.digest
    with pytest.raises(DataError, match="no split 'val'"):
        load(f"torchvision:{tmp_path}?set=MNIST&split=val")


def test_stl10(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.zeros((2, 3, 96, 96), np.uint8)
    pixels[1, 2, 5, 7] = 200  # blue, of column 5 and row 7: STL10 stores columns
    (folder / "test_X.bin").write_bytes(pixels.tobytes())
    (folder / "test_y.bin").write_bytes(bytes([3, 1]))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    import torchvision.datasets

    torchvision.datasets.STL10._check_integrity, before = lambda self: True, torchvision.datasets.STL10._check_integrity
    try:
        found = load(f"torchvision:{tmp_path}?set=STL10")
    finally:
        torchvision.datasets.STL10._check_integrity = before
    assert found.classes == ["airplane", "bird", "car"] and found.labels.tolist() == [2, 0]
    assert found.image(1).getpixel((5, 7)) == (0, 0, 200)


def test_food101(tmp_path: Path) -> None:
    meta = {"apple_pie": ["apple_pie/2", "apple_pie/1"], "sushi": ["sushi/3"]}
    (tmp_path / "food-101" / "meta").mkdir(parents=True)
    (tmp_path / "food-101" / "meta" / "test.json").write_text(json.dumps(meta))
    for shade, name in enumerate(("apple_pie/2", "apple_pie/1", "sushi/3")):
        picture(tmp_path / "food-101" / "images" / f"{name}.jpg", shade)
    found = load(f"torchvision:{tmp_path}?set=Food101")
    assert found.classes == ["apple pie", "sushi"] and found.labels.tolist() == [0, 0, 1]
    assert [image.getpixel((0, 0))[0] for image in found.images([0, 1, 2])] == [0, 1, 2]
    (tmp_path / "food-101" / "meta" / "test.json").write_text('{"a": ["../../../out"]}')
    with pytest.raises(DataError, match="lies outside"):
        load(f"torchvision:{tmp_path}?set=Food101")


def test_eurosat_has_no_splits(tmp_path: Path) -> None:
    for k, name in enumerate(("Forest", "River")):
        picture(tmp_path / "eurosat" / "2750" / name / f"{name}_1.jpg", k)
    found = load(f"torchvision:{tmp_path}?set=EuroSAT")
    assert (found.name, found.classes, found.labels.tolist()) == ("eurosat", ["Forest", "River"], [0, 1])
    with pytest.raises(DataError, match="EuroSAT has no splits"):
        load(f"torchvision:{tmp_path}?set=EuroSAT&split=test")


def test_dtd(tmp_path: Path) -> None:
    for name in ("dotted/dotted_1.jpg", "striped/striped_1.jpg"):
        picture(tmp_path / "dtd" / "dtd" / "images" / name, 9)
    (tmp_path / "dtd" / "dtd" / "labels").mkdir()
    (tmp_path / "dtd" / "dtd" / "labels" / "test1.txt").write_text("striped/striped_1.jpg\ndotted/dotted_1.jpg\n")
    found = load(f"torchvision:{tmp_path}?set=DTD")
    assert found.classes == ["dotted", "striped"] and found.labels.tolist() == [1, 0]
    assert found.image(0).getpixel((0, 0)) == (9, 0, 0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_says_why(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is not read: "):
        load(f"torchvision:{tmp_path}?set={name}")
    assert name not in READ


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stored as pickles, which run code"):
        load(f"torchvision:{tmp_path}?set=CIFAR10")
    with pytest.raises(DataError, match="did you mean 'Food101'"):
        load(f"torchvision:{tmp_path}?set=Food11")
    with pytest.raises(DataError, match=r"which set of torchvision is it\? Write \?set=NAME"):
        load(f"torchvision:{tmp_path}")
    with pytest.raises(DataError, match="torchvision does not find MNIST in .*: Dataset not found"):
        load(f"torchvision:{tmp_path}?set=MNIST")
    with pytest.raises(DataError, match="only torchvision names sets"):
        load(f"folder:{tmp_path}?set=MNIST")


def test_every_set_that_is_read_is_torchvisions_and_unpickles_nothing() -> None:
    import inspect

    import torchvision.datasets

    for name in (*PAIRS, *FILES, *ARRAYS):
        source = inspect.getsource(inspect.getmodule(getattr(torchvision.datasets, name)))
        assert "pickle" not in source and "scipy" not in source, name


def listed(root: Path, name: str) -> tuple[list[str], list[int]]:
    """A set of torchvision's in its own layout: the images that it lists, in order, and their labels."""
    if name == "OxfordIIITPet":
        (root / "oxford-iiit-pet" / "annotations").mkdir(parents=True)
        lines = "great_pyrenees_7 2 2 1\nAbyssinian_2 1 1 1\n"
        (root / "oxford-iiit-pet" / "annotations" / "test.txt").write_text(lines)
        return [f"oxford-iiit-pet/images/{k}.jpg" for k in ("great_pyrenees_7", "Abyssinian_2")], [1, 0]
    if name == "FGVCAircraft":
        data = root / "fgvc-aircraft-2013b" / "data"
        data.mkdir(parents=True)
        (data / "variants.txt").write_text("Boeing 707\nAn-12\n")
        (data / "images_variant_test.txt").write_text("0034309 An-12\n0034958 Boeing 707\n")
        return [f"fgvc-aircraft-2013b/data/images/{k}.jpg" for k in ("0034309", "0034958")], [1, 0]
    if name == "GTSRB":
        (root / "gtsrb").mkdir()
        (root / "gtsrb" / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00001.ppm;6;14\n00000.ppm;6;0\n")
        return [f"gtsrb/GTSRB/Final_Test/Images/{k}.ppm" for k in ("00001", "00000")], [14, 0]
    if name == "SUN397":
        (root / "SUN397").mkdir()
        (root / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/a/apartment_building/outdoor\n")
        files = (
            "a/abbey/sun_z.jpg",
            "a/apartment_building/outdoor/sun_a.jpg",
            "a/apartment_building/outdoor/sun_b.jpg",
        )
        return [f"SUN397/{file}" for file in files], [0, 1, 1]
    folders = {
        "Country211": ("country211/test", ["AD", "ZW"], "jpg"),
        "RenderedSST2": ("rendered-sst2/test", ["negative", "positive"], "png"),
        "Imagenette": ("imagenette2/val", ["n01440764", "n02979186"], "jpeg"),
    }
    folder, names, kind = folders[name]
    return [f"{folder}/{each}/{k}.{kind}" for each in names for k in range(2)], [0, 0, 1, 1]


CALLED = {
    "OxfordIIITPet": ["Abyssinian", "Great Pyrenees"],
    "FGVCAircraft": ["Boeing 707", "An-12"],
    "GTSRB": None,
    "SUN397": ["abbey", "apartment building/outdoor"],
    "Country211": ["AD", "ZW"],
    "RenderedSST2": ["negative", "positive"],
    "Imagenette": ["tench", "cassette player"],
}


@pytest.mark.parametrize("name", CALLED)
def test_sets_in_their_own_layouts(tmp_path: Path, name: str) -> None:
    files, labels = listed(tmp_path, name)
    for shade, file in reversed(list(enumerate(files))):  # a folder may give them in this order
        picture(tmp_path / file, shade)
    found = load(f"torchvision:{tmp_path}?set={name}")
    assert found.classes == CALLED[name] and found.labels.tolist() == labels
    assert [image.getpixel((0, 0))[0] for image in found.images(range(len(files)))] == list(range(len(files)))
    split = {"SUN397": "", "Imagenette": "-val"}.get(name, "-test")
    assert found.name == f"{name.lower()}{split}"


@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("content", [b"", b"\0\0", b"\0\0\x08\x01\0\0\0\x02", b"\0\0\x09\x07" + bytes(60), "cut"])
def test_files_that_are_cut_off_or_foreign_are_named(tmp_path: Path, part: str, content: bytes | str) -> None:
    mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / f"t10k-{part}-ubyte"
    file.write_bytes(file.read_bytes()[:-1] if isinstance(content, str) else content)
    with pytest.raises(DataError, match="torchvision does not find MNIST in|no label for some of them"):
        load(f"torchvision:{tmp_path}?set=MNIST")


def test_a_label_that_is_too_large_is_refused(tmp_path: Path) -> None:
    listed(tmp_path, "GTSRB")
    (tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text(f"Filename;Width;ClassId\n00001.ppm;6;{2**64}\n")
    with pytest.raises(DataError, match="a label is too large"):
        load(f"torchvision:{tmp_path}?set=GTSRB")


def test_images_without_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").write_bytes(bytes(2 * 3 * 96 * 96))
    (tmp_path / "stl10_binary" / "class_names.txt").write_text("airplane\nbird\n")
    with pytest.raises(DataError, match="2 images and no label for some of them; choose another split"):
        load(f"torchvision:{tmp_path}?set=STL10&split=unlabeled")
