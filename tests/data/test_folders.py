"""Folders as file systems, archives and people leave them: what is an image, what is named and left out."""

from __future__ import annotations

import inspect
import io
import os
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qclip import calibration
from qclip.data import UnreadableImage, batches, folders, load
from qclip.data.files import SHOWN_NAME, shown
from qclip.data.listing import is_leftover
from qclip.errors import DataError
from qclip.files import open_regular
from tests.reliability.fakes import Tiny, preprocess


def encoded(value: int = 0, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def pets(tmp_path) -> Path:
    root = tmp_path / "pets"
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(encoded(number))
    return root


def unreadable(data) -> dict[str, str]:
    """What reading says of each image that cannot be read, by its file's name."""
    found = [str(image) for image in data.read(range(len(data))) if isinstance(image, UnreadableImage)]
    return {why.split(": ")[0]: why.split(": ", 1)[1] for why in found}


def tensor_of(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float()


def test_every_suffix_that_pillow_reads_is_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    for number in range(5):
        (tmp_path / "dog" / f"{number}.jfif").write_bytes(encoded(number, "JPEG"))
    kinds = {"a.TIF": "TIFF", "b.jp2": "JPEG2000", "c.ico": "ICO", "d.tga": "TGA", "e.PNM": "PPM", "f.pcx": "PCX"}
    for name, kind in kinds.items():
        (tmp_path / "cat" / name).write_bytes(encoded(1, kind))
    data = load(f"folder:{tmp_path}")
    assert data.labels.tolist() == [0] * 6 + [1] * 5 and data.notes == [] and unreadable(data) == {}


def test_files_of_other_suffixes_are_images_if_they_begin_like_one(pets):
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG2000", "AVIF"):
        (pets / "cat" / f"{kind}.data").write_bytes(encoded(3, kind))
    (pets / "cat" / "nosuffix").write_bytes(encoded(3, "JPEG"))
    (pets / "cat" / "text.data").write_text("GIF is a format")
    data = load(f"folder:{pets}")
    assert data.labels.tolist() == [0] * 9 + [1] and unreadable(data) == {}
    assert data.notes == [f"folder:{pets}: 1 left out, no images: cat/text.data"]


def test_what_is_left_out_is_counted_and_named(pets):
    for number in range(7):
        (pets / "dog" / f"{number}.txt").write_text("")
    (pets / "README").write_text("")
    (note,) = load(f"folder:{pets}").notes
    assert note.endswith("8 left out, no images: README, dog/0.txt, dog/1.txt, dog/2.txt, dog/3.txt and 3 more")


LEFTOVERS = [".git", "__MACOSX", ".ipynb_checkpoints", "@eaDir", "lost+found", "$RECYCLE.BIN", ".Trashes", ".hidden"]
LEFTOVER_FILES = [".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".hidden.png"]


def test_what_systems_and_editors_leave_behind_is_no_class_and_no_image(pets):
    assert all(map(is_leftover, [*LEFTOVERS, *LEFTOVER_FILES])) and not is_leftover("found") and not is_leftover("git")
    for place in (pets, pets / "cat"):
        for name in LEFTOVERS:
            (place / name).mkdir()
            (place / name / "x.png").write_bytes(encoded())
        for name in LEFTOVER_FILES:
            (place / name).write_bytes(encoded())
    data = load(f"folder:{pets}")
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 1]
    (note,) = data.notes
    assert f"{2 * len([*LEFTOVERS, *LEFTOVER_FILES])} left out, which systems and editors leave behind" in note


def test_what_a_file_system_can_trip_on_is_named_and_the_rest_is_read(pets):
    cat = pets / "cat"
    (cat / "dangling.png").symlink_to("gone.png")
    (cat / "loop.png").symlink_to("loop.png")
    (cat / "folder.png").mkdir()
    (cat / "empty.png").write_bytes(b"")
    os.mkfifo(cat / "pipe.png")
    os.mkfifo(cat / "pipe")
    (cat / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(cat)  # a socket's path is short
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(here)
    (cat / "cut.jpg").write_bytes(encoded(1, "JPEG", quality=95)[:-60])
    (cat / "a\nb.png").write_bytes(b"no image")
    Path(os.fsdecode(os.fsencode(cat) + b"/\xff\xfe.png")).write_bytes(b"no image")
    (cat / ("x" * 240 + ".png")).write_bytes(b"no image")
    (cat / "up").symlink_to("..")
    (pets / "circle").symlink_to(".")
    (pets / "lost.png").symlink_to("gone.png")
    data = load(f"folder:{pets}")
    found = unreadable(data)
    assert {name: found.pop(f"cat/{name}") for name in ("pipe.png", "folder.png", "device.png", "socket.png")} == {
        "pipe.png": "is a pipe.",
        "folder.png": "is a folder.",
        "device.png": "is a device.",
        "socket.png": "is a socket.",
    }
    for name in ("dangling.png", "loop.png"):
        assert found.pop(f"cat/{name}").startswith("is a link that leads nowhere")
    assert found.pop("cat/empty.png") == "is empty (0 bytes)."
    assert "truncated" in found.pop("cat/cut.jpg")
    odd = {"cat/a\\nb.png", "cat/\\udcff\\udcfe.png", shown("cat/" + "x" * 240 + ".png")}
    assert set(found) == odd and all(len(name) <= SHOWN_NAME for name in odd)
    assert len(data) - len(unreadable(data)) == 2 and data.classes == ["cat", "dog"]
    said = " ".join(data.notes)
    for name in ("no images: cat/pipe", "not followed inside a class: cat/up", "lie in: circle", "folders: lost.png"):
        assert name in said
    ((positions, images),) = list(batches(data, preprocess))
    assert len(images) == 2 and len(data.unreadable) == len(data) - 2
    with pytest.raises(UnreadableImage, match="cat/"):
        list(batches(data, preprocess, strict=True))
    said.encode(), " ".join(why for _, why in data.unreadable).encode()  # all of it can be printed


def test_a_file_that_says_to_hold_nothing_is_read_as_nothing(pets):
    """As files of /proc do: some of them wait for something (kmsg), some have no end."""
    for name, target in {"kmsg": "/proc/kmsg", "mem": "/proc/self/mem", "maps": "/proc/self/maps"}.items():
        (pets / "cat" / f"{name}.png").symlink_to(target)
        (pets / "cat" / name).symlink_to(target)
    data = load(f"folder:{pets}")
    assert set(unreadable(data)) <= {f"cat/{name}.png" for name in ("kmsg", "mem", "maps")}
    assert unreadable(data)["cat/maps.png"] == "is empty (0 bytes)."
    assert len(data) == 5 and data.labels.tolist() == [0, 0, 0, 0, 1]


def test_a_file_that_goes_between_listing_and_reading_is_named(pets):
    data = load(f"folder:{pets}")
    (pets / "dog" / "0.png").unlink()
    assert unreadable(data) == {"dog/0.png": "cannot be read (No such file or directory)."}


def test_a_set_behind_a_link_and_class_folders_that_are_links_are_read(pets, tmp_path):
    (tmp_path / "view").mkdir()
    (tmp_path / "view" / "kitten").symlink_to(pets / "cat")
    (tmp_path / "view" / "puppy").symlink_to(pets / "dog")
    (tmp_path / "link").symlink_to(tmp_path / "view")
    data = load(f"folder:{tmp_path / 'link'}")
    assert data.classes == ["kitten", "puppy"] and data.labels.tolist() == [0, 1] and unreadable(data) == {}


def test_a_flat_folder_has_its_own_notes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.txt").write_text("")
    data = load(f"folder:{tmp_path}")
    assert data.labels is None and unreadable(data) == {"b.png": "is a folder."}
    assert data.notes == [f"folder:{tmp_path}: 1 left out, no images: c.txt"]


def test_deep_folders_do_not_end_in_recursion(pets):
    path = str(pets / "dog")
    for _ in range(400):
        path += "/d"
        os.mkdir(path)
    Path(path, "x.png").write_bytes(encoded())
    load(f"folder:{pets / 'cat'}")  # imports what is needed
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        found = load(f"folder:{pets}")
    finally:
        sys.setrecursionlimit(limit)
    assert found.labels.tolist() == [0, 1, 1]


def denied(*names):
    """os.scandir and os.open that a user without rights has."""
    scandir, opened = os.scandir, os.open

    def check(path):
        if os.path.basename(os.fspath(path)) in names:
            raise PermissionError(13, "Permission denied", path)

    def no_scandir(path="."):
        check(path)
        return scandir(path)

    def no_open(path, *args, **kwargs):
        check(path)
        return opened(path, *args, **kwargs)

    return no_scandir, no_open


def test_a_folder_that_goes_while_it_is_listed_is_named(pets, monkeypatch):
    scandir = os.scandir

    def gone(path):
        if path.endswith("dog"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    data = load(f"folder:{pets}")
    assert data.labels.tolist() == [0] and data.classes == ["cat", "dog"]
    assert data.notes == [f"folder:{pets}: 1 left out, folders that cannot be read (No such file or directory): dog"]


@pytest.mark.parametrize("name", ["dog", "inner", "pets"])
def test_a_folder_that_cannot_be_read_is_an_error(pets, monkeypatch, name):
    (pets / "dog" / "inner").mkdir()
    monkeypatch.setattr(os, "scandir", denied(name)[0])
    with pytest.raises(DataError, match=rf"folder .*{name} cannot be read \(Permission denied\)"):
        load(f"folder:{pets}")


def test_an_image_that_cannot_be_read_is_named_and_left_out(pets, monkeypatch):
    monkeypatch.setattr(os, "open", denied("0.png")[1])
    (pets / "dog" / "1.png").write_bytes(encoded())
    data = load(f"folder:{pets}")
    assert unreadable(data) == {name: "cannot be read (Permission denied)." for name in ("cat/0.png", "dog/0.png")}


def test_rights_of_another_user(tmp_path):
    """The same with real rights. Root may read everything, so a child process becomes somebody else."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user who may not read a file")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for part in ("open/cat", "open/dog", "closed/ant", "closed/bee"):
            (root / part).mkdir(parents=True)
            (root / part / "0.png").write_bytes(encoded())
        load(f"folder:{root / 'open'}")  # imports what is needed
        (root / "open" / "dog" / "0.png").chmod(0)
        (root / "closed" / "bee").chmod(0)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgid(65534)
                os.setuid(65534)
                data = load(f"folder:{root / 'open'}")
                said = [str(image) for image in data.read(range(len(data)))]
                try:
                    load(f"folder:{root / 'closed'}")
                except DataError as error:
                    said.append(str(error))
                os.write(writer, "\n".join(said).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            first, second, third = stream.read().splitlines()
        os.waitpid(child, 0)
    assert "RGB" in first and second == "dog/0.png: cannot be read (Permission denied)."
    assert "closed/bee cannot be read (Permission denied)" in third


def test_listing_looks_at_each_folder_and_file_once_and_says_how_far_it_is(tmp_path, monkeypatch):
    count = 300
    for number in range(count):
        (tmp_path / f"class {number}").mkdir()
        (tmp_path / f"class {number}" / "0.png").write_bytes(encoded())
    names = tmp_path.parent / "names.txt"
    names.write_text("\n".join(f"class {number}" for number in reversed(range(count))))
    calls = dict.fromkeys(("scandir", "stat", "lstat", "open", "readlink"), 0)
    said: list[tuple[str, int, int]] = []
    before_first_word: dict[str, int] = {}

    def counted(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    def progress(*step):
        before_first_word.update({} if said else calls)
        said.append(step)

    for name in calls:
        monkeypatch.setattr(os, name, counted(name))
    data = load(f"folder:{tmp_path}", names, progress=progress)
    monkeypatch.undo()
    assert data.classes[0] == f"class {count - 1}" and len(data) == count
    assert calls["scandir"] == count + 1 and calls["open"] <= 10
    assert calls["stat"] + calls["lstat"] + calls["readlink"] <= count + 100
    assert before_first_word["scandir"] == 0
    listing = f"listing folder:{tmp_path}"
    assert said == [(listing, done, count if done else 0) for done in range(count + 1)]


def test_only_what_is_selected_is_read(tmp_path, monkeypatch):
    for number in range(12):
        path = tmp_path / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number))
    opened: list[str] = []

    def noted(path):
        opened.append(Path(path).name)
        return open_regular(path)

    monkeypatch.setattr(folders, "open_regular", noted)
    data = load(f"folder:{tmp_path}?samples=3&seed=4")
    assert opened == []
    chosen = [Path(data.source.files[row]).name for row in data.rows]
    digest = data.digest
    assert sorted(opened) == sorted(chosen) and len(set(chosen)) == 3
    parts = [data.select([k]).digest for k in range(3)]
    assert len(opened) == 3 and len({digest, *parts, data.select([1, 0, 2]).digest}) == 5
    for name in set(f"{n}.png" for n in range(12)) - set(chosen):
        next(tmp_path.rglob(name)).write_bytes(encoded(99))
    assert load(f"folder:{tmp_path}?samples=3&seed=4").digest == digest  # the same pictures, whatever is beside them
    next(tmp_path.rglob(chosen[1])).write_bytes(encoded(98))
    assert load(f"folder:{tmp_path}?samples=3&seed=4").digest != digest


def test_calibration_warns_of_what_is_left_out(pets, monkeypatch):
    (pets / "dog" / "notes.txt").write_text("")
    (pets / "dog" / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning) as said:
        taken = calibration.samples(f"folder:{pets}", fake_encoders())
    assert len(taken.images) == 2
    texts = [str(w.message) for w in said]
    assert sum("1 left out, no images: dog/notes.txt" in t for t in texts) == 1
    assert any("1 of 3 calibration images cannot be read" in t and "dog/1.png: is empty" in t for t in texts)


def fake_encoders():
    encoders = Tiny().encoders()
    encoders.image_size = 8
    encoders.tokenizer = None
    return encoders
