"""Hostile images: whatever the bytes are, an image is decoded or named and left out, and the run ends well."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from qclip.data import UnreadableImage, batches, decoding, load
from qclip.models.inputs import Preprocess
from qclip.reliability import evaluate
from tests.data.test_batches import picture_set
from tests.reliability.fakes import CLASSES, Tiny, preprocess

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of much that it then decodes
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
SIDE = 24


def encoded(kind: str, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    return stream.getvalue()


def mutations(count: int, seed: int = 0):
    """(kind, damaged bytes): cut, bytes of the header set, bits flipped anywhere, a part doubled or removed."""
    rng = np.random.default_rng(seed)
    originals = {kind: encoded(kind) for kind in KINDS}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        content = bytearray(originals[kind])
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(content)))
            how = rng.integers(0, 5)
            if how == 0:
                del content[max(1, at) :]
            elif how == 1:
                content[int(rng.integers(0, min(64, len(content))))] = rng.choice([0, 1, 127, 128, 255])
            elif how == 2:
                content[at] ^= 1 << int(rng.integers(0, 8))
            elif how == 3:
                content[at:at] = content[at : at + 40]
            elif len(content) > 50:
                del content[at : at + 30]
        yield kind, bytes(content)


def write_pets(root, extra: dict[str, bytes]) -> None:
    """Two classes of two good images, and hostile ones beside them."""
    for number, name in enumerate(CLASSES[:2]):
        (root / name).mkdir()
        for copy in range(2):
            (root / name / f"good {copy}.png").write_bytes(encoded("PNG", seed=2 * number + copy))
    for name, content in extra.items():
        (root / CLASSES[0] / name).write_bytes(content)


def test_mutated_files_are_decoded_or_named(full):
    read = 0
    for number, (kind, content) in enumerate(mutations(3000 if full else 150)):
        found = decoding.decode(content, f"{number}.{kind}")
        if isinstance(found, UnreadableImage):
            assert str(found).startswith(f"{number}.{kind}: ") and len(str(found)) < 300, found
            continue
        read += 1
        assert found.mode == "RGB" and decoding.too_large(found.size) is None
        assert found.tobytes()  # all of it is there
    assert 0.1 < read / (number + 1) < 0.9  # both happen


def test_a_run_over_mutated_files_ends_well(tmp_path, monkeypatch):
    write_pets(tmp_path, {f"{k:03}.{kind.lower()}": c for k, (kind, c) in enumerate(mutations(60, seed=1))})
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.engine.REPLICATES", 20)
    results = evaluate(Tiny(), f"folder:{tmp_path}", templates=["a {}"], cache=False)
    data = load(f"folder:{tmp_path}")
    bad = [image for image in data.read(range(len(data))) if isinstance(image, UnreadableImage)]
    assert len(data) == 64 and 10 < len(bad) < 60
    n = next(row["n"] for row in results.rows if row["metric"] == "top1")
    assert n == 64 - len(bad)
    (note,) = [note for note in results.notes if "cannot be read and are left out" in note]
    assert f"{len(bad)} of 64 images" in note and str(bad[0]) in note
    with pytest.raises(UnreadableImage, match=r"ant/\d+\."):
        evaluate(Tiny(), f"folder:{tmp_path}", templates=["a {}"], cache=False, strict=True)


def test_an_image_that_was_gone_for_a_moment_is_read_the_next_time(tmp_path, monkeypatch):
    write_pets(tmp_path, {"broken.png": b"no image"})
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.engine.REPLICATES", 20)
    path, cache = tmp_path / CLASSES[1] / "good 0.png", tmp_path / ".cache"
    content = path.read_bytes()

    def left_out(gone: bool) -> list[str]:
        data = load(f"folder:{tmp_path}")  # the same files, so that the cache knows them
        if gone:
            path.unlink()
        notes = evaluate(Tiny(), data, templates=["a {}"], cache=cache).notes
        path.write_bytes(content)
        return [note for note in notes if "cannot be read and are left out" in note]

    assert "2 of 5 images" in left_out(gone=True)[0]
    assert "1 of 5 images" in left_out(gone=False)[0]


def one_pixel_wide(length: int, lying: bool = False) -> bytes:
    """A grey PNG of 1 x `length` pixels."""
    head = struct.pack(">IIBBBBB", 1, length, 8, 0, 0, 0, 0)
    chunks = {b"IHDR": head, b"IDAT": zlib.compress(b"\0\7" * length, 9), b"IEND": b""}
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_long_thin_picture_is_left_out_before_it_is_decoded(tmp_path, monkeypatch):
    thin = one_pixel_wide(1_000_000)
    assert len(thin) < 5000  # and a short side of 224 would make it 224 x 224,000,000
    load_image = Image.Image.load
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("was decoded"))
    found = decoding.decode(thin, "thin.png")
    assert str(found) == "thin.png: 1 x 1000000 pixels, longer than 50 times its width; crop it."
    monkeypatch.undo()
    assert Image.Image.load is load_image
    write_pets(tmp_path, {"thin.png": thin})
    data = load(f"folder:{tmp_path}")
    ((positions, images),) = list(batches(data, preprocess))
    assert len(positions) == 4 and [why.split(":")[0] for _, why in data.unreadable] == ["ant/thin.png"]
    with pytest.raises(UnreadableImage, match="1 x 1000000 pixels"):
        list(batches(data, preprocess, strict=True))


class Longest:
    """A foreign transform that keeps what it was given to make."""

    def __init__(self) -> None:
        self.largest = 0
        self.resize = transforms.Resize(32)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        made = self.resize(image)
        self.largest = max(self.largest, made.width * made.height)
        return transforms.functional.to_tensor(transforms.functional.center_crop(made, 32))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 1000), (1, 51)])
def test_no_transform_gets_a_long_thin_picture_from_any_source(size):
    foreign = Longest()
    data = picture_set([Image.new("RGB", (8, 8)), Image.new("RGB", size), Image.new("RGB", (10, 500))])
    ((positions, _),) = list(batches(data, foreign))
    assert positions.tolist() == [0, 2] and "longer than 50 times" in data.unreadable[0][1]
    assert foreign.largest <= 32 * 32 * decoding.LARGEST_ASPECT


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (3, 150), (2000, 40)])
def test_every_picture_within_the_limit_passes_our_transforms(mode, size):
    made = Preprocess({"image_size": 32, "resize_mode": mode})(Image.new("RGB", size))
    assert made.shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["ico", "icns"])
def test_containers_that_hold_more_than_they_say(kind):
    inner = encoded("PNG", (600, 6))
    if kind == "ico":
        head = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    else:
        head = b"icns" + struct.pack(">I", len(inner) + 16) + b"ic08" + struct.pack(">I", len(inner) + 8)
    found = decoding.decode(head + inner, f"x.{kind}")
    assert isinstance(found, UnreadableImage)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 20_000, 65_000])
def test_decompression_bombs_are_named(side):
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = b"IHDR" + head
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + body + struct.pack(">I", zlib.crc32(body))
    found = decoding.decode(bomb + encoded("PNG")[33:], "bomb.png")
    assert isinstance(found, UnreadableImage) and "bomb.png: " in str(found) and "pixels" in str(found)
