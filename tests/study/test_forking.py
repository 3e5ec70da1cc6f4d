"""Workers begin at once, as what they would be if they had been started anew."""

from __future__ import annotations

import os
from multiprocessing import forkserver
from pathlib import Path

import pytest

from qclip.study import forking
from qclip.study.run import engine_of, run
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
