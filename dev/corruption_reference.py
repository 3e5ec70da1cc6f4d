"""Statistics of ImageNet-C's published corruptions, that tests hold ours to.

    python -m dev.corruption_reference make_imagenet_c.py make_cifar_c.py

The two files are of https://github.com/hendrycks/robustness, ImageNet-C/create_c (Hendrycks & Dietterich 2019);
nothing of them is here. They need opencv-python-headless, scikit-image, scipy and, for motion in ImageMagick's place,
imagecorruptions (`pip install --no-deps imagecorruptions "setuptools<81"`). What newer libraries call otherwise is
renamed in their text. Their results are rounded to 8 bits as ours are; the published sets were cut to 8 bits, which is
half a level darker. Writes tests/data/corruption_statistics.json.
"""

from __future__ import annotations

import io
import json
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qclip.files import write_atomic
from tests.data.corruption_statistics import DRAWS, FILE, SIDES, images, statistics

RENAMED = {
    "multichannel=True": "channel_axis=-1",
    "np.float_": "np.float64",
    "np.fromstring": "np.frombuffer",
    "scipy.ndimage.interpolation": "scipy.ndimage",
    ", mode='L')": ")",
}
MORE = 4  # draws for one of the test's, so that most of the difference is the test's own chance
NAMES = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow fog brightness "
    "contrast elastic_transform pixelate jpeg_compression speckle_noise gaussian_blur spatter saturate"
).split()


class Wand:
    """As much of `wand.image.Image` as the published code calls."""

    def __init__(self, blob: bytes) -> None:
        self.wand = self
        self.pixels = np.asarray(Image.open(io.BytesIO(blob)))

    def make_blob(self) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(self.pixels).save(stream, "PNG")
        return stream.getvalue()


def motion(wand: Wand, radius: float, sigma: float, angle: float) -> None:
    from imagecorruptions.corruptions import _motion_blur

    wand.pixels = np.rint(_motion_blur(wand.pixels, int(radius), sigma, angle)).clip(0, 255).astype(np.uint8)


def stubs() -> None:
    """Modules that the published code imports and newer systems lack."""
    np.float_ = np.float64  # imagecorruptions reads it
    modules = {"wand": {}, "wand.image": {"Image": Wand}, "wand.color": {}}
    modules["wand.api"] = {"library": types.SimpleNamespace(MagickMotionBlurImage=motion)}
    modules["scipy.ndimage.interpolation"] = {"map_coordinates": None}
    for name, contents in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)


def published(path: Path) -> dict[str, Any]:
    """The functions of a file, without the loop that makes the sets."""
    text = path.read_text()
    text = text[text.index("# /////////////// Distortion Helpers") : text.index("# /////////////// End Distortions")]
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    found: dict[str, Any] = {"np": np}
    exec(compile(text, str(path), "exec"), found)
    return found


def main(imagenet: str, cifar: str) -> None:
    stubs()
    out: dict[str, dict[str, list[dict[str, float]]]] = {}
    for side, path in zip(SIDES, (imagenet, cifar), strict=True):
        functions = published(Path(path))
        out[str(side)] = {}
        for name in NAMES:
            rows = []
            for severity in range(1, 6):
                np.random.seed(zlib.crc32(f"{side} {name} {severity}".encode()))
                draws = MORE * DRAWS[name] if name in DRAWS else 1
                pairs = []
                for clean in images(side) * draws:
                    worse = np.asarray(functions[name](Image.fromarray(clean), severity), np.float64)
                    pairs.append((clean, np.rint(np.nan_to_num(worse, nan=0.0)).clip(0, 255).astype(np.uint8)))
                rows.append({key: round(value, 5) for key, value in statistics(pairs).items()})
            out[str(side)][name] = rows
            print(side, name, rows[0], rows[4], flush=True)
    lines = ",\n".join(
        f'  "{side}": {{\n' + ",\n".join(f'   "{name}": {json.dumps(rows)}' for name, rows in found.items()) + "\n  }"
        for side, found in out.items()
    )
    text = '{\n "made by": "' + __doc__.split("\n")[2].strip() + f'",\n "statistics": {{\n{lines}\n }}\n}}\n'
    write_atomic(FILE, text.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
