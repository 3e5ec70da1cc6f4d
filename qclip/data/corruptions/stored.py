"""What storing an image as JPEG does to its pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow


def jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """The image `[H, W, 3]` after JPEG of this quality, chroma subsampled as Pillow does by default."""
    stream = io.BytesIO()
    Pillow.fromarray(image).save(stream, "JPEG", quality=quality)
    with Pillow.open(stream) as decoded:
        return np.array(decoded)  # one that may be written to
