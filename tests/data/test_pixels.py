"""Pixels of every kind come out as a viewer shows them, or are named; none turns black or white without a word."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qclip.data import UnreadableImage, decoding
from qclip.data.decoding import decode
from qclip.data.pixels import to_rgb

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def through(image: Image.Image, kind: str, **options) -> Image.Image | UnreadableImage:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return decode(stream.getvalue(), "x")


def error_of(found, expected: np.ndarray) -> float:
    """Largest error of a grey picture in 8-bit levels."""
    assert not isinstance(found, UnreadableImage), found
    assert found.mode == "RGB"
    return float(np.abs(np.asarray(found, np.float64) - expected[..., None]).max())


@pytest.mark.parametrize("kind, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("JPEG2000", "I;16")])
def test_a_gradient_in_16_bits_is_one_in_8(kind, mode):
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    if mode == "I;16B":
        deep = Image.frombytes("I;16B", deep.size, (RAMP * 65535).astype(">u2").tobytes())
    assert error_of(through(deep, kind), 255 * RAMP) <= 1


def test_a_gradient_in_16_bits_a_channel_is_one_in_8():
    # Pillow reads such files and writes none
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    def png(scale: float, colour: int) -> bytes:
        channels = {2: 3, 6: 4}[colour]
        values = np.repeat((RAMP * 65535 * scale).astype(">u2")[..., None], channels, 2)
        if colour == 6:
            values[..., 3] = 65535
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        head = (64).to_bytes(4, "big") * 2 + bytes([16, colour, 0, 0, 0])
        signature = b"\x89PNG\r\n\x1a\n"
        return signature + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

    for colour in (2, 6):
        assert error_of(decode(png(1, colour), "x"), 255 * RAMP) <= 1
    assert "use only 5.9 % of their range" in str(decode(png(1 / 16.5, 2), "x"))


def test_pixels_of_32_bits_and_floats_have_a_known_range_or_are_named():
    assert error_of(through(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"), 255 * RAMP) <= 1
    assert error_of(through(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), 255 * RAMP) <= 1
    for values, match in (
        (RAMP * 1.5, "lie between 0 and 1.5, a range that is not known"),
        (RAMP * 255, "lie between 0 and 255"),
        (RAMP - 0.5, "between -0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP), "nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP), "inf"),
        (RAMP / 100, "use only 1 % of their range"),
    ):
        assert match in str(through(Image.fromarray(values.astype(np.float32)), "TIFF"))
    for values, match in (((RAMP - 0.5) * 2**31, "lie between -"), (RAMP * 70000, "between 0 and 70000")):
        assert match in str(through(Image.fromarray(values.astype(np.int32)), "TIFF"))


def test_twelve_bits_in_sixteen_are_named_and_black_stays_black():
    assert "use only 6.2 % of their range" in str(through(Image.fromarray((RAMP * 4095).astype(np.uint16)), "PNG"))
    assert error_of(through(Image.new("I;16", (64, 64)), "PNG"), 0 * RAMP) == 0
    bright = through(Image.fromarray(np.full((64, 64), 65535, np.uint16)), "PNG")
    assert error_of(bright, 255 + 0 * RAMP) == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_shows_white_and_what_is_opaque_stays(kind):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[0] = (200, 10, 20, 255)
    pixels[1] = (0, 0, 0, 128)
    pixels[2] = (9, 9, 9, 0)
    found = np.asarray(through(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert found[0, 0].tolist() == [200, 10, 20] and found[2, 0].tolist() == [255, 255, 255]
    assert abs(found[1, 0].astype(int) - 127).max() <= 1
    pixels[..., 3] = 255
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(pixels))), pixels[..., :3])


def test_white_on_nothing_shows_over_black_and_nothing_at_all_is_named():
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[1:, :, 3] = 0
    found = np.asarray(through(Image.fromarray(pixels), "PNG"))
    assert found[0].min() == 255 and found[1:].max() == 0
    pixels[..., 3] = 0
    assert "every pixel is transparent" in str(through(Image.fromarray(pixels), "PNG"))


def test_palettes_grey_with_alpha_one_bit_and_cmyk():
    few = Image.new("P", (4, 4), 1)
    few.putpalette([0, 0, 0, 255, 0, 0])
    few.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        shown = [through(few, kind).getpixel(at) for at in ((0, 0), (1, 1))]
        clear = [through(few, kind, transparency=0).getpixel(at) for at in ((0, 0), (1, 1))]
        assert shown == [(0, 0, 0), (255, 0, 0)] and clear == [(255, 255, 255), (255, 0, 0)]
    grey = Image.new("LA", (4, 4), (100, 255))
    grey.putpixel((0, 0), (100, 0))
    assert [through(grey, "PNG").getpixel(at) for at in ((0, 0), (1, 1))] == [(255,) * 3, (100,) * 3]
    assert to_rgb(grey.convert("RGBA").convert("PA")).getpixel((0, 0)) == (255,) * 3
    bit = Image.new("1", (4, 4))
    bit.putpixel((0, 0), 1)
    assert [through(bit, "PNG").getpixel(at) for at in ((0, 0), (1, 1))] == [(255,) * 3, (0,) * 3]
    ink = through(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(np.array(ink.getpixel((8, 8))) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    found = through(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert found.getpixel((4, 4)) == (255, 0, 0) and found.size == (8, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_as_exif_says(kind, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = (255, 255, 255)  # bright top left, red below it
    upright[8:, :16] = (255, 0, 0)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores what the orientation undoes
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = through(stored, kind, exif=exif, **options)
    assert found.size == (32, 16)
    assert np.abs(np.asarray(found).astype(int) - upright).max() <= 12


def test_damaged_exif_data_changes_nothing():
    found = through(Image.new("RGB", (8, 4), "red"), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert found.size == (8, 4)


def test_postscript_is_not_run(monkeypatch):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    assert "PostScript is not run" in str(decode(stream.getvalue(), "x"))
    assert ".eps" not in decoding.suffixes() and {".png", ".jfif", ".webp", ".avif"} < decoding.suffixes()


@pytest.mark.parametrize(
    "error",
    [
        SyntaxError("broken"),
        struct.error("unpack"),
        OverflowError("too big"),
        MemoryError(),
        zlib.error("-3"),
        RecursionError("deep"),
        KeyError("tag"),
        AssertionError(),
        UserWarning("a warning that is an error"),
    ],
)
def test_whatever_a_decoder_raises_is_named(monkeypatch, error):
    def load(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    found = through(Image.new("RGB", (8, 8)), "PNG")
    assert isinstance(found, UnreadableImage)
    assert str(found).startswith("x: cannot be decoded (") and (str(error) or type(error).__name__) in str(found)
