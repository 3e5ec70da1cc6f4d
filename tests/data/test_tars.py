"""Tar files: CLIP_benchmark's WebDataset layout, class folders, and what is cut, damaged or untrue."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qclip.data import UnreadableImage, load
from qclip.errors import DataError


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int, **kinds: str) -> dict[str, bytes]:
    out = {}
    for k in range(first, first + count):
        out[f"s{k:06}.png"] = picture(k)
        for kind, text in kinds.items():
            out[f"s{k:06}.{kind}"] = text.format(k % 3).encode()
    return out


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    root = tmp_path / "wds_toy"
    for shard in range(11):  # 10.tar comes behind 2.tar
        write(root / "test" / f"{shard}.tar", samples(2 * shard, 2, cls="{}\n"))
    (root / "test" / "nshards.txt").write_text("11\n")
    (root / "classnames.txt").write_text("ant\nbee\ncat\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}\n")
    return root


def test_clip_benchmark_s_layout(layout: Path) -> None:
    found = load(f"tar:{layout}")
    assert len(found) == 22 and found.classes == ["ant", "bee", "cat"] and not found.notes
    assert found.labels is not None and found.labels.tolist() == [k % 3 for k in range(22)]
    assert found.prompts == ["a photo of a {}.", "a {}"]
    with Image.open(io.BytesIO(picture(21))) as image:
        assert found.image(21).tobytes() == image.tobytes()
    assert load(f"tar:{layout}?split=test").digest == found.digest
    assert found.select([3, 5]).digest != found.select([5, 3]).digest


@pytest.mark.parametrize(
    ("said", "count", "note"),
    [
        ("12", 22, "1 of 12 shards are not there.*11.tar"),
        ("9", 18, r"2 tar files are more than nshards.txt says \(9\)"),
        ("999999999", 22, r"999999988 of 999999999 shards are not there, .*: 11.tar, 12.tar, .* and 999999983 more"),
    ],
)
def test_a_shard_count_that_lies_is_named(layout: Path, said: str, count: int, note: str) -> None:
    (layout / "test" / "nshards.txt").write_text(said)
    found = load(f"tar:{layout}")
    assert len(found) == count
    (told,) = found.notes
    assert __import__("re").search(note, told)


@pytest.mark.parametrize("said", ["x", "-1", "1\n2", "1e3", "99999999999"])
def test_a_shard_count_that_is_none_is_refused(layout: Path, said: str) -> None:
    (layout / "test" / "nshards.txt").write_text(said)
    with pytest.raises(DataError, match="nshards.txt"):
        load(f"tar:{layout}")


def test_captions_and_class_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "c.tar", samples(0, 4, txt="a dog {}\na picture"))
    found = load(f"tar:{path}")
    assert found.captions == [[f"a dog {k % 3}", "a picture"] for k in range(4)] and found.labels is None
    folders = {f"./top/{name}/{k}.png": picture(k) for k, name in enumerate(["bee", "ant", "bee"])}
    found = load(f"tar:{write(tmp_path / 'f.tar', folders)}")
    assert found.classes == ["ant", "bee"] and found.labels is not None and found.labels.tolist() == [1, 0, 1]
    assert "folders in which images lie" in found.label_notes[0]


def test_a_tar_cut_in_the_middle_gives_what_stands_before(tmp_path: Path) -> None:
    whole = write(tmp_path / "w.tar", samples(0, 6, cls="1")).read_bytes()
    for cut in (len(whole) // 2, len(whole) // 2 + 300, len(whole) - 10_200):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        found = load(f"tar:{tmp_path / 'cut.tar'}")
        assert 0 < len(found) < 6 or cut > len(whole) - 10_240
        assert len(found) == 6 or any("cut off" in note for note in found.notes), cut
        assert not [each for each in found.read(range(len(found))) if isinstance(each, UnreadableImage)]
    (tmp_path / "cut.tar").write_bytes(whole[:100])
    with pytest.raises(DataError, match="no tar file"):
        load(f"tar:{tmp_path / 'cut.tar'}")


@pytest.mark.parametrize("kind", ["cls", "txt"])
def test_an_image_whose_label_or_caption_was_cut_off_is_left_out_and_named(tmp_path: Path, kind: str) -> None:
    """CLIP_benchmark writes the image first."""
    path = write(tmp_path / "w.tar", samples(0, 4, **{kind: "1"}))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        label = tar.getmember(f"s000002.{kind}")
    for cut in (label.offset, label.offset + 100, label.offset_data):
        path.write_bytes(whole[:cut])
        found = load(f"tar:{path}")
        assert len(found) == 2 and len(found.labels if kind == "cls" else found.captions) == 2
        assert any(f"s000002.png is left out: its .{kind}" in note for note in found.notes), cut
    with pytest.raises(DataError, match="1 of 2 images have no"):  # without damage it is nobody's tear
        load(f"tar:{write(path, samples(0, 1, **{kind: '1'}) | {'x.png': picture(9)})}")


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "w.tar", samples(0, 6))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"s000003.png")
    raw[at : at + 100] = b"\xff" * 100
    path.write_bytes(raw)
    found = load(f"tar:{path}")
    assert len(found) == 3 and "behind member 3" in found.notes[0]


def test_damage_after_it_was_listed_is_an_unreadable_image(tmp_path: Path) -> None:
    path = write(tmp_path / "w.tar", samples(0, 3))
    found = load(f"tar:{path}")
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    bad = list(found.read([0, 2]))
    assert all(isinstance(each, UnreadableImage) for each in bad) and "ends before" in str(bad[1])


def test_links_and_hostile_headers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "h.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in (("../../up.png", picture(0)), ("notes.json", b"{}"), ("._x.png", b"mac")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = load(f"tar:{path}")
    assert len(found) == 1 and found.image(0).size == (16, 12)
    assert any("no plain files: secret.png" in note for note in found.notes)
    assert any("neither image" in note and "notes.json" in note for note in found.notes)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"../../up.png")
    raw[at + 124 : at + 136] = b"\xff" * 11 + b"\x00"  # a size of base 256 below zero
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    path.write_bytes(raw)
    with pytest.raises(DataError, match="no images|no tar"):
        load(f"tar:{path}")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.png": picture(0), "b.png": picture(1), "a.cls": b"0"}, "1 of 2 images have no .cls"),
        ({"a.png": picture(0), "a.cls": b"dog"}, "holds the number of a class"),
        ({"a.png": picture(0), "a.npy": b"x"}, "several labels"),
        ({"a.png": picture(0), "a.cls": b"0" * 65}, "more than 64"),
        ({"a.png": picture(0), "a.txt": b"\xff"}, "not UTF-8"),
        ({"a.png": picture(0), "b.png": picture(0), "a.txt": b"x"}, "1 of 2 images have no caption"),
        ({"a.json": b"{}"}, "no images in its tar files"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    with pytest.raises(DataError, match=".*") as error:
        load(f"tar:{write(tmp_path / 'x.tar', members)}")
    assert said in str(error.value)


def test_names_that_lead_nowhere(tmp_path: Path, layout: Path) -> None:
    write(layout / "train" / "0.tar", samples(0, 1))
    with pytest.raises(DataError, match=r"holds the splits test, train; choose one with \?split=test"):
        load(f"tar:{layout}")
    with pytest.raises(DataError, match="no split 'tets'; did you mean 'test'"):
        load(f"tar:{layout}?split=tets")
    (tmp_path / "z.tar.gz").write_bytes(b"\x1f\x8b" + b"x" * 600)
    with pytest.raises(DataError, match="unpack it first"):
        load(f"tar:{tmp_path / 'z.tar.gz'}")
    with pytest.raises(DataError, match="did you mean 'tar:x.tar'"):
        load("x.tar")
