"""The files of a store at an `fsspec` URL (s3://, gs://, sftp://, file:// ...), which machines share.

The URL is the store: what is there is asked there. What was read or written once is kept in the user's cache folder,
under a name that holds its checksum, and so means the same for ever. There are no locks between machines, and none are
needed: whoever writes one name writes one content, and where two measure one cell at once, two files hold it, of which
readers take the first.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from qclip.errors import InputError, OutputError, QclipError, printable
from qclip.files import write_atomic
from qclip.store import Check, Entry, Store, default_folder, key_of

from .folder import Folder, fits, summed
from .packing import packed, unpack

WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}  # no folders; a file is there when all of it is
AT_ONCE = 256  # files that are asked for together; some file systems fetch them side by side
NAME = re.compile(r"[0-9A-Za-z][\w.-]*")  # what a listing names otherwise is not ours
PART = ".part"


def is_url(where: str | Path) -> bool:
    return isinstance(where, str) and "://" in where


class Remote(Folder):
    """Raises InputError where the file system of the URL is not installed. Whatever else stands between this machine
    and the URL is an OutputError; the store is whole all the same."""

    def __init__(self, url: str) -> None:
        shown = re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)  # without a password
        try:
            super().__init__(default_folder("studies") / key_of("url", 1, url=url.rstrip("/"))[:32])
        except RuntimeError as why:  # no home folder
            raise InputError(f"{shown!r} needs a folder on this machine, too: {why}; set XDG_CACHE_HOME") from None
        self.where, self.url = shown, url
        self._system, self._root = _file_system(url, shown)
        protocol = self._system.protocol
        self._whole = bool(WHOLE & {protocol} if isinstance(protocol, str) else WHOLE & set(protocol))
        self._listed: dict[str, set[str]] = {}

    def shown(self, name: str) -> str:
        return repr(f"{self.where.rstrip('/')}/{name}")

    def claim(self, name: str, content: bytes) -> None:
        if self.children(""):
            raise InputError(f"{self.where!r} is no store of studies, and not empty; name another with --store")
        self.write(name, content)

    def refresh(self) -> None:
        self._listed.clear()

    def children(self, folder: str) -> list[str]:
        """As they were when they were asked for first since `refresh`, and what was written since."""
        if folder not in self._listed:
            with self._asking(folder, "listed"):
                self._system.invalidate_cache()
                try:
                    found = self._system.ls(self._at(folder), detail=False)
                except FileNotFoundError:
                    found = []
            names = {each.rstrip("/").rpartition("/")[2] for each in found}
            self._listed[folder] = {name for name in names if NAME.fullmatch(name) and not name.endswith(PART)}
        return sorted(self._listed[folder])

    def read(self, name: str) -> bytes:
        """What is here already, where that is whole."""
        with contextlib.suppress(FileNotFoundError, InputError):
            content = super().read(name)
            if fits(name, content):
                return content
        content = self.get(name)
        if content is None:
            raise FileNotFoundError(name)
        self._keep(name, content)
        return content

    def fetch(self, names: Collection[str]) -> None:
        missing = [name for name in names if not os.path.lexists(self.path / name)]
        for start in range(0, len(missing), AT_ONCE):
            by_path = {self._at(name): name for name in missing[start : start + AT_ONCE]}
            with self._asking(missing[start], "read"):
                found = self._system.cat(list(by_path), on_error="return")
            for path, content in found.items():
                if isinstance(content, bytes):  # what failed is asked for again, and told, when it is read
                    self._keep(by_path[path], content)

    def write(self, name: str, content: bytes, lasting: bool = False) -> None:
        """There first: what is here is there."""
        self.put(name, content)
        self._keep(name, content)
        while name:
            name, _, own = name.rpartition("/")
            if name in self._listed:
                self._listed[name].add(own)

    def remove(self, name: str) -> tuple[int, int]:
        """There, and here."""
        with self._asking(name, "removed"):
            try:
                found = self._system.find(self._at(name), detail=True)
                size = sum(about.get("size") or self._system.size(path) for path, about in found.items())
                if found:
                    self._system.rm(list(found))
            except FileNotFoundError:  # somebody else did
                found, size = {}, 0
        super().remove(name)
        folder, _, own = name.rpartition("/")
        self._listed.get(folder, set()).discard(own)
        return len(found), size

    def get(self, name: str) -> bytes | None:
        """What is there under a name; None where nothing is."""
        with self._asking(name, "read"):
            try:
                return self._system.cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def put(self, name: str, content: bytes) -> None:
        """A reader finds all of it, or nothing."""
        path = self._at(name)
        with self._asking(name, "written"):
            if self._whole:
                self._system.pipe_file(path, content)
                return
            part = f"{path}-{secrets.token_hex(4)}{PART}"
            try:
                self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._system.pipe_file(part, content)
                self._system.mv(part, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    self._system.rm_file(part)
                raise

    def bring(self, name: str, folder: Path) -> bool:
        """Unpack the quantized model of that name into a folder of this machine; whether there is one."""
        self._listed.pop("artifacts", None)
        for each in self.children("artifacts"):
            if each.startswith(f"{name}-") and (content := self.get(f"artifacts/{each}")) is not None:
                unpack(self.checked(f"artifacts/{each}", content), folder)
                return True
        return False

    def offer(self, name: str, folder: Path) -> None:
        """Put a quantized model there, packed, for `bring`."""
        content = packed(folder)
        self.put(f"artifacts/{summed(name, content, '.tar')}", content)

    def _keep(self, name: str, content: bytes) -> None:
        if fits(name, content):
            super().write(name, content)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _asking(self, name: str, done: str) -> Iterator[None]:
        try:
            yield
        except QclipError:
            raise
        except Exception as why:  # each file system has errors of its own
            raise OutputError(
                f"{self.shown(name)} could not be {done} ({_first_line(why)}); what is stored is whole: go on when it "
                "can be"
            ) from None


class RemoteEmbeddings(Store):
    """Entries that other machines find, too; each says by itself whether it is whole."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote.path / "embeddings")
        self._remote = remote

    def open(self, key: str, check: Check = lambda _: "") -> Entry | None:
        path = self.path(key)
        assert path is not None
        if not os.path.lexists(path) and (content := self._remote.get(self._name(path))) is not None:
            write_atomic(path, content, sync=False)
        return super().open(key, check)

    def write(self, key: str, entry: Entry) -> bool:
        path = self.path(key)
        kept = super().write(key, entry)
        if kept and path is not None:
            self._remote.put(self._name(path), path.read_bytes())
        return kept

    def _name(self, path: Path) -> str:
        return path.relative_to(self._remote.path).as_posix()


def _file_system(url: str, shown: str) -> tuple[Any, str]:
    """Raises InputError."""
    if "::" in url:
        raise InputError(f"{shown!r} is a chain of file systems; name the one that keeps the files")
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(url)
    except ImportError as why:
        raise InputError(f"{shown!r} needs a package that is not installed: {_first_line(why)}") from None
    except Exception as why:
        raise InputError(f"{shown!r} cannot be used: {_first_line(why)}") from None
    return system, root.rstrip("/")


def _first_line(why: Exception) -> str:
    lines = str(why).strip().splitlines()
    return printable(lines[0])[:200] if lines else type(why).__name__
