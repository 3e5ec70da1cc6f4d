"""Encoded bytes to RGB, with every size checked before memory is taken."""

from __future__ import annotations

import functools
import io

from PIL import Image

from qclip.data.imageset import UnreadableImage
from qclip.data.pixels import to_rgb

LARGEST_PIXELS = 64 * 2**20  # 200 MB as RGB
LARGEST_BYTES = 256 * 2**20  # of one encoded image
# Transforms resize the short side and then crop: at 384 pixels a side, 50 : 1 makes 22 MB on the way, 10^6 : 1 would
# make 440 GB. Those that resize the long side leave no pixel of the short one.
LARGEST_ASPECT = 50

# PostScript is a program, and Pillow would run it.
_PROGRAMS = {"EPS"}

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  \r\n")


def decode(encoded: bytes, where: str) -> Image.Image | UnreadableImage:
    """RGB image, or the error that names `where` and says what is wrong with it."""
    if not encoded:
        return UnreadableImage(f"{where}: is empty (0 bytes).")
    if len(encoded) > LARGEST_BYTES:
        return UnreadableImage(f"{where}: {len(encoded)} bytes are more than the {LARGEST_BYTES} an image may have.")
    try:
        with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
            if reason := too_large(image.size):  # from the header; pixels are not decoded yet
                return UnreadableImage(f"{where}: {reason}.")
            return to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged bytes, SyntaxError and RecursionError too
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "PostScript is not run" if encoded.startswith(b"%!PS") else "not an image that Pillow knows"
        else:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return UnreadableImage(f"{where}: cannot be decoded ({reason}).")


def too_large(size: tuple[int, int]) -> str | None:
    """Why a picture of (width, height) is not given to a transform, or None."""
    width, height = size
    if width * height > LARGEST_PIXELS:
        return f"{width} x {height} pixels, more than the {LARGEST_PIXELS} allowed"
    if max(size) > LARGEST_ASPECT * min(size):
        return f"{width} x {height} pixels, longer than {LARGEST_ASPECT} times its width; crop it"
    return None


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes, with the dot and in small letters, of the formats that Pillow reads."""
    formats = set(_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def looks_encoded(head: bytes) -> bool:
    """Whether the first bytes (16 are enough) are those of a common image format, whatever the file is called."""
    container = (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] in (b"ftypavif", b"ftypavis")
    return head.startswith(_SIGNATURES) or container


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.preinit()  # the common ones come first, as in Pillow
    Image.init()
    return tuple(name for name in Image.ID if name not in _PROGRAMS)
