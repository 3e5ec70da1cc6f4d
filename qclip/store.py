"""Intermediate results on disk, each under a hash of everything that it depends on.

What is in an entry is proved by its own checksum, what it is for by the key in it: a truncated, edited or foreign entry
is computed again and replaced. Entries are written whole or not at all, so that a killed run goes on where it stopped,
and several processes may read and write one folder. A store only saves time: where it cannot be read or written, the
run says so and goes on without it: of the first entry at once, of all of them, counted, at its end.

Processes that want the same entries at once may share the work (`Store.claimed`): a claim is a lock on one byte of one
file, chosen by the key, so that there is nothing to clean up and a killed process claims nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from .files import write_atomic

# What numpy has a type for; safetensors knows more and fails on them in ways of its own.
_DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


SHOWN = 5  # entries named in a warning
CLAIMS = "claims"  # a file of no bytes, of which some are locked
FAULTS = {
    "read": "cannot be read and were not used",
    "damaged": "were not what was stored and were computed again",
    "way": "are no files and were left alone",
}


class StoreWarning(UserWarning):
    """The store cannot be used in some way; results are not affected."""


def key_of(stage: str, version: int, /, **parts: Any) -> str:
    """sha256 (hex) of a stage, the version of its meaning, and JSON-able parts by name."""
    described = {"stage": stage, "version": version, "parts": parts}
    return hashlib.sha256(json.dumps(described, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Entry:
    """Arrays by name, and JSON-able facts about them."""

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Check = Callable[[Entry], str]  # what is wrong with an entry, "" where nothing is


class Store:
    """A folder of entries by key; `folder=None` keeps nothing. Processes may share the folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writes = folder is not None
        self._faults: dict[str, list[str]] = {}  # by kind: the keys of entries

    @classmethod
    def of(cls, where: Store | bool | str | os.PathLike[str] | None, kind: str) -> Store:
        """None or True: the user's cache folder for this kind of entry. False: nothing is kept. Else: that folder, or
        that store."""
        if isinstance(where, Store):
            return where
        if where is False:
            return cls(None)
        if where is not None and where is not True:
            return cls(Path(where))
        try:
            return cls(default_folder(kind))
        except RuntimeError as why:  # no home folder
            store = cls(None)
            store._tell("read", f"nothing is kept between runs: {why}; set XDG_CACHE_HOME")
            return store

    def path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"

    @property
    def keeps(self) -> bool:
        """Whether it takes entries: not without a folder, nor one that took none (read-only, full)."""
        return self._writes

    def has(self, key: str) -> bool:
        """Whether there is an entry under `key`; its content is checked only by `open`."""
        path = self.path(key)
        return path is not None and os.path.isfile(path)

    def open(self, key: str, check: Check = lambda _: "") -> Entry | None:
        """The entry under `key`; None where there is none, or where it is not what it should be.

        check: says what is wrong with an entry whose checksum is right ("" for nothing): shapes, dtypes, values.
        """
        path = self.path(key)
        try:
            if path is None or not os.path.lexists(path) or self._in_the_way(path):
                return None
            entry = _read(path, key)
            wrong = "its content does not fit its checksum or its name" if entry is None else check(entry)
        except (safetensors.SafetensorError, ValueError, RecursionError) as why:  # the last: facts nested very deep
            entry, wrong = None, f"it is not whole ({why})"
        except OSError as why:
            self._tell("read", f"{path} cannot be read ({why.strerror or why}) and is not used", key)
            return None
        if wrong:
            self._tell("damaged", f"{path} is not what was stored: {wrong}; it is computed again", key)
            return None
        return entry

    def write(self, key: str, entry: Entry) -> bool:
        """Keep an entry; whether it is kept. A folder that takes none (read-only, full) is not tried again."""
        path = self.path(key)
        if path is None or not self._writes or self._in_the_way(path):
            return False
        arrays = {name: np.ascontiguousarray(array) for name, array in entry.arrays.items()}
        text = json.dumps(dict(entry.facts))
        metadata = {"key": key, "facts": text, "sha256": _checksum(arrays, text)}
        try:
            write_atomic(path, safetensors.numpy.save(arrays, metadata), sync=False)  # a torn file fails its checksum
        except OSError as why:
            fault = why.__cause__ if isinstance(why.__cause__, OSError) else why
            self._writes = False
            self._tell("write", f"nothing more is kept in {self.folder} ({fault.strerror or fault})")
            return False
        return True

    def remove(self, key: str) -> None:
        """Forget the entry under `key`, if there is one."""
        path = self.path(key)
        if path is not None and not self._in_the_way(path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def fill(self, key: str, compute: Callable[[], Entry], check: Check = lambda _: "") -> Entry:
        """The entry under `key`, computed and kept where there is none that is sound."""
        entry = self.open(key, check)
        if entry is None:
            entry = compute()
            self.write(key, entry)
        return entry

    @contextlib.contextmanager
    def claimed(self, keys: Collection[str], wait: bool) -> Iterator[set[str]]:
        """Those of the keys whose entries are this process's to compute while the block runs: others are computing the
        rest, and are waited for with `wait`. What another one had claimed may be there afterwards. Where nothing can be
        locked nobody waits for anybody: entries are whole all the same, perhaps computed twice. A process has one
        claim at a time."""
        descriptor = self._claims() if keys else None
        if descriptor is None:
            yield set(keys)
            return
        try:
            yield {key for key in sorted(keys, key=_byte) if _locked(descriptor, _byte(key), wait)}
        finally:
            os.close(descriptor)

    def _claims(self) -> int | None:
        """The file whose bytes are locked; None where none can be made."""
        if self.folder is None or not self._writes:
            return None
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(self.folder / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return None

    def _in_the_way(self, path: Path) -> bool:
        """Whether there is something that is no file where an entry belongs."""
        if not os.path.lexists(path) or path.is_file():
            return False
        told = f"{path} is no file and is left alone; what belongs there is computed in every run"
        self._tell("way", told, path.stem)
        return True

    def _tell(self, kind: str, text: str, key: str = "") -> None:
        """A warning of each kind is given at once for the first entry; `tell_of_the_others` does it for the rest."""
        keys = self._faults.setdefault(kind, [])
        if not keys:
            warnings.warn(text, StoreWarning, stacklevel=3)
        if key not in keys:
            keys.append(key)

    def tell_of_the_others(self) -> None:
        """Warn, where several entries had the same fault, how many they were and which: at the end of a run."""
        for kind, keys in self._faults.items():
            if len(keys) > 1:
                shown = ", ".join(keys[:SHOWN]) + (" ..." if len(keys) > SHOWN else "")
                warnings.warn(
                    f"{len(keys)} entries of {self.folder} {FAULTS[kind]}: {shown}", StoreWarning, stacklevel=2
                )


def default_folder(kind: str) -> Path:
    """`$XDG_CACHE_HOME/qclip/KIND`, or `~/.cache/qclip/KIND`. Raises RuntimeError where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qclip" / kind


def _byte(key: str) -> int:
    """Where a key's byte is: two keys share one by a chance of 2**-60."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


def _locked(descriptor: int, byte: int, wait: bool) -> bool:
    """Whether that byte is this process's now."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
    except (BlockingIOError, PermissionError):  # POSIX lets a system say it either way
        return wait  # who waits is refused only where nothing can be locked
    except OSError:  # a file system without locks
        return True
    return True


def _read(path: Path, key: str) -> Entry | None:
    if path.stat().st_size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None  # more than this machine can have held, and stored
    with safetensors.safe_open(path, framework="np") as file:
        if any(file.get_slice(name).get_dtype() not in _DTYPES for name in file.keys()):  # noqa: SIM118 (not a dict)
            return None
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    text = metadata.get("facts", "")
    if metadata.get("key") != key or metadata.get("sha256") != _checksum(arrays, text):
        return None
    facts = json.loads(text)
    return Entry(arrays, facts) if isinstance(facts, dict) else None


def _checksum(arrays: Mapping[str, np.ndarray], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        digest.update(f"{name}:{arrays[name].dtype}:{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
