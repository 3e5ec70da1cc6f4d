"""Turns images into the tensors that a model takes; threads prepare and corrupt the next batch meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qclip.data import corruptions
from qclip.data.decoding import too_large
from qclip.data.imageset import ImageSet, UnreadableImage
from qclip.data.workers import pool
from qclip.errors import DataError

Preprocess = Callable[[Image.Image], Tensor]


def batches(
    data: ImageSet,
    preprocess: Preprocess,
    size: int = 64,
    strict: bool = False,
    corruption: str | None = None,
    severity: int = 0,
    seed: int = 0,
    crops: Crops | None = None,
    jpeg85: bool = False,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yields (positions in `data` int64 `[b]`, images `[b, 3, H, W]`), b <= size.

    An unreadable image is left out and noted in `data.unreadable` as (position, reason); with `strict` it raises
    UnreadableImage. `corruption` at `severity` acts on the crop, between resizing and normalisation, in 8 bits; it
    depends on the image's row in its source and on `seed`, not on batch or order; `jpeg85` stores it as JPEG of quality
    85 before it is normalised again. `crops`: keeps what is corrupted, for
    the next call with the same data and an equal `preprocess`. Raises DataError for empty data, or
    when no image at all can be read.
    """
    if len(data) == 0:
        raise DataError(f"{data.spec}: no images to read.")
    if size < 1:
        raise DataError(f"a batch of {size} images is impossible; take at least one.")
    if corruption is not None:
        corruptions.check(corruption, severity)
    corrupt = (
        _Corrupter(preprocess, corruption, severity, seed, jpeg85) if corruption is not None and severity else None
    )
    return _prefetched(data, preprocess, size, strict, corrupt, crops)


def _prefetched(
    data: ImageSet, preprocess: Preprocess, size: int, strict: bool, corrupt: _Corrupter | None, crops: Crops | None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    data.unreadable.clear()
    starts = range(0, len(data), size)
    workers = pool(torch.get_num_threads(), "qclip-batches") if corrupt else None

    def make(start: int) -> Batch:
        if workers is None or corrupt is None:
            return read(start)
        known = None if crops is None else crops.get(data, start, size)
        if known is None:
            positions, tensors, faults = read(start)
            known = positions, list(workers.map(corrupt.crop, tensors)), faults
            if crops is not None:
                crops.keep(data, start, size, known)
        positions, cut, faults = known
        return positions, list(workers.map(corrupt, cut, data.rows[positions].tolist())), faults

    def read(start: int) -> Batch:
        positions, tensors, faults = [], [], []
        indices = range(start, min(start + size, len(data)))
        for index, image in zip(indices, data.read(indices), strict=True):
            if not isinstance(image, UnreadableImage) and (reason := too_large(image.size)):  # of a foreign source
                image = UnreadableImage(f"image {index}: {reason}.")
            if isinstance(image, UnreadableImage):
                if strict:
                    raise image
                faults.append((index, str(image)))
                continue
            tensors.append(preprocess(image))
            positions.append(index)
        return np.array(positions, np.int64), tensors, faults

    seen = 0
    with workers or contextlib.nullcontext(), ThreadPoolExecutor(1, "qclip-batches") as ahead_of_model:
        ahead = ahead_of_model.submit(make, 0)
        for start in starts:
            positions, tensors, faults = ahead.result()
            if start + size < len(data):
                ahead = ahead_of_model.submit(make, start + size)
            data.unreadable.extend(faults)
            seen += len(positions)
            if tensors:
                yield positions, torch.stack(tensors)
    if not seen:
        raise DataError(f"{data.spec}: none of its {len(data)} images can be read; the first: {data.unreadable[0][1]}")


Batch = tuple[NDArray[np.int64], list[Tensor], list[tuple[int, str]]]  # positions, images, (position, reason)


class Crops:
    """8-bit crops of one set in at most `most` bytes, so that an image is decoded once for all its corruptions."""

    def __init__(self, most: int = 256 << 20) -> None:
        self.most = most
        self._kept: dict[tuple[str, int, int], Batch] = {}

    def get(self, data: ImageSet, start: int, size: int) -> Batch | None:
        return self._kept.get((data.digest, start, size))

    def keep(self, data: ImageSet, start: int, size: int, batch: Batch) -> None:
        self._kept = {key: other for key, other in self._kept.items() if key[0] == data.digest}
        if sum(crop.nbytes for _, crops, _ in (*self._kept.values(), batch) for crop in crops) <= self.most:
            self._kept[data.digest, start, size] = batch


class _Corrupter:
    """Undoes a normalisation, corrupts 8-bit pixels, and normalises again.

    What the normalisation is, is read from black, white and grey pictures, so that any `preprocess` will do that is
    affine in the pixel values for each channel (all of open_clip's, timm's and Hugging Face's are).
    """

    def __init__(self, preprocess: Preprocess, name: str, severity: int, seed: int, jpeg85: bool) -> None:
        self.name, self.severity, self.seed, self.jpeg85 = name, severity, seed, jpeg85
        black, grey, white = (
            preprocess(Image.new("RGB", (64, 64), (v, v, v))).double().amax((1, 2), keepdim=True) for v in (0, 51, 255)
        )
        self.black, self.span = black, white - black
        self.dtype = preprocess(Image.new("RGB", (64, 64))).dtype
        if not torch.allclose(black + self.span * 0.2, grey, atol=1e-4) or not (self.span.abs() > 1e-6).all():
            raise DataError(
                f"{name} cannot be applied: `preprocess` is not affine in the pixel values, so that the "
                "crop cannot be recovered from its output."
            )

    def crop(self, tensor: Tensor) -> Tensor:
        """uint8 `[3, H, W]` behind what `preprocess` gave."""
        return ((tensor.double() - self.black) / self.span * 255).round().clamp(0, 255).to(torch.uint8)

    def __call__(self, crop: Tensor, image_id: int) -> Tensor:
        pixels = crop.permute(1, 2, 0).numpy()
        worse = corruptions.apply(pixels, self.name, self.severity, self.seed, image_id, self.jpeg85)
        return (self.black + torch.from_numpy(worse).permute(2, 0, 1).double() / 255 * self.span).to(self.dtype)
