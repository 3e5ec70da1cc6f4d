"""Workers begin at once, as what they would be if they had been started anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from qclip.study import forking
from qclip.study.engines import processes
from qclip.study.run import Ready, engine_of, run
from tests.study.small import Told, plan_of, ready_of


def test_what_workers_need_is_imported_before_they_are_forked_and_no_thread_is_lost() -> None:
    forking.start()
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    context = forking.start()
    assert forkserver._forkserver._forkserver_pid == server  # type: ignore[attr-defined]
    process = context.Process(target=print)
    process.start()  # by then it has imported
    process.join()
    assert "libtorch" in Path(f"/proc/{server}/maps").read_text()
    threads = [path.read_text().strip() for path in Path(f"/proc/{server}/task").glob("*/comm")]
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, "Arrow's: jemalloc makes it again"


STOPPED = """
import os, signal
from multiprocessing import forkserver
from qclip.study import forking
forking.start()
server = forkserver._forkserver._forkserver_pid
os.kill(server, signal.SIGINT)  # while it imports
process = forking.start().Process(target=os.getppid)
process.start()
process.join()
print(process.exitcode, forkserver._forkserver._forkserver_pid == server, flush=True)
signal.raise_signal(signal.SIGINT)
"""


def test_ctrl_c_reaches_who_started_it_alone() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True)
    assert done.stdout == "0 True\n" and done.returncode == -signal.SIGINT
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt" and done.stderr.count("Traceback") == 1


def test_nobody_waits_for_the_imports_of_a_process_that_has_ended(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import signal; signal.pause()")
    lines = "from qclip.study import forking; forking.IMPORTED.append('slow'); forking.start(); forking.start()"
    path = os.pathsep.join([str(tmp_path), str(Path(forking.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", lines], env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr == b""


def test_a_worker_whose_parent_was_killed_ends_without_a_traceback(small: tuple[Ready, Told]) -> None:
    """Which has not read all that the worker said."""
    ready, told = small
    context = forking.start()
    ours, theirs = context.Pipe()
    worker = context.Process(target=processes._serve, args=(theirs, ready.work, dict(os.environ)))
    worker.start()
    theirs.close()
    ours.send(told.began_with[0])
    assert ours.poll(300)
    ours.close()
    worker.join()
    assert worker.exitcode == 0


def test_starting_it_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    set_, unset = forking.LIBRARIES[:2]
    monkeypatch.setenv(set_, "7")
    monkeypatch.delenv(unset, raising=False)
    forking.start()
    assert os.environ[set_] == "7" and unset not in os.environ


def test_workers_have_the_environment_of_their_parent_not_of_what_they_are_forked_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, told = ready_of(plan_of(tmp_path), tmp_path / "store", workers=2), Told()
    forking.start()
    monkeypatch.setenv("QKERNELS_CPU_TIER", "nonsense")
    run(ready, engine_of(2), told)
    whys = [each["error"] for each in ready.store.failed(ready.work.runtime).values()]
    assert len(whys) == len(ready.grid.cells()) and all("QKERNELS_CPU_TIER" in why for why in whys)
