"""Whatever happens to a run, the store is whole, and the run goes on to the table of an undisturbed one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qclip.errors import OutputError
from qclip.study.formats import comma_separated
from qclip.study.found import find
from qclip.study.plan import Plan
from qclip.study.plan_file import read
from qclip.study.run import Ready, engine_of, recall, run
from qclip.study.store import StudyStore
from tests.study.small import Told, measured, plan_of, ready_of
from tests.study.test_remote import TINY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, str]:
    """A plan, and its table when nothing disturbs."""
    folder = tmp_path_factory.mktemp("tiny")
    plan = plan_of(folder, TINY)
    return plan, table(measured(plan, folder / "store")[0])


def table(ready: Ready) -> str:
    return comma_separated(find(ready.grid, ready.store))


TWICE = """
import sys
from qclip.study.plan_file import read
from tests.study.small import measured
for store in sys.argv[2:]:
    print(flush=True)
    sys.stdin.readline()  # until the other is here, too
    ready, told = measured(read(sys.argv[1]), store)
    assert not told.failed, told.failed
"""


@pytest.mark.slow
def test_two_runs_at_once_end_in_the_table_of_one(tiny: tuple[Plan, str], tmp_path: Path) -> None:
    """On one folder, with locks, and on one URL from what are two machines, without."""
    plan, expected = tiny
    stores = [str(tmp_path / "folder"), f"file://{tmp_path}/url"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, plan.path, *stores],
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / f"machine-{number}")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for _ in stores:
        for each in runs:
            assert each.stdout is not None and each.stdout.readline(), each.communicate()[1]
        for each in runs:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
    for each in runs:
        assert each.wait() == 0, each.communicate()[1]
    for place in stores:
        store = StudyStore.open(place)
        grid = recall(plan, store)
        assert comma_separated(find(grid, store)) == expected
        (runtime,) = store.measured_under()
        assert store.failed(runtime) == {} and store.measured(runtime) == grid.cells()
    once = Counter(path.name[:32] for path in (tmp_path / "folder" / "results").rglob("*.parquet"))
    assert set(once.values()) == {1}  # there are locks: what one measures the other leaves to it
    assert not list((tmp_path / "url").rglob("*.part"))


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Lets this process write files of at most so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("where", ["folder", "url"])
def test_a_disk_that_is_full_in_mid_run_stops_it_with_the_store_whole(
    where: str, tiny: tuple[Plan, str], tmp_path: Path, small_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan, expected = tiny
    place = str(tmp_path / "s") if where == "folder" else f"file://{tmp_path}/s"
    ready, told = ready_of(plan, place, apart=True), Told()
    small_files(300_000)  # a quantized model is larger, rows are not
    with pytest.raises(OutputError, match="could not be written"):
        run(ready, engine_of(1), told)
    small_files(resource.RLIM_INFINITY)
    assert not told.failed and not list(tmp_path.rglob("*.part"))
    again, told = measured(plan, place, apart=True)
    assert len(told.done) + len(again.cached) == 4 and table(again) == expected


KILLED = """
import os, signal, sys
from pathlib import Path
from qclip import files
from qclip.study.plan_file import read
from qclip.study.run import engine_of, prepare, run
from qclip.study.store import StudyStore
from tests.study.small import Told

def replace(part, real):
    if "/results/" in str(real):
        here = len(list(Path(real).parent.glob("*.parquet")))
        if here == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    move(part, real)

move, files.os.replace = os.replace, replace
run(prepare(read(sys.argv[1]), StudyStore.create(Path(sys.argv[2])), threads=1), engine_of(1), Told())
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twice_goes_on(tiny: tuple[Plan, str], tmp_path: Path) -> None:
    """Each time when all of a cell is written but the file of its rows, which stands beside its place."""
    plan, expected = tiny
    for there in (0, 3):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, plan.path, str(tmp_path / "s"), str(there)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert list((tmp_path / "s" / "results").rglob(".qclip-*.part"))
        (runtime,) = StudyStore.open(tmp_path / "s").runtimes()
        assert len(StudyStore.open(tmp_path / "s").measured(runtime)) == there
    ready, told = measured(read(plan.path), tmp_path / "s")
    assert len(ready.cached) == 3 and len(told.done) == 1 and table(ready) == expected
    assert not list((tmp_path / "s" / "results").rglob(".qclip-*.part"))
