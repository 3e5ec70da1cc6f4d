"""`ImageSet`: images with labels, captions or groups, whatever they are stored in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qclip.data import classes as class_names
from qclip.errors import DataError


class UnreadableImage(DataError):
    """One image cannot be decoded; names its file or row, and why."""


class Source(Protocol):
    """Where pixels come from."""

    def read(self, rows: Sequence[int]) -> Iterable[Image.Image | UnreadableImage]:
        """RGB images of these rows, in this order, decoded one at a time where that saves memory; an unreadable one is
        given as its error, not raised."""
        ...

    def digest(self, rows: Sequence[int]) -> str:
        """sha256 (hex) of the content of these rows, in this order."""
        ...


@dataclasses.dataclass
class ImageSet:
    """A selection of images. `labels` int64 `[n]`, `captions` lists of texts, `groups` arrays `[n]` (bool, str),
    `counts` how many people chose each class, int64 `[n, len(classes)]`.

    `notes`: what was left out; `label_notes`: how labels and class names were come by, and what is odd about them.
    """

    name: str
    spec: str
    classes: list[str] | None
    labels: NDArray[np.int64] | None
    captions: list[list[str]] | None
    groups: dict[str, NDArray]
    prompts: str | list[str] | None
    source: Source = dataclasses.field(repr=False)
    rows: NDArray[np.int64] = dataclasses.field(repr=False)  # row of each image in `source`
    unreadable: list[tuple[int, str]] = dataclasses.field(default_factory=list, repr=False)  # filled by `batches`
    notes: list[str] = dataclasses.field(default_factory=list, repr=False)
    label_notes: list[str] = dataclasses.field(default_factory=list, repr=False)
    counts: NDArray[np.int64] | None = dataclasses.field(default=None, repr=False)
    own_classes: bool = False  # it is measured among the classes that it has images of

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def digest(self) -> str:
        """Content hash of what is selected, in its order. Made when it is first asked for: it reads the images."""
        return self.source.digest(self.rows.tolist())

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Raises UnreadableImage naming the file or row."""
        return self.images([index])[0]

    def images(self, indices: Sequence[int]) -> list[Image.Image]:
        """Several images in RGB. Raises UnreadableImage at the first that cannot be decoded."""
        found = []
        for image in self.read(indices):
            if isinstance(image, UnreadableImage):
                raise image
            found.append(image)
        return found

    def read(self, indices: Sequence[int]) -> Iterable[Image.Image | UnreadableImage]:
        """Like `images`, but one after the other, and an unreadable one is its error instead of raising it."""
        return self.source.read([int(self.rows[i]) for i in indices])

    def labelled(self) -> tuple[NDArray[np.int64], list[str]]:
        """Labels `[n]` and class names, checked to fit each other.

        Raises DataError where either is missing or a label has no name.
        """
        if self.labels is None:
            raise DataError(f"{self.spec} has no labels, so that accuracy is not defined; use it as an OOD set.")
        if not self.classes:
            raise DataError(f"{self.spec} has labels but no class names; give a classes file (--classes FILE).")
        if not len(self):
            raise DataError(f"{self.spec} is empty; give a set with images.")
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(outside):
            raise DataError(
                f"{self.spec}: {len(outside)} labels are outside its {len(self.classes)} classes, the first is "
                f"{self.labels[outside[0]]} at image {outside[0]}; select labelled rows with ?where=, or give "
                "a classes file that fits."
            )
        return self.labels, self.classes

    def labels_in(self, reference: ImageSet) -> NDArray[np.int64]:
        """Labels `[n]` as positions in the classes of `reference`, found by name.

        Raises DataError where a class is not among them, and what `labelled` raises.
        """
        labels, _ = self.labelled()
        return self._places_in(reference)[labels]

    def counts_in(self, reference: ImageSet) -> NDArray[np.int64] | None:
        """`counts` by the classes of `reference`, None where there are none. Raises as `labels_in`."""
        if self.counts is None:
            return None
        out = np.zeros((len(self), len(reference.labelled()[1])), np.int64)
        out[:, self._places_in(reference)] = self.counts
        return out

    def narrowed(self) -> ImageSet:
        """With the classes that it has images of alone, where `own_classes` says so. Raises as `labelled`."""
        if not self.own_classes:
            return self
        labels, classes = self.labelled()
        present, places = np.unique(labels, return_inverse=True)
        return dataclasses.replace(
            self,
            classes=[classes[k] for k in present],
            labels=places.astype(np.int64),
            counts=None if self.counts is None else self.counts[:, present],
        )

    def _places_in(self, reference: ImageSet) -> NDArray[np.int64]:
        """Position of each class among those of `reference`."""
        _, classes = self.labelled()
        _, wanted = reference.labelled()
        places = class_names.positions(classes, wanted, self.spec, reference.spec)
        if places is None:
            raise DataError(
                f"{self.spec}: class {classes[0]!r} is not a class of {reference.spec}, nor is any other of its "
                "classes; a shift or dev set has the same classes or some of them."
            )
        return places

    def name_classes(self, file: list[str]) -> None:
        """Gives the classes the names that a classes file holds, by name or, with a note, by position (see
        `classes.renamed`). Raises DataError where the file does not fit."""
        if self.labels is not None and self.classes is not None:
            places, notes = class_names.renamed(self.classes, file, self.spec)
            named = (self.labels >= 0) & (self.labels < len(places))
            self.labels = np.where(named, places[np.where(named, self.labels, 0)], -1)
            if self.counts is not None:
                counts = np.zeros((len(self), len(file)), np.int64)
                counts[:, places] = self.counts
                self.counts = counts
            self.label_notes += notes
        elif self.labels is not None:
            self.label_notes.append(
                f"{self.spec} names no classes, so the lines of the classes file name its labels by position: 0 is "
                f"{file[0]!r}"
            )
        self.classes = file

    def select(self, indices: Sequence[int] | NDArray) -> ImageSet:
        """The images at these positions (or where a bool mask `[n]` is true), in this order."""
        index = np.asarray(indices)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise DataError(f"{self.spec}: a mask of shape {index.shape} cannot select from {len(self)} images.")
            index = np.flatnonzero(index)
        index = index.astype(np.int64)
        if len(index) == len(self) and np.array_equal(index, np.arange(len(self))):
            return dataclasses.replace(self, unreadable=[])
        return dataclasses.replace(
            self,
            labels=None if self.labels is None else self.labels[index],
            counts=None if self.counts is None else self.counts[index],
            captions=None if self.captions is None else [self.captions[i] for i in index],
            groups={name: values[index] for name, values in self.groups.items()},
            rows=self.rows[index],
            unreadable=[],
        )

    def sample(self, n: int, seed: int = 0) -> ImageSet:
        """`n` images drawn without replacement, in their stored order. Raises DataError where there are fewer."""
        if not 0 < n <= len(self):
            raise DataError(f"{self.spec}: {n} images were asked for, but it has {len(self)}; ask for fewer.")
        if n == len(self):
            return self.select(np.arange(n))
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:n]))


def digest_of(*parts: object) -> str:
    """sha256 (hex) of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_of_rows(whole: str, count: int, rows: Sequence[int]) -> str:
    """The digest of some of `count` rows, where only that of all of them, `whole`, can be had."""
    rows = list(rows)
    return whole if rows == list(range(count)) else digest_of(whole, rows)
