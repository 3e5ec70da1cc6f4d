"""A store at a URL: what machines share, and what stands between them and it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qclip.cli import main
from qclip.errors import InputError, OutputError
from qclip.study import measure, resident
from qclip.study.formats import comma_separated
from qclip.study.found import find
from qclip.study.plan import Plan
from qclip.study.remote import Remote, is_url
from qclip.study.run import Ready, artifacts, engine_of, recall, run
from qclip.study.store import ABOUT, StudyStore
from qclip.study.upkeep import compact, gc
from tests.study.small import DATA, Told, measured, plan_of, ready_of
from tests.study.test_store import rows_of

URL = "memory://bucket/studies"
TINY = f"""
models = ["scenes-clean"]
recipes = ["w8a8"]
data = ["{DATA.replace("60", "12")}"]
corruptions.names = ["gaussian_noise"]
corruptions.severities = [3]
statistics = {{measurements = ["clean", "corrupted"], replicates = 20}}
"""
CELL = "a" * 32


class Frail(MemoryFileSystem):
    """A file system that is not there, or refuses, when it is told to."""

    protocol = "frail"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    cachable = False
    fails: Any = staticmethod(lambda call, path: None)

    def _open(self, path: str, mode: str = "rb", *args: Any, **more: Any) -> Any:
        Frail.fails("open " + mode[0], path)
        return super()._open(path, mode, *args, **more)

    def cat_file(self, path: str, *args: Any, **more: Any) -> bytes:
        Frail.fails("read", path)
        return super().cat_file(path, *args, **more)

    def ls(self, path: str, *args: Any, **more: Any) -> Any:
        Frail.fails("list", path)
        return super().ls(path, *args, **more)


fsspec.register_implementation("frail", Frail)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, str, dict[str, bytes]]:
    """A plan, its table when nothing is shared, and the files that a run of it leaves at a URL."""
    folder = tmp_path_factory.mktemp("tiny")
    plan = plan_of(folder, TINY)
    expected = table(measured(plan, folder / "store")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        ready, told = measured(plan, URL)
        assert len(told.done) == 4 and table(ready) == expected
        files = {path: file.getvalue() for path, file in MemoryFileSystem.store.items()}
        MemoryFileSystem.store.clear()
    return plan, expected, files


@pytest.fixture
def made(tiny: tuple[Plan, str, dict[str, bytes]]) -> Plan:
    """The plan, whose files are at the URL."""
    for path, content in tiny[2].items():
        fsspec.filesystem("memory").pipe_file(path, content)
    return tiny[0]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes this process another machine, with a cache folder of its own."""

    def become(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    become("first")
    yield become
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Frail.store.clear()
    Frail.pseudo_dirs[:] = [""]
    Frail.fails = staticmethod(lambda call, path: None)


def table(ready: Ready) -> str:
    return comma_separated(find(ready.grid, ready.store))


def there(kind: str = "") -> list[str]:
    return [path for path in MemoryFileSystem.store if path.startswith(f"/bucket/studies/{kind}")]


def test_another_machine_finds_all_that_was_measured(
    made: Plan, tiny: tuple[Plan, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {kind: len(there(f"{kind}/")) for kind in ("results", "artifacts")} == {"results": 4, "artifacts": 1}
    monkeypatch.setattr(measure.Bench, "run", lambda *_: pytest.fail("a task ran"))
    again = ready_of(made, URL)
    assert again.todo == [] and table(again) == tiny[1]
    seen = StudyStore.open(URL)
    assert comma_separated(find(recall(made, seen), seen)) == tiny[1]
    cell, runtime = again.grid.blocks[1].cells[""], again.work.runtime
    assert "reliability" in (seen.details(runtime, cell) or "")
    assert len(seen.samples(runtime, cell)) == 12  # type: ignore[arg-type]


def test_a_machine_uses_what_another_quantized_and_embedded(
    made: Plan, tiny: tuple[Plan, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in there("results/"):
        fsspec.filesystem("memory").rm(path)
    monkeypatch.setattr(resident.ptq, "quantize", lambda *_, **__: pytest.fail("quantized again"))
    monkeypatch.setattr("qclip.reliability.embed.Embedder._compute", lambda *_: pytest.fail("embedded again"))
    again, told = measured(made, URL)
    assert len(told.done) == 4 and not told.failed and table(again) == tiny[1]


def test_what_is_here_already_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = StudyStore.create(URL)
    store.write("r", CELL, rows_of(CELL), "{}", None)
    monkeypatch.setattr(MemoryFileSystem, "cat", lambda *_, **__: pytest.fail("fetched"))
    assert len(store.rows()) == 1


def test_the_failures_of_another_machine_are_seen_and_forgotten_when_it_measured(machine: Any) -> None:
    first = StudyStore.create(URL)
    first.fail("r", CELL, {"error": "boom"})
    first.fail("r", CELL, {"error": "bang"})
    machine("second")
    second = StudyStore.open(URL)
    assert second.failed("r") == {CELL: {"error": "bang"}}
    first.write("r", CELL, rows_of(CELL), "{}", None)
    second.refresh()
    assert second.failed("r") == {} and second.measured("r") == {CELL} and len(second.rows()) == 1


def test_a_cell_that_two_machines_measured_counts_once(machine: Any) -> None:
    first = StudyStore.create(URL)
    first.write("r", CELL, rows_of(CELL, seconds=1.0), "{}", None)
    machine("second")
    second = StudyStore.open(URL)
    second.write("r", CELL, rows_of(CELL, seconds=2.0), "{}", None)
    first.refresh()
    assert len(there("results/")) == 2 and len(first.rows()) == len(second.rows()) == 1
    assert compact(second) == (2, 1)
    first.refresh()
    assert len(there("results/")) == 1 and first.rows().equals(second.rows())


def test_gc_removes_there_and_here(made: Plan) -> None:
    grid = recall(made, store := StudyStore.open(URL))
    assert len(store.rows()) > 10 and store.files.bring(there("artifacts/")[0].split("/")[-1][:-37], store.folder / "x")
    kept = set(grid.blocks[1].cells.values())
    files, size = gc(store, kept, {key for key in artifacts(grid).values() if key})
    assert files > 8 and size > 0 and not there("embeddings/") and len(there("artifacts/")) == 1
    assert {path.rpartition("/")[2][:32] for path in there("results/")} == kept
    assert {path.name[:32] for path in (store.folder / "results").rglob("*.parquet")} == kept
    (store.folder / "artifacts" / "mine").mkdir(parents=True)
    gc(store, set(), set())
    assert not there("artifacts/") and not list((store.folder / "artifacts").iterdir())


@pytest.mark.parametrize("kind", ["results", "failures"])
def test_a_file_that_was_damaged_there_is_refused_by_name(kind: str, machine: Any) -> None:
    store = StudyStore.create(URL)
    store.write("r", CELL, rows_of(CELL), "{}", None)
    store.fail("r", "b" * 32, {"error": "boom"})
    (path,) = there(f"{kind}/")
    fsspec.filesystem("memory").pipe_file(path, b"{}")
    machine("second")
    seen = StudyStore.open(URL)
    with pytest.raises(InputError, match="checksum") as caught:
        seen.rows() if kind == "results" else seen.failed("r")
    assert f"memory:/{path}" in str(caught.value)
    assert not list((seen.folder / kind).rglob("*.*"))  # nothing of it stays here


def test_a_copy_here_that_was_damaged_is_fetched_again() -> None:
    store = StudyStore.create(URL)
    store.write("r", CELL, rows_of(CELL), "{}", None)
    (here,) = (store.folder / "results").rglob("*.parquet")
    here.write_bytes(b"torn")
    assert len(store.rows()) == 1 and here.read_bytes() != b"torn"


def test_a_damaged_quantized_model_fails_its_variant_by_name(made: Plan) -> None:
    memory = fsspec.filesystem("memory")
    for path in there("results/"):
        memory.rm(path)
    memory.pipe_file(there("artifacts/")[0], b"other")
    again, told = measured(made, URL)
    assert len(told.failed) == 2 and len(told.done) == 2
    assert {"checksum" in each["error"] for each in again.store.failed(again.work.runtime).values()} == {True}


def test_an_archive_with_other_files_is_not_unpacked(machine: Any) -> None:
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    from qclip.study.folder import summed

    store = StudyStore.create(URL)
    assert isinstance(store.files, Remote)
    store.files.put("artifacts/" + summed("k-r", out.getvalue(), ".tar"), out.getvalue())
    with pytest.raises(InputError, match="no file of a quantized model"):
        store.files.bring("k-r", store.folder / "artifacts" / "k-r")
    assert not [path for path in store.folder.rglob("*") if path.name == "outside"]
    assert not (store.folder / "artifacts" / "k-r").exists()


# what stands in the way


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket/x", "Protocol not known: nosuch"),
        ("simplecache::s3://bucket/x", "chain of file systems"),
        ("s3://bucket/x", "needs a package that is not installed"),
    ],
)
def test_a_file_system_that_is_not_there_is_one_sentence(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for open_it in (StudyStore.create, StudyStore.open, StudyStore.look):
        with pytest.raises(InputError, match=said) as caught:
            open_it(url)
        assert "\n" not in str(caught.value)


def refusing(kind: str, error: Exception, where: str = "") -> Any:
    def fails(call: str, path: str) -> None:
        if call.startswith(kind) and where in path:
            raise error

    return staticmethod(fails)


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("open w", FileNotFoundError("The specified bucket does not exist"), "written (The specified bucket does not"),
        ("open w", PermissionError("Forbidden"), "could not be written (Forbidden)"),
        ("list", PermissionError("Access Denied"), "could not be listed (Access Denied)"),
        ("read", ConnectionError("Could not connect to\nthe endpoint"), "could not be read (Could not connect to)"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_sentence(kind: str, error: Exception, said: str) -> None:
    Frail.fails = refusing(kind, error)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        StudyStore.create("frail://bucket/x")
    assert "\n" not in str(caught.value) and "frail://bucket/x" in str(caught.value) and not Frail.store


def test_a_password_is_not_shown() -> None:
    Frail.fails = refusing("read", ConnectionError("gone"))
    with pytest.raises(InputError, match="gone") as caught:
        StudyStore.open("frail://me:secret@host/x")
    assert "secret" not in str(caught.value) and "me:***@host" in str(caught.value)


@pytest.mark.parametrize("kind", ["samples", "results", "artifacts", "embeddings"])
def test_a_connection_that_is_lost_stops_the_run_and_harms_nothing(kind: str, tiny: tuple[Plan, str, Any]) -> None:
    (plan, expected, _), url = tiny, "frail://bucket/x"
    ready, told, writes = ready_of(plan, url), Told(), 0

    def fails(call: str, path: str) -> None:
        nonlocal writes
        if call == "open w" and f"/{kind}/" in path:
            writes += 1
            if writes == (1 if kind == "artifacts" else 2):
                raise ConnectionError("reset by peer")

    Frail.fails = staticmethod(fails)
    with pytest.raises(OutputError, match="reset by peer"):
        run(ready, engine_of(1), told)
    Frail.fails = staticmethod(lambda call, path: None)
    assert not told.failed and not [path for path in Frail.store if path.endswith(".part")]
    again, told = measured(plan, url)
    assert len(again.cached) == {"samples": 1, "results": 1}.get(kind, 0) and len(told.done) == 4 - len(again.cached)
    assert table(again) == expected


def test_a_half_written_file_is_not_seen() -> None:
    store = StudyStore.create("frail://bucket/x")
    seen: list[str] = []

    def fails(call: str, path: str) -> None:
        if call == "open w" and "/results/" in path:
            seen.append(path)
            assert StudyStore.open("frail://bucket/x").measured("r") == set()

    Frail.fails = staticmethod(fails)
    store.write("r", CELL, rows_of(CELL), "{}", None)
    assert seen and seen[0].endswith(".part") and StudyStore.open("frail://bucket/x").measured("r") == {CELL}


def test_a_url_that_holds_something_else_is_refused() -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/studies/thesis.txt", b"precious")
    for open_it in (StudyStore.create, StudyStore.open, StudyStore.look):
        with pytest.raises(InputError, match="no store of studies"):
            open_it(URL)
    assert there() == ["/bucket/studies/thesis.txt"]


def test_looking_makes_nothing() -> None:
    assert StudyStore.look(URL).measured("r") == set() and there() == []
    store = StudyStore.create(URL)
    assert store.where == URL and there() == [f"/bucket/studies/{ABOUT}"] and StudyStore.look(URL).where == URL


def test_what_is_a_url() -> None:
    assert is_url("s3://b/x") and not is_url("/a/b") and not is_url(Path("s3://b/x")) and not is_url("c:/x")


@pytest.mark.slow
def test_worker_processes_share_a_url_and_the_command_line_reads_it(
    tiny: tuple[Plan, str, Any], tmp_path: Path, machine: Any, capsys: pytest.CaptureFixture
) -> None:
    (plan, expected, _), url = tiny, f"file://{tmp_path}/shared"
    _, told = measured(plan, url, workers=2, resident=1)
    assert len(told.done) == 4 and not told.failed
    machine("second")
    seen = StudyStore.open(url)
    assert comma_separated(find(recall(plan, seen), seen)) == expected
    assert not list((tmp_path / "shared").rglob("*.part"))
    assert main(["study", "status", plan.path, "--store", url, "--json"]) == 0
    assert '"measured": 4' in capsys.readouterr().out
