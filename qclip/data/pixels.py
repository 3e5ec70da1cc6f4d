"""Pixels of any kind to 8-bit RGB, by the range that the file's format gives them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

DARK = 1 / 16  # a deep picture that stays below this share of its range would be black in 8 bits


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it, in 8-bit RGB: the first frame, upright as EXIF says, over white where it is
    transparent (over black where white would hide it), more than 8 bits scaled by their range.

    Raises ValueError, saying why, where the range of the values is not known, too little of it is used for 8 bits, or
    every pixel is transparent; and whatever Pillow raises on a damaged file.
    """
    stored = repr(getattr(image, "tile", ()))  # how the file stores its pixels; loading empties it
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        rgb = _deep_grey(image, stored).convert("RGB")
    elif image.has_transparency_data:
        rgb = _opaque(image.convert("RGBA"))
    else:
        rgb = image.convert("RGB")
        if ";16" in stored:  # Pillow kept the high bytes
            _check_range(max(high for _, high in rgb.getextrema()) / 255)  # type: ignore[arg-type, misc]
    try:
        ImageOps.exif_transpose(rgb, in_place=True)
    except Exception:  # damaged EXIF data: the picture stays as it is stored, as viewers show it
        pass
    return rgb


def _deep_grey(image: Image.Image, stored: str) -> Image.Image:
    """Grey of 12 to 32 bits or floats, 8 bits."""
    full = 1.0 if image.mode == "F" else 4095 if "I;12" in stored else 32767 if "I;16S" in stored else 65535
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (0 <= low and high <= full):  # NaN, too
        raise ValueError(f"its pixels lie between {low:g} and {high:g}, a range that is not known; store 8 bits")
    _check_range(float(high) / full)
    return Image.fromarray(np.rint(values.astype(np.float32) * np.float32(255 / full)).astype(np.uint8))


def _check_range(used: float) -> None:
    if 0 < used < DARK:
        raise ValueError(f"its deep pixels use only {100 * used:.2g} % of their range; stretch them and store 8 bits")


def _opaque(image: Image.Image) -> Image.Image:
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    if high == 0:
        raise ValueError("every pixel is transparent")
    if low == 255:
        return image.convert("RGB")
    over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if min(channel_low for channel_low, _ in over.getextrema()) == 255:  # type: ignore[misc]
        over = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return over
