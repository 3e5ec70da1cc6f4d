"""Encoded bytes to RGB, with every size checked before memory is taken."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from qclip.data.imageset import UnreadableImage

LARGEST_PIXELS = 64 * 2**20  # 200 MB as RGB
LARGEST_BYTES = 256 * 2**20  # of one encoded image

# What Pillow's decoders are known to raise on damaged files; anything else is a fault of ours and passes.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode(encoded: bytes, where: str) -> Image.Image | UnreadableImage:
    """RGB image, or the error that names `where` and says what is wrong with it."""
    if len(encoded) > LARGEST_BYTES:
        return UnreadableImage(f"{where}: {len(encoded)} bytes are more than the {LARGEST_BYTES} an image may have.")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size  # from the header; pixels are not decoded yet
            if width * height > LARGEST_PIXELS:
                return UnreadableImage(f"{where}: {width} x {height} pixels, more than the {LARGEST_PIXELS} allowed.")
            return image.convert("RGB")
    except _DAMAGED as error:
        reason = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "not an image that Pillow knows"
        return UnreadableImage(f"{where}: cannot be decoded ({reason or type(error).__name__}).")
