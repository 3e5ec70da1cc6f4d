"""torchvision's data sets by name, where their files hold no code: torchvision lists them, our own readers decode."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qclip.data.files import shown
from qclip.data.folders import Files
from qclip.data.imageset import ImageSet
from qclip.errors import DataError, nearest

# Where a set's class keeps its images and labels. Only these classes are ever made: none of them unpickles a file.
PAIRS = {  # lists of (path, label)
    "Country211": "samples",
    "EuroSAT": "samples",
    "GTSRB": "_samples",
    "Imagenette": "_samples",
    "RenderedSST2": "_samples",
}
FILES = {  # lists of paths; labels stand in `_labels`
    "DTD": "_image_files",
    "FGVCAircraft": "_image_files",
    "Food101": "_image_files",
    "OxfordIIITPet": "_images",
    "SUN397": "_image_files",
}
ARRAYS = {  # arrays of pixels in `data`, and where their labels stand
    "FashionMNIST": "targets",
    "KMNIST": "targets",
    "MNIST": "targets",
    "STL10": "labels",
}
READ = (*PAIRS, *FILES, *ARRAYS)
_PICKLES = "it is stored as pickles, which run code when they are read"
_PARQUET = "take its Parquet shards (parquet:PATH)"
REFUSED = {
    "CIFAR10": f"{_PICKLES}; {_PARQUET}",
    "CIFAR100": f"{_PICKLES}; {_PARQUET}",
    "ImageNet": "its meta.bin is a pickle; read the folders of its images with folder:PATH",
    "SVHN": f"it is stored as MATLAB files, which need SciPy; {_PARQUET}",
    "Flowers102": f"its labels are MATLAB files, which need SciPy; {_PARQUET}",
    "StanfordCars": f"its labels are MATLAB files, which need SciPy; {_PARQUET}",
    "PCAM": f"it is stored as HDF5, which needs h5py; {_PARQUET}",
    "LSUN": f"it is an LMDB database, which needs lmdb; {_PARQUET}",
    "CelebA": "its groups are what it is for; read it with celeba:PATH",
    "ImageFolder": "read it with folder:PATH",
}


class Pixels:
    """Arrays of images `[n, H, W]` or `[n, H, W, 3]`, uint8, as a `Source`."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def digest(self, rows: Sequence[int]) -> str:
        whole = hashlib.sha256(str(self.pixels.shape[1:]).encode())
        for row in rows:
            whole.update(np.ascontiguousarray(self.pixels[row]).tobytes())
        return whole.hexdigest()

    def read(self, rows: Sequence[int]) -> Iterator[Image.Image]:
        return (Image.fromarray(self.pixels[row]).convert("RGB") for row in rows)


def load_torchvision(root: Path, spec: str, name: str | None, split: str | None = None) -> ImageSet:
    """The set that torchvision calls `name`, from the folder that torchvision would be given. Nothing is downloaded.
    split: as that class names them; default "test" where it has splits.

    Raises DataError for a set that is not read, with the reason, and where torchvision does not find its files.
    """
    if name is None:
        raise DataError(f"{spec!r}: which set of torchvision is it? Write ?set=NAME, one of {', '.join(READ)}.")
    if name in REFUSED:
        raise DataError(f"{spec!r}: {name} is not read: {REFUSED[name]}.")
    if name not in READ:
        raise DataError(f"{spec!r}: {name} is not read; {nearest(name, (*READ, *REFUSED))}")
    found, chosen = _made(root, spec, name, split)
    if name in ARRAYS:
        pixels = np.asarray(found.data, np.uint8)
        pixels = pixels.transpose(0, 2, 3, 1) if pixels.ndim == 4 else pixels  # STL10's are [n, 3, H, W]
        source: Pixels | Files = Pixels(pixels)
        labels, count = getattr(found, ARRAYS[name]), len(pixels)
    else:
        if name in PAIRS:
            listed = getattr(found, PAIRS[name])
            paths, labels = [path for path, _ in listed], [label for _, label in listed]
        else:
            paths, labels = getattr(found, FILES[name]), found._labels
        if name == "SUN397":  # in the order in which the file system gives them, which is another one elsewhere
            order = sorted(range(len(paths)), key=lambda k: paths[k])
            paths, labels = [paths[k] for k in order], [labels[k] for k in order]
        source, count = _files(root, spec, [os.fspath(path) for path in paths]), len(paths)
    try:
        array = np.asarray(labels, np.int64)
    except OverflowError:
        raise DataError(f"{spec!r}: a label is too large to be the number of a class.") from None
    if len(array) != count or (array < 0).any():
        raise DataError(f"{spec!r}: this split has {count} images and no label for some of them; choose another split.")
    classes = getattr(found, "classes", None)
    return ImageSet(
        name="-".join([name.lower(), *[chosen] * bool(chosen)]),
        spec=spec,
        classes=None if classes is None else [_class_name(each) for each in classes],
        labels=array,
        captions=None,
        groups={},
        prompts=None,
        source=source,
        rows=np.arange(count, dtype=np.int64),
    )


def _made(root: Path, spec: str, name: str, split: str | None) -> tuple[Any, str]:
    """The object of torchvision's class, and its split."""
    kind = getattr(importlib.import_module("torchvision.datasets"), name)
    takes = inspect.signature(kind).parameters
    settings: dict[str, Any] = {"download": False} if "download" in takes else {}
    chosen = split or ("val" if name == "Imagenette" else "test")
    if "split" in takes:
        settings["split"] = chosen
    elif "train" in takes:
        if chosen not in ("train", "test"):
            raise DataError(f"{spec!r}: no split {chosen!r}; {nearest(chosen, ('train', 'test'))}")
        settings["train"] = chosen == "train"
    elif split is not None:
        raise DataError(f"{spec!r}: {name} has no splits; leave split= out.")
    else:
        chosen = ""
    try:
        return kind(os.fspath(root), **settings), chosen
    except Exception as error:  # of files that are cut off or foreign torchvision raises whatever comes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(" You can use")[0].rstrip(".")
        raise DataError(f"{spec!r}: torchvision does not find {name} in {shown(root)}: {reason}.") from None


def _files(root: Path, spec: str, paths: list[str]) -> Files:
    """Raises DataError where a list that lies beside the images leads out of the folder."""
    top = os.path.abspath(root)
    for path in paths:
        if os.path.commonpath([top, os.path.abspath(path)]) != top:
            raise DataError(f"{spec!r}: {shown(path)} lies outside {shown(root)}.")
    return Files(top, [os.path.abspath(path) for path in paths])


def _class_name(found: object) -> str:
    """The first of several names (Imagenette's), without the number before it ("0 - zero")."""
    first = found[0] if isinstance(found, tuple) else found
    return str(first).split(" - ", 1)[-1].replace("_", " ")
