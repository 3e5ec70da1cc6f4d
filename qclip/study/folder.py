"""The files of a store, by names like "results/RUNTIME/CELL-SHA.parquet", in a folder of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qclip.errors import InputError
from qclip.files import PART, check_folder, open_regular, write_atomic
from qclip.untrusted import parse_json

SHA = 32  # hex digits of a file's sha256 in its name
SUMMED = re.compile(rf"-([0-9a-f]{{{SHA}}})\.[a-z]+$")


def summed(stem: str, content: bytes, ending: str) -> str:
    """A file's name with the checksum of its content."""
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:SHA]}{ending}"


def fits(name: str, content: bytes) -> bool:
    """Whether a content is that of which the checksum in its file's name is; False where there is none."""
    found = SUMMED.search(name)
    return found is not None and found[1] == hashlib.sha256(content).hexdigest()[:SHA]


def json_object(content: bytes, shown: str) -> dict[str, Any]:
    """The object that a file holds, which messages name as `shown`. Raises InputError where it holds none."""
    try:
        found = parse_json(content.decode(), shown, InputError)
    except UnicodeDecodeError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{shown} is not what was stored; remove it, and run the plan again")
    return found


class Folder:
    """where: how the user names it. path: where files of this machine alone are (locks, what is being made), too."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)

    def shown(self, name: str) -> str:
        return repr(str(self.path / name))

    def claim(self, name: str, content: bytes) -> None:
        """Write the first file. Raises InputError where there are others, or none can be written."""
        there = self.path.exists()
        if there and (not self.path.is_dir() or any(not each.startswith(".") for each in os.listdir(self.path))):
            raise InputError(f"{self.where!r} is no store of studies, and not empty; name another with --store")
        check_folder(self.path, (name,))
        write_atomic(self.path / name, content)

    def children(self, folder: str) -> list[str]:
        """Names of what is in a folder, sorted; none where there is no such folder."""
        try:
            with os.scandir(self.path / folder) as entries:
                return sorted(entry.name for entry in entries if not PART.fullmatch(entry.name))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError, or InputError where it is there and cannot be read."""
        path = self.path / name
        if not os.path.lexists(path):
            raise FileNotFoundError(path)
        try:
            with open_regular(path) as file:
                return file.read()
        except OSError as why:
            raise InputError(f"{self.shown(name)} {why.strerror}; run the plan again") from None

    def whole(self, name: str) -> bytes:
        """What is in a file whose name holds its checksum. Raises FileNotFoundError, or InputError where it is not what
        was stored."""
        return self.checked(name, self.read(name))

    def checked(self, name: str, content: bytes) -> bytes:
        """The content, where it fits the checksum in the file's name. Raises InputError."""
        if not fits(name, content):
            raise InputError(
                f"{self.shown(name)} is not what was stored: its content does not fit the checksum in its name; "
                "remove it, and run the plan again"
            )
        return content

    def fetch(self, names: Collection[str]) -> None:
        """Files that will be read: those that are far away come together."""

    def refresh(self) -> None:
        """Forget what was known of files that others write, too."""

    def write(self, name: str, content: bytes, lasting: bool = False) -> None:
        """Whole or not at all; one that a power cut tore shows by its checksum, but for a `lasting` one, which is on
        the disk when this returns. Raises OutputError."""
        write_atomic(self.path / name, content, sync=lasting or SUMMED.search(name) is None)

    def bring(self, name: str, folder: Path) -> bool:
        """Fill `folder` with the quantized model of that name that another machine made; whether there is one."""
        return False

    def offer(self, name: str, folder: Path) -> None:
        """Let other machines `bring` a quantized model."""

    def remove(self, name: str) -> tuple[int, int]:
        """A file or a whole folder, which may be gone already; how many files that were, and their bytes."""
        path = self.path / name
        inside = [each for each in (path, *path.rglob("*")) if each.is_file()]
        size = sum(each.stat().st_size for each in inside)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        return len(inside), size
