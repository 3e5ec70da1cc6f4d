"""The store of studies: a folder of what was measured, that many runs of many plans may share.

    qclip-study.json                what this folder is
    results/RUNTIME/CELL-SHA.parquet  rows of one cell; all-SHA.parquet: rows of many (`compact`)
    samples/RUNTIME/CELL-SHA.parquet  what was read of every image
    details/RUNTIME/CELL-SHA.json     curves and notes of a cell
    failures/RUNTIME/CELL.json        why a cell could not be measured
    artifacts/ embeddings/ plans/     quantized models, embeddings (`qclip.store`), plans that were run

A file's name holds the sha256 of its bytes: one that was edited or torn is refused by name. Files are written whole or
not at all, a cell's rows last, so that whoever is killed leaves a cell or none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qclip.errors import InputError
from qclip.files import check_folder, read_text, write_atomic
from qclip.untrusted import parse_json

from .cells import CELL
from .locks import locked
from .rows import SCHEMA, TEXTS

FORMAT, VERSION = "qclip-study", 1
ABOUT = "qclip-study.json"
SHA = 32  # hex digits of a file's sha256 in its name
MANY = "all"  # in the place of the cell: rows of many
FOLDERS = ("results", "samples", "details", "failures")


class StudyStore:
    """`open` or `create` one; the folders below it are made when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._many: dict[Path, set[str]] = {}  # the cells of files of many, which never change

    @classmethod
    def create(cls, folder: Path) -> StudyStore:
        """The store in a folder, which becomes one if it is empty or not there. Raises InputError."""
        about = folder / ABOUT
        if about.exists():
            return cls.open(folder)
        if folder.exists() and (not folder.is_dir() or any(not n.startswith(".") for n in os.listdir(folder))):
            raise InputError(f"{str(folder)!r} is no store of studies, and not empty; name another with --store")
        check_folder(folder, (ABOUT,))
        write_atomic(about, json.dumps({"format": FORMAT, "version": VERSION}).encode())
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> StudyStore:
        """Raises InputError where there is none, or one of a newer format."""
        if not (folder / ABOUT).exists():
            raise InputError(f"{str(folder)!r} is no store of studies; `qclip study run` makes one")
        about = parse_json(read_text(folder / ABOUT, "store"), str(folder / ABOUT), InputError)
        if not isinstance(about, dict) or about.get("format") != FORMAT or type(about.get("version")) is not int:
            raise InputError(f"{str(folder / ABOUT)!r} does not describe a store of studies; name another with --store")
        if about["version"] > VERSION:
            raise InputError(
                f"{str(folder)!r} has format {about['version']}, this version reads up to {VERSION}; upgrade qclip"
            )
        return cls(folder)

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings"

    def artifact(self, key: str) -> Path:
        return self.folder / "artifacts" / key

    def lock(self, name: str, shared: bool = False, wait: bool = True) -> Any:
        """A lock of this store: "store" is held, shared, by whoever uses it, and alone by who removes files."""
        return locked(self.folder / "locks" / name, shared, wait)

    # what is there

    def runtimes(self) -> dict[str, dict[str, Any]]:
        """What is known of each runtime under which something was measured."""
        return {path.stem: self._json(path) for path in sorted((self.folder / "runtimes").glob("*.json"))}

    def note_runtime(self, runtime: str, facts: dict[str, Any]) -> None:
        write_atomic(self.folder / "runtimes" / f"{runtime}.json", json.dumps(facts, indent=1).encode())

    def measured(self, runtime: str) -> set[str]:
        """The cells whose rows are there. Raises InputError where a file of many cells was edited."""
        found: set[str] = set()
        for cell, path in self._files("results", runtime):
            if cell == MANY:
                if path not in self._many:
                    cells = pq.read_table(self._checked(path), columns=["cell"])["cell"]
                    self._many[path] = set(pc.unique(cells).to_pylist())
                found |= self._many[path]
            else:
                found.add(cell)
        return found

    def failed(self, runtime: str) -> dict[str, dict[str, Any]]:
        """Why cells could not be measured: "error", "traceback", "variant", "condition" ..."""
        folder = self.folder / "failures" / runtime
        return {path.stem: self._json(path) for path in sorted(folder.glob("*.json"))}

    def rows(
        self, cells: Collection[str] | None = None, columns: Iterable[str] | None = None, runtime: str | None = None
    ) -> pa.Table:
        """Rows of these cells (None: of all), each cell once per runtime; texts come as dictionaries. Raises InputError
        where a file was edited."""
        wanted = SCHEMA.names if columns is None else list(dict.fromkeys(columns))
        parts: list[pa.Table] = []
        for where in [runtime] if runtime else sorted(path.name for path in (self.folder / "results").glob("*")):
            there = self._files("results", where)
            files = [(c, path) for c, path in there if cells is None or c == MANY or c in cells]
            seen: set[str] = set()  # two runs may have written a cell, on a file system without locks
            for cell, path in files:
                if cell in seen:
                    continue
                part = self._part(path, wanted, cells if cell == MANY else None, len(files) > 1 and cell == MANY)
                if len(files) > 1 and cell == MANY:
                    here = set(pc.unique(part["cell"]).to_pylist())
                    if twice := here & seen:
                        known = pc.is_in(part["cell"], value_set=pa.array(list(twice), pa.string()))
                        part = part.filter(pc.invert(known))
                    seen |= here
                else:
                    seen.add(cell)
                parts.append(part.select(wanted))
        return pa.concat_tables(parts) if parts else pa.schema([SCHEMA.field(n) for n in wanted]).empty_table()

    def _part(self, path: Path, wanted: Sequence[str], cells: Collection[str] | None, named: bool) -> pa.Table:
        """The columns of a file, and with `named` that of the cells, of these cells alone."""
        names = list(dict.fromkeys([*wanted, *(["cell"] if named or cells is not None else [])]))
        texts = [name for name in names if name in TEXTS]  # of a few distinct ones, and many times
        part = pq.read_table(self._checked(path), columns=names, read_dictionary=texts)
        if cells is not None:
            part = part.filter(pc.is_in(part["cell"], value_set=pa.array(list(cells), pa.string())))
        return part

    def details(self, runtime: str, cell: str) -> str | None:
        """The curves and notes of a cell, as `Results` writes them."""
        for _, path in self._files("details", runtime, f"{cell}-*"):
            return self._checked(path).read().decode()
        return None

    def samples(self, runtime: str, cell: str) -> pa.Table | None:
        """What was read of every image of a cell (`qclip.reliability.samples`)."""
        for _, path in self._files("samples", runtime, f"{cell}-*"):
            return pq.read_table(self._checked(path))
        return None

    # what is written

    def write(self, runtime: str, cell: str, rows: pa.Table, details: str, samples: pa.Table | None) -> None:
        """Keep one cell, its rows last. Raises OutputError where the disk is full or gone."""
        if samples is not None and len(samples):
            self._put("samples", runtime, cell, _parquet(samples), ".parquet")
        self._put("details", runtime, cell, details.encode(), ".json")
        self._put("results", runtime, cell, _parquet(rows), ".parquet")
        (self.folder / "failures" / runtime / f"{cell}.json").unlink(missing_ok=True)

    def fail(self, runtime: str, cell: str, facts: dict[str, Any]) -> None:
        write_atomic(self.folder / "failures" / runtime / f"{cell}.json", json.dumps(facts, indent=1).encode())

    def compact(self) -> tuple[int, int]:
        """Put the rows of each runtime into one file; (files before, files now). Raises InputError where a run uses the
        store."""
        before = after = 0
        with self._alone():
            for folder in sorted((self.folder / "results").glob("*")):
                old = [path for _, path in self._files("results", folder.name)]
                before += len(old)
                rows = self.rows(runtime=folder.name)
                if len(old) > 1:
                    order = [("variant", "ascending"), ("cell", "ascending")]
                    kept = self._put(
                        "results", folder.name, MANY, _parquet(rows.cast(SCHEMA).sort_by(order)), ".parquet"
                    )
                    for path in old:
                        if path != kept:
                            path.unlink()
                after += len(list(self._files("results", folder.name)))
        return before, after

    def gc(self, cells: Collection[str], artifacts: Collection[str]) -> tuple[int, int]:
        """Remove what belongs to none of these cells, quantized models whose keys are none of these, and embeddings;
        (files, bytes). Raises InputError where a run uses the store."""
        files = size = 0
        with self._alone():
            doomed = [
                path
                for kind in ("samples", "details", "failures", "results")
                for runtime in (self.folder / kind).glob("*")
                for path in runtime.iterdir()
                if path.name[:CELL] not in cells and not path.name.startswith(MANY)
            ]
            doomed += [
                each for each in (self.folder / "artifacts").glob("*") if each.name.partition("-")[0] not in artifacts
            ]
            doomed += [self.embeddings] if self.embeddings.exists() else []
            for path in doomed:
                inside = [each for each in (path, *path.rglob("*")) if each.is_file()]
                files, size = files + len(inside), size + sum(each.stat().st_size for each in inside)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for folder in (self.folder / "results").glob("*"):
                files += self._thinned(folder.name, cells)
        return files, size

    # below

    def _thinned(self, runtime: str, cells: Collection[str]) -> int:
        """The files of many cells without those that are wanted no more; how many files were written again."""
        count = 0
        for cell, path in list(self._files("results", runtime)):
            if cell == MANY:
                rows = pq.read_table(self._checked(path))
                kept = rows.filter(pc.is_in(rows["cell"], value_set=pa.array(list(cells), pa.string())))
                if len(kept) < len(rows):
                    count += 1
                    if len(kept):
                        self._put("results", runtime, MANY, _parquet(kept), ".parquet")
                    path.unlink()
        return count

    def _alone(self) -> Any:
        return _Alone(self.lock("store", wait=False), self.folder)

    def _put(self, kind: str, runtime: str, cell: str, content: bytes, ending: str) -> Path:
        name = f"{cell}-{hashlib.sha256(content).hexdigest()[:SHA]}{ending}"
        return write_atomic(self.folder / kind / runtime / name, content, sync=False)  # a torn one shows

    def _files(self, kind: str, runtime: str, pattern: str = "*") -> Iterator[tuple[str, Path]]:
        """Cell, or `MANY`, and file; those of many cells first."""
        folder = self.folder / kind / runtime
        found = [path for path in folder.glob(pattern) if "-" in path.stem]
        for path in sorted(found, key=lambda path: (not path.name.startswith(MANY), path.name)):
            yield path.stem.partition("-")[0], path

    def _checked(self, path: Path) -> io.BytesIO:
        """The bytes of a file whose name holds their hash."""
        try:
            content = path.read_bytes()
        except OSError as why:
            raise InputError(f"{str(path)!r} cannot be read ({why.strerror}); run the plan again") from None
        if path.stem.rpartition("-")[2] != hashlib.sha256(content).hexdigest()[:SHA]:
            raise InputError(
                f"{str(path)!r} is not what was stored: its content does not fit the checksum in its name; remove it, "
                "and run the plan again"
            )
        return io.BytesIO(content)

    def _json(self, path: Path) -> dict[str, Any]:
        found = parse_json(read_text(path, "file of a store"), str(path), InputError)
        if not isinstance(found, dict):
            raise InputError(f"{str(path)!r} is not what was stored; remove it, and run the plan again")
        return found


class _Alone:
    """The store's lock, or an error that says who has it."""

    def __init__(self, lock: Any, folder: Path) -> None:
        self.lock, self.folder = lock, folder

    def __enter__(self) -> None:
        if not self.lock.__enter__():
            self.lock.__exit__(None, None, None)
            raise InputError(f"a run is using {str(self.folder)!r}; wait until it has ended")

    def __exit__(self, *fault: Any) -> None:
        self.lock.__exit__(*fault)


def _parquet(rows: pa.Table) -> bytes:
    out = io.BytesIO()
    texts = [name for name in rows.column_names if name in TEXTS]
    pq.write_table(rows, out, compression="zstd", use_dictionary=texts or True, row_group_size=1 << 20)
    return out.getvalue()
