"""What calibration runs on: images from whatever a user may give, and captions."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import as_set, batches, is_set
from ..errors import DataError
from ..models import Encoders
from . import captions as built_in
from .texts import texts

IMAGES = 1000  # images, each with one caption, as in the paper that this project follows (arXiv 2509.21173)
TEXTS = 1000  # captions at most
HELD = 128 << 20  # bytes of pixels that are held; of a set with more, images are decoded again for every pass


class Decoded:
    """The preprocessed images of a set whose pixels are too many to be held: decoded when they are asked for."""

    def __init__(self, data: Any, preprocess: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.data, self.preprocess, self.device, self.dtype = data, preprocess, device, dtype

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice | np.ndarray) -> Decoded:
        some = self.data.select(np.arange(len(self.data))[rows])
        return Decoded(some, self.preprocess, self.device, self.dtype)

    def loaded(self) -> Tensor:
        """`[n, 3, H, W]`. Raises UnreadableImage where a file has changed since it was read first."""
        found = [batch for _, batch in batches(self.data, self.preprocess, strict=True)]
        return torch.cat(found).to(self.device, self.dtype)


Pixels = Tensor | Decoded


def loaded(images: Pixels) -> Tensor:
    return images.loaded() if isinstance(images, Decoded) else images


@dataclasses.dataclass
class Samples:
    """`images` `[n, 3, H, W]`, preprocessed; `tokens` int64 `[m, context]`."""

    images: Pixels
    tokens: Tensor | None
    description: dict  # source, counts, hash: goes into the provenance
    rows: np.ndarray | None = None  # int64 [n]: of the images in their set's source (`ImageSet.rows`)

    def __len__(self) -> int:
        """Images and captions."""
        return len(self.images) + (0 if self.tokens is None else len(self.tokens))

    def first(self, count: int | None) -> Samples:
        """The first `count` images and captions; None: all."""
        tokens = None if self.tokens is None else self.tokens[:count]
        rows = None if self.rows is None else self.rows[:count]
        return Samples(self.images[:count], tokens, self.description, rows)

    def image_batches(self, size: int = 32) -> Iterator[Pixels]:
        """Parts of `images`; of a `Decoded` one, nothing is decoded yet."""
        for start in range(0, len(self.images), size):
            yield self.images[start : start + size]

    def token_batches(self, encoders: Encoders) -> Iterator[Tensor]:
        """Captions of equal length together: the tower stops at the last end of a batch, so that no position behind a
        caption's own end enters a statistic. (For a tower that does not stop there, see `Encoders.text_positions`.)"""
        if self.tokens is None:
            return
        lengths = encoders.text_ends(self.tokens)
        for length in lengths.unique().tolist():
            yield from self.tokens[lengths == length].split(32)


@dataclasses.dataclass
class _Images:
    """Images as they were given, and what is known about them."""

    pixels: Pixels
    source: str
    captions: list[str] | None = None
    unreadable: int = 0
    rows: np.ndarray | None = None


def samples(
    calibration: object, encoders: Encoders, images: int = IMAGES, seed: int = 0, strict: bool = False
) -> Samples:
    """From what a user may give: a data name, an `ImageSet`, a `datasets.Dataset`, a loader of image tensors (or tuples
    that begin with one), or a tensor of preprocessed images `[n, 3, H, W]`. Captions are the set's own, else a built-in
    list. For a text tower alone see `texts`. `Samples` come back as they are.

    An unreadable image is left out with a warning; with `strict` it raises. Raises DataError when nothing is there, a
    value is not finite, or the model does not take images of this shape.
    """
    if isinstance(calibration, Samples):
        return calibration
    if "vision" not in encoders.towers:
        tokens, source, captions_from = texts(calibration, encoders, TEXTS)
        sha = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
        description = _described(source, 0, tokens, captions_from, seed, 0, sha)
        return Samples(torch.zeros(0, 3, 1, 1), tokens, description)
    given = _images(calibration, encoders, images, seed, strict)
    captions = built_in.CAPTIONS if given.captions is None else given.captions
    tokens = None if encoders.tokenizer is None else encoders.tokenizer(captions[:TEXTS])
    captions_from = "built-in captions" if given.captions is None else "the set's captions"
    sha = digest(given.pixels, encoders, tokens)
    description = _described(given.source, len(given.pixels), tokens, captions_from, seed, given.unreadable, sha)
    pixels = given.pixels
    if isinstance(pixels, Tensor):
        pixels = pixels.to(encoders.device, encoders.dtype)
    return Samples(pixels, tokens, description, given.rows)


def _described(
    source: str, images: int, tokens: Tensor | None, captions_from: str, seed: int, unreadable: int, digest: str
) -> dict:
    return {
        "source": source,
        "images": images,
        "captions": 0 if tokens is None else len(tokens),
        "captions_from": captions_from,
        "seed": seed,
        "unreadable": unreadable,
        "sha256": digest,
    }


def _images(calibration: object, encoders: Encoders, count: int, seed: int, strict: bool) -> _Images:
    source = type(calibration).__name__
    if is_set(calibration):
        calibration = as_set(calibration)
    if isinstance(calibration, Tensor):
        return _Images(calibration[:count], source)
    if hasattr(calibration, "image") and hasattr(calibration, "sample"):
        return _from_set(calibration, encoders, count, seed, strict)
    if isinstance(calibration, Iterable):
        return _Images(_from_loader(calibration, count), source)
    raise DataError(f"calibration is a data name, a loader or a tensor of images, not {source}")


def _from_set(data: Any, encoders: Encoders, count: int, seed: int, strict: bool) -> _Images:
    drawn = data.sample(min(count, len(data)), seed)
    pixels, readable = read_images(drawn, encoders, strict, "calibration")
    captions = None if drawn.captions is None else [c for group in drawn.captions for c in group[:1]]
    return _Images(pixels, data.spec, captions, len(drawn) - len(readable), drawn.rows[readable])


def read_images(drawn: Any, encoders: Encoders, strict: bool, what: str) -> tuple[Pixels, np.ndarray]:
    """The preprocessed images of a set, and their positions in it int64 `[n]`: those that cannot be read are left out
    with a warning, which calls them `what`; with `strict` the first of them raises. Raises DataError."""
    if encoders.preprocess is None:
        raise DataError(
            f"the model has no preprocess, so {what} images cannot be prepared; "
            "pass a tensor of preprocessed images, or set model.preprocess"
        )
    positions: list[np.ndarray] = []
    kept: list[Tensor] = []
    held = 0
    for rows, batch in batches(drawn, encoders.preprocess, strict=strict):
        positions.append(rows)
        held += batch.nbytes
        kept = [*kept, batch] if held <= HELD else []
    for note in drawn.notes:
        warnings.warn(note, stacklevel=5)
    unreadable = [why for _, why in drawn.unreadable]
    if unreadable:
        listed = "; ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
        warnings.warn(
            f"{drawn.spec}: {len(unreadable)} of {len(drawn)} {what} images cannot be read and are left out: {listed}",
            stacklevel=5,
        )
    readable = np.concatenate(positions)
    if held > HELD:
        again = Decoded(drawn.select(readable), encoders.preprocess, encoders.device, encoders.dtype)
        return again, readable
    return torch.cat(kept), readable


def _from_loader(loader: Iterable, count: int) -> Tensor:
    parts, have = [], 0
    for batch in loader:
        part = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(part, Tensor):
            raise DataError(
                f"the calibration loader gives {type(part).__name__}; it must give tensors of images, "
                "or tuples that begin with one"
            )
        parts.append(part)
        have += len(part)
        if have >= count:
            break
    if not parts:
        raise DataError("the calibration loader gave no batch; pass one with images")
    first, *others = dict.fromkeys(tuple(part.shape[1:]) for part in parts)
    if others:
        raise DataError(
            f"the calibration loader gives images of shape {first} and of shape {others[0]}; run all "
            "of them through model.preprocess"
        )
    return torch.cat(parts)[:count]


def _check(images: Tensor, encoders: Encoders, first: int, what: str) -> None:
    """Raises DataError where these are no images that the model can take; `first`: the number of the first one."""
    if images.ndim != 4 or len(images) == 0:
        raise DataError(f"{what} images must be a non-empty [n, 3, H, W] tensor, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(
            f"{what} images must be preprocessed, floating point, got {images.dtype}; run them through model.preprocess"
        )
    if not images.isfinite().all():
        bad = first + int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        raise DataError(f"{what} image {bad} holds NaN or Inf; remove it or check the preprocessing")
    if first == 0:
        _check_shape(images, encoders, what)


@torch.no_grad()
def _check_shape(images: Tensor, encoders: Encoders, what: str) -> None:
    """Some models take images of other sizes than their own: whether this one does is tried."""
    side = encoders.image_size
    if tuple(images.shape[1:]) == (3, side, side):
        return
    try:
        encoders.encode_image(images[:1])
    except (RuntimeError, ValueError, AssertionError):
        raise DataError(
            f"{what} images are {tuple(images.shape[1:])}, but the model takes {(3, side, side)}; run "
            "them through model.preprocess"
        ) from None


def digest(pixels: Pixels, encoders: Encoders, tokens: Tensor | None, what: str = "calibration") -> str:
    """sha256 (hex) of images and tokens, which are checked on the way; most images being repetitions is told. `what`:
    how messages call the images."""
    digest, distinct = hashlib.sha256(), set[int]()
    step = 32 if isinstance(pixels, Decoded) else max(len(pixels), 1)
    for start in range(0, max(len(pixels), 1), step):
        part = loaded(pixels[start : start + step])
        _check(part, encoders, start, what)
        for image in part.float().cpu().numpy():
            content = np.ascontiguousarray(image).tobytes()
            digest.update(content)
            distinct.add(hash(content))
    if 2 * len(distinct) < len(pixels):
        warnings.warn(
            f"{len(pixels) - len(distinct)} of {len(pixels)} {what} images repeat another one, so statistics are "
            f"of {len(distinct)}; give other images",
            stacklevel=4,
        )
    if tokens is not None:
        digest.update(tokens.cpu().numpy().tobytes())
    return digest.hexdigest()
