"""The store of studies: a folder, here or at a URL, of what was measured; many runs of many plans may share it.

    qclip-study.json                what this folder is
    results/RUNTIME/CELL-SHA.parquet  rows of one cell; all-SHA.parquet: rows of many (`compact`)
    samples/RUNTIME/CELL-SHA.parquet  what was read of every image
    details/RUNTIME/CELL-SHA.json     curves and notes of a cell
    failures/RUNTIME/CELL-SHA.json    why a cell could not be measured
    artifacts/ embeddings/ plans/     quantized models, embeddings (`qclip.store`), plans that were run

A file's name holds the sha256 of its bytes: one that was edited or torn is refused by name. Files are written whole or
not at all, a cell's rows last, so that whoever is killed leaves a cell or none.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qclip.artifact import is_artifact
from qclip.errors import InputError, OutputError
from qclip.store import Store
from qclip.untrusted import parse_json

from .cells import CELL
from .folder import Folder, fits, summed
from .locks import locked
from .remote import Remote, RemoteEmbeddings, is_url
from .rows import SCHEMA, TEXTS

FORMAT, VERSION = "qclip-study", 1
ABOUT = "qclip-study.json"
MANY = "all"  # in the place of the cell: rows of many
FOLDERS = ("results", "samples", "details", "failures")


class StudyStore:
    """`open` or `create` one; the folders below it are made when they are needed."""

    def __init__(self, where: str | Path) -> None:
        """where: a folder, or an `fsspec` URL, of which `folder` is then what this machine alone has."""
        self.files: Folder = Remote(str(where)) if is_url(where) else Folder(Path(where))
        self.folder = self.files.path
        self._many: dict[str, set[str]] = {}  # the cells of files of many, which never change

    @classmethod
    def create(cls, where: str | Path) -> StudyStore:
        """The store there, which is made where nothing is. Raises InputError."""
        store = cls(where)
        with _reached():
            if not store._known():
                about = json.dumps({"format": FORMAT, "version": VERSION})
                store.files.claim(ABOUT, about.encode())
        return store

    @classmethod
    def open(cls, where: str | Path) -> StudyStore:
        """Raises InputError where there is none, or one of a newer format."""
        store = cls(where)
        with _reached():
            if not store._known():
                raise InputError(f"{store.where!r} is no store of studies; `qclip study run` makes one")
        return store

    @classmethod
    def look(cls, where: str | Path) -> StudyStore:
        """The store there, or an empty one, which is not made. Raises InputError where something else is."""
        store = cls(where)
        with _reached():
            if not store._known() and store.files.children(""):
                raise InputError(f"{store.where!r} is no store of studies; name another with --store")
        return store

    @property
    def where(self) -> str:
        """As messages name it."""
        return self.files.where

    @property
    def url(self) -> str:
        """With which `open` finds it again."""
        return self.files.url if isinstance(self.files, Remote) else str(self.folder)

    @property
    def embeddings(self) -> Store:
        return RemoteEmbeddings(self.files) if isinstance(self.files, Remote) else Store(self.folder / "embeddings")

    def quantized(self, name: str, make: Callable[[Path], object], wait: bool = True) -> Path | None:
        """The folder of a quantized model, which `make` fills where there is none yet. None where another worker is
        making it, and this one is not to wait."""
        folder = self.folder / "artifacts" / name
        with self.lock(name, wait=wait) as mine:  # of evaluations that share a variant, one makes it
            if not mine:
                return None
            if not is_artifact(folder) and not self.files.bring(name, folder):
                make(folder)
                self.files.offer(name, folder)
        return folder

    def refresh(self) -> None:
        """See what others wrote meanwhile."""
        self.files.refresh()

    def lock(self, name: str, shared: bool = False, wait: bool = True) -> Any:
        """A lock of this store: "store" is held, shared, by whoever uses it, and alone by who removes files."""
        return locked(self.folder / "locks" / name, shared, wait)

    # what is there

    def runtimes(self) -> dict[str, dict[str, Any]]:
        """What is known of each runtime under which something was measured."""
        names = [name for name in self.files.children("runtimes") if name.endswith(".json")]
        return {name.removesuffix(".json"): self.json(f"runtimes/{name}") for name in names}

    def note_runtime(self, runtime: str, facts: dict[str, Any]) -> None:
        self.files.write(f"runtimes/{runtime}.json", json.dumps(facts, indent=1).encode())

    def measured_under(self) -> list[str]:
        """The runtimes that have results."""
        return self.files.children("results")

    def measured(self, runtime: str) -> set[str]:
        """The cells whose rows are there. Raises InputError where a file of many cells was edited."""
        found: set[str] = set()
        for cell, name in self._files("results", runtime):
            if cell == MANY:
                if name not in self._many:
                    cells = pq.read_table(self._checked(name), columns=["cell"])["cell"]
                    self._many[name] = set(pc.unique(cells).to_pylist())
                found |= self._many[name]
            else:
                found.add(cell)
        return found

    def failed(self, runtime: str) -> dict[str, dict[str, Any]]:
        """Why cells could not be measured: "error", "traceback", "variant", "condition" ..."""
        files = list(self._files("failures", runtime))
        self.files.fetch([name for _, name in files])
        found = {}
        for cell, name in files:
            with contextlib.suppress(FileNotFoundError):  # it was measured meanwhile
                found[cell] = self._object(name, self._whole(name))
        return found

    def rows(
        self, cells: Collection[str] | None = None, columns: Iterable[str] | None = None, runtime: str | None = None
    ) -> pa.Table:
        """Rows of these cells (None: of all), each cell once per runtime; texts come as dictionaries. Raises InputError
        where a file was edited."""
        wanted = SCHEMA.names if columns is None else list(dict.fromkeys(columns))
        parts: list[pa.Table] = []
        for where in [runtime] if runtime else self.measured_under():
            there = self._files("results", where)
            files = [(c, name) for c, name in there if cells is None or c == MANY or c in cells]
            self.files.fetch([name for _, name in files])
            seen: set[str] = set()  # two runs may have written a cell, where there are no locks between them
            for cell, name in files:
                if cell in seen:
                    continue
                part = self._part(name, wanted, cells if cell == MANY else None, len(files) > 1 and cell == MANY)
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

    def _part(self, name: str, wanted: Sequence[str], cells: Collection[str] | None, named: bool) -> pa.Table:
        """The columns of a file, and with `named` that of the cells, of these cells alone."""
        columns = list(dict.fromkeys([*wanted, *(["cell"] if named or cells is not None else [])]))
        texts = [column for column in columns if column in TEXTS]  # of a few distinct ones, and many times
        part = pq.read_table(self._checked(name), columns=columns, read_dictionary=texts)
        if cells is not None:
            part = part.filter(pc.is_in(part["cell"], value_set=pa.array(list(cells), pa.string())))
        return part

    def details(self, runtime: str, cell: str) -> str | None:
        """The curves and notes of a cell, as `Results` writes them."""
        for _, name in self._files("details", runtime, f"{cell}-"):
            return self._checked(name).read().decode()
        return None

    def samples(self, runtime: str, cell: str) -> pa.Table | None:
        """What was read of every image of a cell (`qclip.reliability.samples`)."""
        for _, name in self._files("samples", runtime, f"{cell}-"):
            return pq.read_table(self._checked(name))
        return None

    # what is written

    def write(self, runtime: str, cell: str, rows: pa.Table, details: str, samples: pa.Table | None) -> None:
        """Keep one cell, its rows last. Raises OutputError where the disk is full, or the store gone."""
        if samples is not None and len(samples):
            self._put("samples", runtime, cell, _parquet(samples), ".parquet")
        self._put("details", runtime, cell, details.encode(), ".json")
        self._put("results", runtime, cell, _parquet(rows), ".parquet")
        self._forget_failures(runtime, cell)

    def fail(self, runtime: str, cell: str, facts: dict[str, Any]) -> None:
        kept = self._put("failures", runtime, cell, json.dumps(facts, indent=1).encode(), ".json")
        self._forget_failures(runtime, cell, kept)

    def compact(self) -> tuple[int, int]:
        """Put the rows of each runtime into one file; (files before, files now). Raises InputError where a run uses the
        store."""
        before = after = 0
        with self._alone():
            for runtime in self.measured_under():
                old = [name for _, name in self._files("results", runtime)]
                before += len(old)
                rows = self.rows(runtime=runtime)
                if len(old) > 1:
                    order = [("variant", "ascending"), ("cell", "ascending")]
                    kept = self._put("results", runtime, MANY, _parquet(rows.cast(SCHEMA).sort_by(order)), ".parquet")
                    for name in old:
                        if name != kept:
                            self.files.remove(name)
                after += len(list(self._files("results", runtime)))
        return before, after

    def gc(self, cells: Collection[str], artifacts: Collection[str]) -> tuple[int, int]:
        """Remove what belongs to none of these cells, quantized models whose keys are none of these, and embeddings;
        (files, bytes). Raises InputError where a run uses the store."""
        files = size = 0
        with self._alone():
            doomed = [
                f"{kind}/{runtime}/{name}"
                for kind in FOLDERS
                for runtime in self.files.children(kind)
                for name in self.files.children(f"{kind}/{runtime}")
                if name[:CELL] not in cells and not name.startswith(MANY)
            ]
            models = {*self.files.children("artifacts"), *Folder(self.folder).children("artifacts")}
            doomed += [f"artifacts/{name}" for name in sorted(models) if name.partition("-")[0] not in artifacts]
            for name in (*doomed, "embeddings"):
                count, bytes_ = self.files.remove(name)
                files, size = files + count, size + bytes_
            for runtime in self.measured_under():
                files += self._thinned(runtime, cells)
        return files, size

    # below

    def json(self, name: str) -> dict[str, Any]:
        """What is in a file without a checksum in its name. Raises FileNotFoundError, or InputError for no object."""
        return self._object(name, self.files.read(name))

    def _object(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            found = parse_json(content.decode(), self.files.shown(name), InputError)
        except UnicodeDecodeError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self.files.shown(name)} is not what was stored; remove it, and run the plan again")
        return found

    def _known(self) -> bool:
        """Whether there is a store. Raises InputError for one of a newer format."""
        try:
            content = self.files.read(ABOUT)
        except FileNotFoundError:
            return False
        about: dict[str, Any] = {}
        with contextlib.suppress(InputError):
            about = self._object(ABOUT, content)
        if about.get("format") != FORMAT or type(about.get("version")) is not int:
            raise InputError(
                f"{self.files.shown(ABOUT)} does not describe a store of studies; name another with --store"
            )
        if about["version"] > VERSION:
            raise InputError(
                f"{self.where!r} has format {about['version']}, this version reads up to {VERSION}; upgrade qclip"
            )
        return True

    def _thinned(self, runtime: str, cells: Collection[str]) -> int:
        """The files of many cells without those that are wanted no more; how many files were written again."""
        count = 0
        for cell, name in list(self._files("results", runtime)):
            if cell == MANY:
                rows = pq.read_table(self._checked(name))
                kept = rows.filter(pc.is_in(rows["cell"], value_set=pa.array(list(cells), pa.string())))
                if len(kept) < len(rows):
                    count += 1
                    if len(kept):
                        self._put("results", runtime, MANY, _parquet(kept), ".parquet")
                    self.files.remove(name)
        return count

    def _alone(self) -> Any:
        return _Alone(self.lock("store", wait=False), self.where)

    def _put(self, kind: str, runtime: str, cell: str, content: bytes, ending: str) -> str:
        name = summed(f"{kind}/{runtime}/{cell}", content, ending)
        self.files.write(name, content)
        return name

    def _forget_failures(self, runtime: str, cell: str, but: str = "") -> None:
        for _, name in list(self._files("failures", runtime, f"{cell}-")):
            if name != but:
                self.files.remove(name)

    def _files(self, kind: str, runtime: str, start: str = "") -> Iterator[tuple[str, str]]:
        """Cell, or `MANY`, and name of each file whose own name starts so; those of many cells first."""
        found = [name for name in self.files.children(f"{kind}/{runtime}") if "-" in name and name.startswith(start)]
        for name in sorted(found, key=lambda name: (not name.startswith(MANY), name)):
            yield name.partition("-")[0], f"{kind}/{runtime}/{name}"

    def _checked(self, name: str) -> io.BytesIO:
        """The bytes of a file whose name holds their hash. Raises InputError."""
        try:
            return io.BytesIO(self._whole(name))
        except FileNotFoundError:
            raise InputError(f"{self.files.shown(name)} is gone; run the plan again") from None

    def _whole(self, name: str) -> bytes:
        content = self.files.read(name)
        if not fits(name, content):
            raise InputError(
                f"{self.files.shown(name)} is not what was stored: its content does not fit the checksum in its name; "
                "remove it, and run the plan again"
            )
        return content


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """A store that cannot be reached when it is opened was named wrongly."""
    try:
        yield
    except OutputError as why:
        raise InputError(str(why)) from None


class _Alone:
    """The store's lock, or an error that says who has it."""

    def __init__(self, lock: Any, where: str) -> None:
        self.lock, self.where = lock, where

    def __enter__(self) -> None:
        if not self.lock.__enter__():
            self.lock.__exit__(None, None, None)
            raise InputError(f"a run is using {self.where!r}; wait until it has ended")

    def __exit__(self, *fault: Any) -> None:
        self.lock.__exit__(*fault)


def _parquet(rows: pa.Table) -> bytes:
    out = io.BytesIO()
    texts = [name for name in rows.column_names if name in TEXTS]
    pq.write_table(rows, out, compression="zstd", use_dictionary=texts or True, row_group_size=1 << 20)
    return out.getvalue()
