"""Images with captions, as training takes them: pixels, tokens, and which of them a step sees.

What a step sees follows from the seed and its number alone, so that a run that goes on sees what it would have seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import seeds
from ..calibration.gather import IMAGES, Pixels, Samples, digest, loaded, read_images
from ..data import ImageSet, as_set, is_set
from ..errors import DataError
from ..models import Encoders

Rows = NDArray[np.int64]
#: What a class name is put into where a set has no captions and no prompts of its own.
PROMPT = "a photo of a {}."


@dataclasses.dataclass(frozen=True)
class Pairs:
    """`images` `[n, 3, H, W]`, preprocessed; `tokens` int64 `[m, context]` of the distinct captions; `captions`: of
    each image, its captions' places in `tokens`."""

    images: Pixels
    tokens: Tensor
    captions: list[list[int]]
    description: dict  # source, counts, hash: goes into the provenance

    def __len__(self) -> int:
        return len(self.captions)

    def pixels(self, rows: Rows) -> Tensor:
        return loaded(self.images[rows])  # type: ignore[index]

    def select(self, rows: Rows) -> Pairs:
        """Some of the pairs; captions keep their places."""
        return dataclasses.replace(
            self,
            images=self.images[rows],  # type: ignore[index]
            captions=[self.captions[row] for row in rows],
        )

    def split(self, share: float, seed: int, what: str = "held-out pairs") -> tuple[Pairs, Pairs | None]:
        """Those to learn from, and the `share` that is held out, drawn by `seed` and `what`; None: none are."""
        count = round(share * len(self))
        if count < 2:
            return self, None
        order = seeds.generator(seed, what).permutation(len(self))
        return self.select(np.sort(order[count:])), self.select(np.sort(order[:count]))

    def batch(self, step: int, size: int, seed: int) -> tuple[Rows, Rows]:
        """Rows of the images of a step, and the place of a caption for each: epochs in random order, what does not fill
        a batch left out, one caption of an image drawn per epoch."""
        epoch, place = divmod(step, len(self) // size)
        draw = seeds.generator(seed, f"epoch {epoch}")
        order, chosen = draw.permutation(len(self)), draw.random(len(self))
        rows = order[place * size : (place + 1) * size]
        return rows, np.array([self._caption(row, chosen[row]) for row in rows])

    def firsts(self) -> tuple[Rows, Rows]:
        """All rows, each with the first caption."""
        return np.arange(len(self)), np.array([each[0] for each in self.captions])

    def _caption(self, row: int, chosen: float) -> int:
        own = self.captions[row]
        return own[int(chosen * len(own))]

    def samples(self, count: int = IMAGES) -> Samples:
        """What scales are calibrated on: all, or `count` of them, evenly from first to last."""
        rows, texts = self.firsts()
        some = rows if len(rows) <= count else rows[np.arange(count) * len(rows) // count]
        images = self.images if len(some) == len(rows) else self.images[some]
        return Samples(images, self.tokens[texts[some]], self.description, some)

    @classmethod
    def of(cls, data: object, encoders: Encoders, count: int = 1000, seed: int = 0, strict: bool = False) -> Pairs:
        """From what a user may give: `Pairs`, which come back as they are; a data name, an `ImageSet` or a
        `datasets.Dataset`, or a list of them, of which `count` images are drawn; or (images `[n, 3, H, W]`,
        preprocessed; a caption, or a list of them, for each).

        A set without captions has its class names for captions (`worded`). An image without a caption, or that cannot
        be read, is left out with a warning; with `strict` the latter raises. Raises DataError where captions are
        missing or fewer than two pairs are left.
        """
        if isinstance(data, Pairs):
            return data
        if encoders.tokenizer is None:
            raise DataError("the model has no tokenizer, so captions cannot be read; set model.tokenizer")
        pixels: Pixels
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
            images, texts, name = data[0], [[c] if isinstance(c, str) else list(c) for c in data[1]], "given pairs"
            if len(images) != len(texts):
                raise DataError(
                    f"{len(images)} images and captions of {len(texts)} were given; each image needs its own"
                )
            pixels, unreadable = images, 0
        else:
            given = data if isinstance(data, list) and data else [data]
            if twice := [name for i, name in enumerate(given) if isinstance(name, str) and name in given[:i]]:
                raise DataError(f"{twice[0]} was named twice; name it once, or pairs held out would be learned from")
            sets = [captioned(each) for each in given]
            name = " + ".join(each.spec for each in sets)
            pixels, texts, unreadable = _drawn(sets, encoders, count, seed, strict)
        texts = [[c for c in each if c.strip()] for each in texts]
        if lacking := [i for i, each in enumerate(texts) if not each]:
            raise DataError(f"image {lacking[0]} of the {name} has an empty caption; give each image one")
        if len(texts) < 2:
            raise DataError(f"{name} has {len(texts)} pair(s), and training needs two at least; give more")
        place: dict[str, int] = {}
        captions = [[place.setdefault(c, len(place)) for c in each] for each in texts]
        tokens = encoders.tokenizer(list(place))
        description = {
            "source": name,
            "pairs": len(texts),
            "captions": len(place),
            "seed": seed,
            "unreadable": unreadable,
            "sha256": hashlib.sha256(f"{digest(pixels, encoders, tokens, 'training')} {captions}".encode()).hexdigest(),
        }
        if isinstance(pixels, Tensor):
            pixels = pixels.to(encoders.device, encoders.dtype)
        return cls(pixels, tokens, captions, description)


def captioned(data: object) -> ImageSet:
    """The images of a set that have a caption; where it has none, each has its class name, in a prompt, for one.

    All images of a class have the same caption, so that the contrastive loss takes none of them for a negative of
    another. Raises DataError where there are neither captions nor classes, or fewer than two images.
    """
    if not (is_set(data) or hasattr(data, "captions")):
        raise DataError(
            f"pairs are a data name, a set with captions or classes, a list of these, or (images, captions), not "
            f"{type(data).__name__}"
        )
    found = as_set(data)
    if found.captions is None:
        if found.labels is None or not found.classes:
            hint = ", or the column that holds them (?captions=COLUMN)" if found.spec.startswith("parquet:") else ""
            raise DataError(
                f"{found.spec} has no captions and no class names, and training needs pairs; name a set that has{hint}"
            )
        found = worded(found)
        warnings.warn(
            f"{found.spec} has no captions: of each image it is its class name, as in {found.captions[0][0]!r}",  # type: ignore[index]
            stacklevel=5,
        )
    assert found.captions is not None
    has = np.array([any(c.strip() for c in each) for each in found.captions], bool)
    if not has.all():
        warnings.warn(
            f"{found.spec}: {int((~has).sum())} of {len(has)} images have no caption and are left out", stacklevel=5
        )
        found = found.select(has)
    if len(found) < 2:
        raise DataError(
            f"{found.spec} has {len(found)} image(s) with a caption, and training needs two at least; give more"
        )
    return found


def worded(data: ImageSet) -> ImageSet:
    """With its class names for captions, in the first of its prompts. Raises as `ImageSet.labelled`."""
    labels, classes = data.labelled()
    prompt = data.prompts if isinstance(data.prompts, str) else (data.prompts or [PROMPT])[0]
    prompt = prompt if "{}" in prompt else PROMPT
    return dataclasses.replace(data, captions=[[prompt.replace("{}", classes[label])] for label in labels])


def _drawn(
    sets: list[ImageSet], encoders: Encoders, count: int, seed: int, strict: bool
) -> tuple[Pixels, list[list[str]], int]:
    """`count` images of all sets together, each as likely as any other: pixels, captions, how many are unreadable."""
    starts = np.cumsum([0, *(len(each) for each in sets)])
    drawn = np.sort(np.random.default_rng(seed).permutation(starts[-1])[:count])
    pixels: list[Pixels] = []
    texts: list[list[str]] = []
    unreadable = 0
    for each, start in zip(sets, starts[:-1], strict=True):
        rows = drawn[(drawn >= start) & (drawn < start + len(each))] - start
        if not len(rows):
            continue
        chosen = each.select(rows)
        assert chosen.captions is not None
        found, readable = read_images(chosen, encoders, strict, "training")
        pixels.append(found)
        texts += [chosen.captions[i] for i in readable]
        unreadable += len(chosen) - len(readable)
    return pixels[0] if len(pixels) == 1 else torch.cat([loaded(each) for each in pixels]), texts, unreadable
