"""Corruptions of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich 2019), applied to the crop that a model sees.

Two parameter tables exist, for 224 and for 32 pixels; the image's side chooses one and nothing is scaled. The published
ImageNet-C stores its images as JPEG of quality 85 afterwards; here that is done where it is asked for (`jpeg85`). The
same (image id, name, severity, seed) gives the same pixels,
whatever the batch or the order. A family of corruptions is a file; another package adds one by an entry point of the
group `qclip.corruptions`, a script by `CORRUPTIONS.register`.

Frost is made of photographs in ImageNet-C. `frost_gen` generates its ice: it is another corruption, and no mean over
those of ImageNet-C holds it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qclip.errors import DataError, nearest
from qclip.registry import Registry

from .stored import jpeg

SEVERITIES = (1, 2, 3, 4, 5)
STORED = 85  # quality of the published ImageNet-C's files
SMALL_SIDE = 64  # up to here the 32-pixel table holds


class Corruption(Protocol):
    """`version` rises with every change of its pixels: embeddings that are kept on disk are then computed again.

    It may have a `group`, one of `GROUPS`: means are then given for the group, too.
    """

    name: str
    label: str
    version: int

    def __call__(
        self, image: NDArray[np.float64], severity: int, small: bool, rng: np.random.Generator
    ) -> NDArray[np.floating[Any]]:
        """image: `[H, W, 3]` in 0..1; the result may leave that range and is clipped. severity: 1 to 5. small: whether
        the parameters for 32 pixels hold. rng: the only source of chance."""
        ...


_HERE = "qclip.data.corruptions"
OWN = {  # in the order of the paper; the last four are its validation set
    "gaussian_noise": f"{_HERE}.noise:GaussianNoise",
    "shot_noise": f"{_HERE}.noise:ShotNoise",
    "impulse_noise": f"{_HERE}.noise:ImpulseNoise",
    "defocus_blur": f"{_HERE}.blur:DefocusBlur",
    "glass_blur": f"{_HERE}.glass:GlassBlur",
    "motion_blur": f"{_HERE}.blur:MotionBlur",
    "zoom_blur": f"{_HERE}.blur:ZoomBlur",
    "snow": f"{_HERE}.weather:Snow",
    "frost_gen": f"{_HERE}.weather:FrostGen",
    "fog": f"{_HERE}.weather:Fog",
    "brightness": f"{_HERE}.colour:Brightness",
    "contrast": f"{_HERE}.colour:Contrast",
    "elastic_transform": f"{_HERE}.digital:ElasticTransform",
    "pixelate": f"{_HERE}.digital:Pixelate",
    "jpeg_compression": f"{_HERE}.digital:JpegCompression",
    "speckle_noise": f"{_HERE}.noise:SpeckleNoise",
    "gaussian_blur": f"{_HERE}.blur:GaussianBlur",
    "spatter": f"{_HERE}.spatter:Spatter",
    "saturate": f"{_HERE}.colour:Saturate",
}
CORRUPTIONS: Registry[Corruption] = Registry(
    "corruption",
    "qclip.corruptions",
    OWN,
    ("label", "version", "__call__"),
    DataError,
)

GROUPS = {
    "noise": "Noise",
    "blur": "Blur",
    "weather": "Weather",
    "digital": "Digital",
    "validation": "Validation set",  # the four that ImageNet-C keeps to tune on: in no mean over the others
}
ALL, PUBLISHED = "all", "imagenet-c"
MANY = (ALL, PUBLISHED, *GROUPS)  # names that stand for many
GENERATED = "frost_gen"  # stands where ImageNet-C has frost, and is not it


def members(many: str) -> tuple[str, ...]:
    """Ours of a group, or of "imagenet-c": what a mean that bears its name is taken over."""
    return tuple(name for name in OWN if _within(name, many))


def group(name: str) -> str:
    """The group of a corruption, one of `GROUPS`; "" where it has none. Raises DataError for an unknown name."""
    return getattr(CORRUPTIONS.get(name), "group", "")


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Names of corruptions, each once, for names of corruptions and of groups.

    "all" stands for every corruption that is known, those of other packages among them; "imagenet-c" for those of
    ImageNet-C that are drawn as published: all but frost. Raises DataError for an unknown name.
    """
    found: list[str] = []
    for name in names:
        if name in CORRUPTIONS:
            found.append(name)
        elif name in MANY:
            found += [each for each in CORRUPTIONS if name == ALL or _within(each, name)]
        else:
            raise DataError(f"unknown corruption {name!r}; {nearest(name, [*CORRUPTIONS, *MANY])}")
    return tuple(dict.fromkeys(found))


def _within(name: str, many: str) -> bool:
    if many == PUBLISHED:
        return name in OWN and name != GENERATED and group(name) != "validation"
    return group(name) == many


def apply(
    image: NDArray[np.uint8], name: str, severity: int, seed: int, image_id: int = 0, jpeg85: bool = False
) -> NDArray[np.uint8]:
    """Corrupted copy of one uint8 image `[H, W, 3]`; severity 0 is the image itself. jpeg85: what is corrupted goes
    through JPEG of quality 85, as the published images did.

    Raises DataError for an unknown name, a severity outside 0..5, another shape or dtype, an image that is too small,
    or a corruption that gives anything but finite numbers of the image's shape.
    """
    check(name, severity)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"corruptions take uint8 images [H, W, 3], not {image.dtype} {list(image.shape)}.")
    if severity == 0:
        return image.copy()
    rng = chance(name, severity, seed, image_id)
    small = max(image.shape[:2]) <= SMALL_SIDE
    worse = np.asarray(CORRUPTIONS.made(name)(image.astype(np.float64) / 255, severity, small, rng))
    if worse.dtype != np.float32:
        worse = worse.astype(np.float64)
    if worse.shape != image.shape or not np.isfinite(worse).all():
        raise DataError(
            f"corruption {name!r} gives {list(worse.shape)} with {np.size(worse) - np.isfinite(worse).sum()} NaN or "
            f"infinite values for an image {list(image.shape)}; it must give finite numbers of the same shape"
        )
    done = np.rint(np.clip(worse, 0, 1) * 255).astype(np.uint8)
    return jpeg(done, STORED) if jpeg85 else done


def chance(name: str, severity: int, seed: int, image_id: int) -> np.random.Generator:
    """What an image's corruption draws from."""
    return np.random.default_rng([zlib.crc32(name.encode()), severity, seed % 2**64, image_id])


def check(name: str, severity: int) -> None:
    """Raises DataError for an unknown name or a severity outside 0..5."""
    CORRUPTIONS.get(name)
    if severity not in (0, *SEVERITIES):
        raise DataError(f"{name} has severities 1 to 5 (0 = none), not {severity!r}.")
