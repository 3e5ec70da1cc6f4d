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
