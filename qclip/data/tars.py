"""Tar files of images: WebDataset shards, in the layout of CLIP_benchmark or as they are, and tars of class folders.

Nothing is unpacked: members are found by their headers and read in place. A *sample* is what shares a name up to its
first dot: `000017.jpg` and `000017.cls`. In CLIP_benchmark's layout (docs/data.md) a folder holds
`classnames.txt`, `zeroshot_classification_templates.txt` and for each split `SPLIT/0.tar`, `SPLIT/1.tar` ... and
`SPLIT/nshards.txt`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qclip.data import classes as class_names
from qclip.data.decoding import LARGEST_BYTES, decode, suffixes
from qclip.data.files import shown, some
from qclip.data.imageset import ImageSet, UnreadableImage
from qclip.data.listing import is_leftover
from qclip.data.shards import natural
from qclip.errors import DataError, nearest
from qclip.files import open_regular
from qclip.progress import Progress

LARGEST_LABEL = 64  # bytes of a `cls`
LARGEST_CAPTION = 1 << 16  # bytes of a `txt`
MOST_MEMBERS = 50_000_000
SHARDS, CLASSES, TEMPLATES = "nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"


@dataclasses.dataclass(frozen=True)
class _Member:
    """An image: which file, its name in it, and where its bytes lie."""

    file: int
    name: str
    start: int
    size: int


class _Tars:
    def __init__(self, files: list[Path], members: list[_Member]) -> None:
        self.files, self.members = files, members
        self.hashes: dict[int, bytes] = {}

    def digest(self, rows: Sequence[int]) -> str:
        """sha256 (hex) of the names and bytes of these images; an unreadable one counts as its error."""
        whole = hashlib.sha256()
        for row in rows:
            if row not in self.hashes:
                found = self._bytes(self.members[row])
                self.hashes[row] = hashlib.sha256(found if isinstance(found, bytes) else found.encode()).digest()
            whole.update(self.members[row].name.encode("utf-8", "surrogateescape") + b"\0" + self.hashes[row])
        return whole.hexdigest()

    def read(self, rows: Sequence[int]) -> Iterator[Image.Image | UnreadableImage]:
        for row in rows:
            member = self.members[row]
            where = f"{shown(self.files[member.file].name)}, {shown(member.name)}"
            found = self._bytes(member)
            yield decode(found, where) if isinstance(found, bytes) else UnreadableImage(f"{where}: {found}.")

    def _bytes(self, member: _Member) -> bytes | str:
        """An image's bytes, or what is wrong with them."""
        if member.size > LARGEST_BYTES:
            return f"{member.size} bytes are more than the {LARGEST_BYTES} an image may have"
        try:
            with open_regular(self.files[member.file]) as stream:
                stream.seek(member.start)
                found = stream.read(member.size)
        except OSError as error:
            return str(error.strerror)
        return found if len(found) == member.size else "the tar file ends before it does"


def load_tars(path: Path, spec: str, split: str | None = None, progress: Progress | None = None) -> ImageSet:
    """The images of a tar file, of those in a folder, or of a split in CLIP_benchmark's layout.

    Labels are the numbers in `.cls` members, or else the folders in which images lie in the tar; `.txt` members are
    captions, one per line. What is cut off, missing or left out is in the set's `notes`. Raises DataError where there
    is no image, samples disagree on what they have, or a label is no number.
    """
    root, files, notes = _files(path, spec, split)
    members: list[_Member] = []
    extras: dict[str, dict[str, str]] = {"cls": {}, "txt": {}}
    keys: list[str] = []
    for number, file in enumerate(files):
        before, whole = len(keys), _index(number, file, members, keys, extras, notes)
        if not whole and len(keys) > before:
            _leave_out_torn(keys[-1], members, keys, extras, notes)
        if progress is not None:
            progress(f"reading {spec}", number + 1, len(files))
    if not members:
        raise DataError(f"{shown(path)}: no images in its tar files{f' ({notes[0]})' if notes else ''}.")
    classes = _lines(root / CLASSES, "classes")
    labels, names, label_notes = _labels(spec, keys, members, extras["cls"], classes)
    captions = None
    if extras["txt"]:
        captions = [[line.strip() for line in extras["txt"].get(key, "").splitlines() if line.strip()] for key in keys]
        if bare := [key for key, listed in zip(keys, captions, strict=True) if not listed]:
            raise DataError(f"{shown(path)}: {len(bare)} of {len(keys)} images have no caption: {some(bare)}.")
    templates = _lines(root / TEMPLATES, "templates")
    return ImageSet(
        name=shown(root.name if split is None else f"{root.name}-{split}") or "tar",
        spec=spec,
        classes=names,
        labels=labels,
        captions=captions,
        groups={},
        prompts=None if templates is None else [line.replace("{c}", "{}") for line in templates],
        source=_Tars(files, members),
        rows=np.arange(len(members), dtype=np.int64),
        notes=notes,
        label_notes=label_notes,
    )


def _files(path: Path, spec: str, split: str | None) -> tuple[Path, list[Path], list[str]]:
    """The root, the tar files in the order of their numbers, and notes on shards that are missing or too many."""
    if not path.is_dir():
        if split is not None:
            raise DataError(f"{spec!r}: a tar file has no split; leave split= out.")
        return path.with_suffix(""), [path], []
    inside = _listed(path)
    splits = [name for name in inside if (path / name / SHARDS).exists() or (path / name / "0.tar").exists()]
    if split is None and splits:
        if len(splits) > 1:
            raise DataError(f"{shown(path)} holds the splits {some(splits)}; choose one with ?split={splits[0]}.")
        split = splits[0]
    if split is not None and split not in inside:
        raise DataError(f"{shown(path)}: no split {split!r}; {nearest(split, splits or inside)}")
    folder = path if split is None else path / split
    files = sorted((folder / name for name in _listed(folder) if name.endswith(".tar")), key=natural)
    if not files:
        raise DataError(f"{shown(folder)} holds no .tar files; check the path.")
    said = _lines(folder / SHARDS, "shard count")
    if said is None:
        return path, files, []
    if len(said) != 1 or not re.fullmatch(r"[0-9]{1,9}", said[0]):
        raise DataError(f"{shown(folder / SHARDS)} says {said[0][:40]!r}; it holds one number, that of the shards.")
    count, numbered = int(said[0]), re.compile(r"(0|[1-9][0-9]{0,8})\.tar")
    kept = [each for each in files if (number := numbered.fullmatch(each.name)) and int(number[1]) < count]
    if not kept:
        raise DataError(f"{shown(folder)}: none of the {count} shards that {SHARDS} says is there; check the path.")
    there = {each.name for each in kept}
    more = [each.name for each in files if each.name not in there]
    notes: list[str] = []
    if gone := count - len(kept):  # any number may be said
        first = list(itertools.islice((name for k in range(count) if (name := f"{k}.tar") not in there), 5))
        shards = ", ".join(first) + (f" and {gone - len(first)} more" if gone > len(first) else "")
        notes = [f"{spec}: {gone} of {count} shards are not there, and their images are left out: {shards}"]
    if more:
        said_less = f"{len(more)} tar files are more than {SHARDS} says ({count}), and are left out: {some(more)}"
        notes.append(f"{spec}: {said_less}")
    return path, kept, notes


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not is_leftover(name))
    except OSError as error:
        raise DataError(f"folder {shown(folder)} cannot be read ({error.strerror}); check its rights.") from None


def _lines(path: Path, what: str) -> list[str] | None:
    return class_names.read_lines(path, what) if os.path.lexists(path) else None


def _index(
    number: int,
    path: Path,
    members: list[_Member],
    keys: list[str],
    extras: dict[str, dict[str, str]],
    notes: list[str],
) -> bool:
    """Adds what one tar file holds; whether it is whole. One that ends too early, or is damaged on the way, gives what
    stands before."""
    where, told = shown(path), len(notes)
    left_out: dict[str, list[str]] = {}
    seen, at = 0, -1
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            try:
                with tarfile.open(fileobj=stream, mode="r:") as tar:
                    while (found := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]  # else every header is kept
                        seen += 1
                        if found.size < 0 or tar.offset <= at:  # else a hostile header would lead in circles
                            raise tarfile.ReadError("a header with a negative size")
                        at = tar.offset
                        if len(members) + seen > MOST_MEMBERS:
                            raise DataError(f"{where} has more than {MOST_MEMBERS} members; split it.")
                        if found.isdir() or is_leftover(os.path.basename(found.name)):
                            continue
                        if not found.isreg() or found.issparse():
                            left_out.setdefault("no plain files", []).append(found.name)
                        elif found.offset_data + found.size > size:
                            notes.append(f"{where} is cut off in {shown(found.name)}; what stood there is left out")
                            break
                        else:
                            _take(number, path, tar, found, members, keys, extras, left_out)
                    else:
                        stream.seek(tar.offset)
                        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends without a word
                            notes.append(
                                f"{where} has no end mark behind member {seen}: it is cut off or damaged there"
                            )
            except (tarfile.TarError, ValueError, OverflowError, EOFError, MemoryError, RecursionError) as error:
                if isinstance(error, DataError):
                    raise
                if not seen:
                    hint = "; unpack it first" if path.name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")) else ""
                    raise DataError(f"{where}: no tar file ({error}){hint}.") from None
                notes.append(f"{where} is damaged behind member {seen} ({error}); what stood there is left out")
    except OSError as error:
        raise DataError(f"{where} {error.strerror or error}; name a tar file or a folder of them.") from None
    whole = len(notes) == told
    for why, names in left_out.items():
        notes.append(f"{where}: {len(names)} members left out, {why}: {some([shown(name) for name in names])}")
    return whole


def _leave_out_torn(
    key: str, members: list[_Member], keys: list[str], extras: dict[str, dict[str, str]], notes: list[str]
) -> None:
    """Takes the last sample of a torn file away where its label or captions stood behind the tear."""
    lost = [kind for kind, said in extras.items() if said and key not in said]
    if not lost:
        return
    torn = {at for at, each in enumerate(keys) if each == key}
    notes.append(f"{shown(members[min(torn)].name)} is left out: its .{lost[0]} stood behind the place of the damage")
    keys[:] = [each for at, each in enumerate(keys) if at not in torn]
    members[:] = [each for at, each in enumerate(members) if at not in torn]


def _take(
    number: int,
    path: Path,
    tar: tarfile.TarFile,
    found: tarfile.TarInfo,
    members: list[_Member],
    keys: list[str],
    extras: dict[str, dict[str, str]],
    left_out: dict[str, list[str]],
) -> None:
    folder, base = os.path.split(found.name.removeprefix("./"))
    stem, _, kind = base.partition(".")
    key, kind = f"{number}/{os.path.join(folder, stem)}", kind.lower()
    if f".{kind}" in suffixes():
        members.append(_Member(number, found.name.removeprefix("./"), found.offset_data, found.size))
        keys.append(key)
    elif kind in ("cls", "txt"):
        limit = LARGEST_LABEL if kind == "cls" else LARGEST_CAPTION
        if found.size > limit:
            raise DataError(f"{shown(path)}: {shown(found.name)} has {found.size} bytes, more than {limit}.")
        content = tar.extractfile(found)
        assert content is not None
        try:
            extras[kind][key] = content.read().decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{shown(path)}: {shown(found.name)} is not UTF-8 text.") from None
    elif kind == "npy":
        raise DataError(
            f"{shown(path)}: {shown(found.name)} holds several labels for one image; sets of one label are read."
        )
    else:
        left_out.setdefault("neither image, .cls nor .txt", []).append(found.name)


def _labels(
    spec: str, keys: list[str], members: list[_Member], said: dict[str, str], classes: list[str] | None
) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """Labels, class names, and notes on how they were come by."""
    if said:
        if bare := [key for key in keys if key not in said]:
            raise DataError(f"{spec}: {len(bare)} of {len(keys)} images have no .cls beside them: {some(bare)}.")
        texts = [said[key].strip() for key in keys]
        if odd := [text for text in texts if not re.fullmatch(r"[0-9]{1,9}", text)]:
            raise DataError(f"{spec}: a .cls holds {odd[0][:40]!r}; it holds the number of a class, from 0.")
        return np.array([int(text) for text in texts], np.int64), classes, []
    folders = [os.path.basename(os.path.dirname(member.name)) for member in members]
    if all(folders) and len(set(folders)) > 1:
        names = sorted(set(folders), key=lambda name: (int(name) if name.isdecimal() else 0, name))
        names = [shown(name) for name in names]
        class_names.refuse_twins(names, spec)
        place = {name: k for k, name in enumerate(names)}
        note = f"{spec}: no .cls in it; the {len(names)} folders in which images lie in the tar are classes"
        return np.array([place[shown(name)] for name in folders], np.int64), names, [note]
    return None, classes, []
