"""What lies in a folder: images, folders, and what is left out and why."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator

from qclip.data.decoding import looks_encoded, suffixes
from qclip.data.files import shown, some
from qclip.errors import DataError
from qclip.files import open_regular

# What operating systems, archives and editors leave behind; so is every name that begins with a dot.
_LEFTOVERS = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}


# A folder that went away meanwhile, or lies deeper than paths reach; any other fault is one of rights or of the disk.
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


@dataclasses.dataclass
class LeftOut:
    """Names, below `root`, that are no part of a set, by reason."""

    root: str
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, why: str, path: str) -> None:
        self.names.setdefault(why, []).append(shown(os.path.relpath(path, self.root)))

    def notes(self, where: str) -> list[str]:
        return [f"{where}: {len(names)} left out, {why}: {some(names)}" for why, names in self.names.items()]


def is_leftover(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFTOVERS


def has_suffix(name: str) -> bool:
    """Whether a file is called as an image is."""
    return os.path.splitext(name)[1].lower() in suffixes()


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name. Raises OSError."""
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str], links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=links)
    except OSError:  # a link in a circle
        return False


def images_below(folder: str, left_out: LeftOut) -> Iterator[str]:
    """Paths of the images in `folder` and the folders in it, in the order of their names. What is called like an
    image and is none (a broken link, a pipe) is among them: reading it says what it is.

    Links to folders are not followed: they can lead in circles. Raises DataError where a folder cannot be read.
    """
    pending = [(folder, True)]
    while pending:
        path, is_dir = pending.pop()
        if not is_dir:
            yield path
            continue
        try:
            found = entries(path)
        except OSError as error:
            if error.errno not in _GONE:
                raise unreadable_folder(path, error) from None
            left_out.add(f"folders that cannot be read ({error.strerror})", path)
            continue
        if not found and path != folder and has_suffix(path):
            yield path  # an empty folder called x.png was to be an image
        inside = []
        for entry in found:
            if is_leftover(entry.name):
                left_out.add("which systems and editors leave behind", entry.path)
            elif is_folder(entry, links=False):
                inside.append((entry.path, True))
            elif is_folder(entry, links=True):
                left_out.add("links to folders, which are not followed inside a class", entry.path)
            elif is_image(entry):
                inside.append((entry.path, False))
            else:
                left_out.add("no images", entry.path)
        pending += reversed(inside)


def is_image(entry: os.DirEntry[str]) -> bool:
    """Called like an image, or begins like one."""
    if has_suffix(entry.name):
        return True
    try:
        with open_regular(entry.path) as stream:
            return looks_encoded(stream.read(16))
    except OSError:
        return False


def unreadable_folder(path: str, error: OSError) -> DataError:
    return DataError(
        f"folder {shown(path)} cannot be read ({error.strerror}); give yourself the right to read it, or take it out "
        "of the set."
    )
