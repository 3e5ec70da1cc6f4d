"""The store of studies: a folder, here or at a URL, of what was measured; many runs of many plans may share it.

    qclip-study.json                what this folder is
    results/RUNTIME/CELL-SHA.parquet  rows of one cell; all-SHA.parquet: rows of many (`upkeep.compact`)
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

from .folder import Folder, json_object, summed
from .locks import locked
from .remote import Remote, RemoteEmbeddings, is_url
from .rows import SCHEMA, TEXTS, of_cells

FORMAT, VERSION = "qclip-study", 1
ABOUT = "qclip-study.json"
MANY = "all"  # in the place of the cell: rows of many


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
    def shared_locks(self) -> bool:
        """Whether all who use it see each other's locks: not those of several machines at a URL."""
        return not isinstance(self.files, Remote)

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
        for cell, name in self.named("results", runtime):
            if cell == MANY:
                if name not in self._many:
                    self._many[name] = set(pc.unique(self.table(name, ["cell"])["cell"]).to_pylist())
                found |= self._many[name]
            else:
                found.add(cell)
        return found

    def failed(self, runtime: str) -> dict[str, dict[str, Any]]:
        """Why cells could not be measured: "error", "traceback", "variant", "condition" ..."""
        files = list(self.named("failures", runtime))
        self.files.fetch([name for _, name in files])
        found = {}
        for cell, name in files:
            with contextlib.suppress(FileNotFoundError):  # it was measured meanwhile
                found[cell] = json_object(self.files.whole(name), self.files.shown(name))
        return found

    def rows(
        self, cells: Collection[str] | None = None, columns: Iterable[str] | None = None, runtime: str | None = None
    ) -> pa.Table:
        """Rows of these cells (None: of all), each cell once per runtime; texts come as dictionaries. Raises InputError
        where a file was edited."""
        wanted = SCHEMA.names if columns is None else list(dict.fromkeys(columns))
        parts: list[pa.Table] = []
        for where in [runtime] if runtime else self.measured_under():
            there = self.named("results", where)
            files = [(c, name) for c, name in there if cells is None or c == MANY or c in cells]
            self.files.fetch([name for _, name in files])
            seen: set[str] = set()  # two runs may have written a cell, where there are no locks between them
            for cell, name in files:
                if cell == MANY:
                    parts.append(self._of_many(name, wanted, cells, seen if len(files) > 1 else None))
                elif cell not in seen:
                    seen.add(cell)
                    parts.append(self._of_one(name, wanted, cell))
        return pa.concat_tables(parts) if parts else pa.schema([SCHEMA.field(n) for n in wanted]).empty_table()

    def _of_one(self, name: str, wanted: Sequence[str], cell: str) -> pa.Table:
        """Raises InputError where the file is not the cell's: its checksum tells of its content alone."""
        columns = list(dict.fromkeys([*wanted, "cell"]))
        part = self.table(name, columns, _texts(columns))
        if pc.unique(part["cell"]).to_pylist() != [cell]:
            raise InputError(
                f"{self.files.shown(name)} does not hold the rows of its cell; remove it, and run the plan again"
            )
        return part.select(wanted)

    def _of_many(
        self, name: str, wanted: Sequence[str], cells: Collection[str] | None, seen: set[str] | None
    ) -> pa.Table:
        """Of a file of many cells those that are asked for (None: all) and not in `seen`, which get into it (None:
        there is no other file)."""
        if cells is None and seen is None:
            return self.table(name, wanted, _texts(wanted))
        columns = list(dict.fromkeys([*wanted, "cell"]))
        part = self.table(name, columns, _texts(columns))
        if cells is not None:
            part = part.filter(of_cells(part, cells))
        if seen is not None:
            here = set(pc.unique(part["cell"]).to_pylist())
            if here & seen:
                part = part.filter(pc.invert(of_cells(part, seen)))
            seen |= here
        return part.select(wanted)

    def details(self, runtime: str, cell: str) -> str | None:
        """The curves and notes of a cell, as `Results` writes them."""
        for _, name in self.named("details", runtime, f"{cell}-"):
            return self._checked(name).read().decode()
        return None

    def samples(self, runtime: str, cell: str) -> pa.Table | None:
        """What was read of every image of a cell (`qclip.reliability.samples`)."""
        for _, name in self.named("samples", runtime, f"{cell}-"):
            return self.table(name)
        return None

    def table(self, name: str, columns: Sequence[str] | None = None, texts: Sequence[str] = ()) -> pa.Table:
        """A Parquet file, or these columns of it, of which `texts` become dictionaries. Raises InputError where it was
        edited."""
        return pq.read_table(self._checked(name), columns=columns, read_dictionary=list(texts))

    def named(self, kind: str, runtime: str, start: str = "") -> Iterator[tuple[str, str]]:
        """Cell, or `MANY`, and name of each file whose own name starts so; those of many cells first."""
        found = [name for name in self.files.children(f"{kind}/{runtime}") if "-" in name and name.startswith(start)]
        for name in sorted(found, key=lambda name: (not name.startswith(MANY), name)):
            yield name.partition("-")[0], f"{kind}/{runtime}/{name}"

    # what is written

    def write(self, runtime: str, cell: str, rows: pa.Table, details: str, samples: pa.Table | None) -> None:
        """Keep one cell, its rows last. Raises OutputError where the disk is full, or the store gone."""
        if samples is not None and len(samples):
            self._put("samples", runtime, cell, _parquet(samples), ".parquet")
        self._put("details", runtime, cell, details.encode(), ".json")
        self._put("results", runtime, cell, _parquet(rows), ".parquet")
        self._forget_failures(runtime, cell)

    def write_many(self, runtime: str, rows: pa.Table) -> str:
        """Keep the rows of many cells in one file, in whose favour others may be removed; its name."""
        return self._put("results", runtime, MANY, _parquet(rows), ".parquet", lasting=True)

    def fail(self, runtime: str, cell: str, facts: dict[str, Any]) -> None:
        kept = self._put("failures", runtime, cell, json.dumps(facts, indent=1).encode(), ".json")
        self._forget_failures(runtime, cell, kept)

    # below

    def json(self, name: str) -> dict[str, Any]:
        """What is in a file without a checksum in its name. Raises FileNotFoundError, or InputError for no object."""
        return json_object(self.files.read(name), self.files.shown(name))

    def _known(self) -> bool:
        """Whether there is a store. Raises InputError for one of a newer format."""
        try:
            content = self.files.read(ABOUT)
        except FileNotFoundError:
            return False
        about: dict[str, Any] = {}
        with contextlib.suppress(InputError):
            about = json_object(content, self.files.shown(ABOUT))
        if about.get("format") != FORMAT or type(about.get("version")) is not int:
            raise InputError(
                f"{self.files.shown(ABOUT)} does not describe a store of studies; name another with --store"
            )
        if about["version"] > VERSION:
            raise InputError(
                f"{self.where!r} has format {about['version']}, this version reads up to {VERSION}; upgrade qclip"
            )
        return True

    def _put(self, kind: str, runtime: str, cell: str, content: bytes, ending: str, lasting: bool = False) -> str:
        name = summed(f"{kind}/{runtime}/{cell}", content, ending)
        self.files.write(name, content, lasting)
        return name

    def _forget_failures(self, runtime: str, cell: str, but: str = "") -> None:
        for _, name in list(self.named("failures", runtime, f"{cell}-")):
            if name != but:
                self.files.remove(name)

    def _checked(self, name: str) -> io.BytesIO:
        """The bytes of a file whose name holds their hash. Raises InputError."""
        try:
            return io.BytesIO(self.files.whole(name))
        except FileNotFoundError:
            raise InputError(f"{self.files.shown(name)} is gone; run the plan again") from None


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """A store that cannot be reached when it is opened was named wrongly."""
    try:
        yield
    except OutputError as why:
        raise InputError(str(why)) from None


def _texts(columns: Iterable[str]) -> list[str]:
    """Those of which a file holds few distinct values, each many times."""
    return [name for name in columns if name in TEXTS]


def _parquet(rows: pa.Table) -> bytes:
    out = io.BytesIO()
    texts = _texts(rows.column_names) or True
    pq.write_table(rows, out, compression="zstd", use_dictionary=texts, row_group_size=1 << 20)
    return out.getvalue()
