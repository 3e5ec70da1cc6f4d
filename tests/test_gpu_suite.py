"""The GPU suite on a machine without a GPU: the same code at tiny sizes, and what it does when parts die."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels
from benchmarks import gpu_suite
from benchmarks.gpu import checks, ops, oracle, table, timing
from benchmarks.gpu.machine import ROOT, Machine
from benchmarks.gpu.parts import Part, SkipError, parts
from qkernels import reference
from tests.kernels.emulated_cuda_graph import EmulatedCuda

pytestmark = pytest.mark.slow  # runs every part of the suite

DRY = Machine(dry=True)
SUITE = [sys.executable, str(ROOT / "benchmarks/gpu_suite.py")]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QKERNELS_BACKEND", "QKERNELS_STRICT", "QKERNELS_PROGRAM"):
        monkeypatch.setenv(name, "")  # so that what the parts set is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(timing, "COLD", 1)


@pytest.mark.parametrize("part", [p for p in parts() if " cuda" not in p.name], ids=lambda p: p.name)
def test_every_part_runs_and_finds_nothing_wrong(part: Part) -> None:
    found = gpu_suite.work(part, DRY)
    if part.name == "build" or part.name.startswith("sanitize"):
        assert found["state"] == "skipped" and found["why"]
        return
    assert found["state"] == "done", found
    for row in found["rows"]:
        assert not row.get("failed") and not row.get("refused"), row
        assert not any("error" in t for t in row.get("times", {}).values()), row
        assert all(a["measured"] is None or a["measured"] > 0 for a in row.get("asked", [])), row
    if not part.name.endswith("streams_and_sizes"):
        assert found["rows"]


def off_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op with its last value wrong by a code, or by a thousandth."""

    def wrong(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        result = function(*args, out=out, **kwargs) if out is not None else function(*args, **kwargs)
        target = out if out is not None else result if result is not None else args[1]
        target = target[0] if isinstance(target, tuple | list) else target
        flat = target.view(-1)
        if flat.numel():
            last = flat[-1].item()
            flat[-1] = (last - 2 if last > 0 else last + 2) if target.dtype == torch.int8 else last * 1.05 + 0.05
        return result

    return wrong


@pytest.mark.parametrize("op", [op for op in checks.OPS if op != "streams_and_sizes"])
def test_checks_see_a_wrong_value(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, op, off_by_one(getattr(reference, op)))
    (row,) = checks.run(DRY, op, "reference")
    # Four of six estimators are compared with the reference, which is the wrong one here.
    assert len(row["failed"]) > row["cases"] // (4 if op == "fake_quantize" else 2), row


def test_checks_see_what_was_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "quantize_per_token", lambda *args, out: out)
    (row,) = checks.run(DRY, "quantize_per_token", "reference")
    assert any("never written" in failure for failure in row["failed"])


def test_what_a_backend_refuses_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise qkernels.FallbackError("no such kernel")

    monkeypatch.setattr(reference, "smooth_scale", refuse)
    (row,) = checks.run(DRY, "smooth_scale", "reference", 3)
    assert row["failed"] == [] and len(row["refused"]["no such kernel"]) == 3


def test_a_wrong_contender_is_not_timed_and_costs_the_others_nothing() -> None:
    def wrong(_: int) -> None:
        raise oracle.WrongError("off by 3")

    found = timing.compare(DRY, {"wrong": wrong, "right": lambda _: torch.ones(3).sum()}, 2)
    assert found["wrong"] == {"error": "WrongError: off by 3"} and found["right"]["seconds"] > 0


def test_a_backend_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(_: int) -> torch.Tensor:
        if os.environ["QKERNELS_BACKEND"] == "cuda":
            raise RuntimeError("int8_linear: no code for this GPU")
        return torch.ones(3)

    monkeypatch.setattr(Machine, "backends", lambda self: ["cuda", "triton"])
    found = timing.compare(DRY, ops.checked(DRY, call, lambda y: oracle.equal(y, torch.ones(3), "y")), 2)
    assert found["ours cuda"] == {"error": "RuntimeError: int8_linear: no code for this GPU"}
    assert found["ours triton"]["seconds"] > 0


def test_on_a_gpu_calls_are_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = EmulatedCuda()
    cuda.install(monkeypatch)
    machine = Machine(dry=True)
    machine.tiny = False  # the GPU's way of timing, on the CPU's tensors
    calls: list[int] = []

    def graphable(number: int) -> torch.Tensor:
        calls.append(number)
        return torch.ones(4) * number

    contenders = {"graphable": graphable, "reads": lambda n: torch.ones(2).sum().item(), "own graph": graphable}
    found = timing.compare(machine, contenders, 3, seconds=1e-3, rounds=4, eager=("own graph",))
    assert {name: row["how"] for name, row in found.items()} == {
        "graphable": "graph",
        "reads": "eager",
        "own graph": "eager",
    }
    assert all(row["low"] <= row["seconds"] <= row["high"] and row["rounds"] == 4 for row in found.values())
    assert calls[:6] == [0, 1, 2, 0, 1, 2]  # warmed up, captured; replays do not come here
    assert sum(entry.startswith("replayed") for entry in cuda.log) >= 2 + 4


def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_2(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    run = subprocess.run([*SUITE, "--out", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "no NVIDIA GPU" in run.stderr and "--dry-run" in run.stderr


def test_a_run_writes_its_results_and_the_next_goes_on(tmp_path: Path) -> None:
    command = [*SUITE, "--out", str(tmp_path), "--dry-run", "--only", "smooth_scale"]
    log = tmp_path / "parts.jsonl"
    tmp_path.mkdir(exist_ok=True)
    log.write_text('{"part": "check triton smooth_scale", "state": "failed", "key": "other sources"}\n{"part": "che')
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 cases, 0 wrong" in run.stdout and "None of its numbers says anything about speed" in run.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"device", "torch", "triton", "commit", "source"} <= set(results["facts"])
    assert results["parts"]["check triton smooth_scale"]["state"] == "done"
    before = log.read_text()
    assert subprocess.run(command, capture_output=True, text=True).stdout == run.stdout
    assert log.read_text() == before  # nothing ran twice


def test_parts_that_die_or_hang_cost_themselves_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {
        "dies": "import sys; sys.exit('CUDA error: an illegal memory access')",
        "hangs": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HANGS!r}, {str(tmp_path / 'up')!r}])",
    }
    os.mkfifo(tmp_path / "up")
    suite = gpu_suite.Suite(tmp_path, True, 60)
    start = suite.start

    def started(part: Part) -> gpu_suite.Started:
        """The limit of the part that hangs begins when what it starts is there."""
        found = start(part)
        if part.name == "hangs":
            assert (tmp_path / "up").read_text() == "up"
        return dataclasses.replace(found, began=time.monotonic())

    monkeypatch.setattr(suite, "start", started)
    monkeypatch.setattr(suite, "command", lambda part: [sys.executable, "-c", codes[part.name]])
    suite.run([Part("dies", LONG, "a", lambda _: iter(())), Part("hangs", 2, "a", lambda _: iter(()))])
    found = suite.found()
    assert found["dies"]["state"] == "failed" and "illegal memory access" in found["dies"]["why"]
    assert found["hangs"]["state"] == "failed" and "stopped after 2 s" in found["hangs"]["why"]
    assert not table.succeeded(found)
    assert not survivors(tmp_path)  # nor what the part had started


LONG = 300  # seconds: a wait that ends by an event ends here only where the event never comes
HANGS = f"""
import signal, sys
signal.alarm(2 * {LONG})  # where nothing stops it
for path in sys.argv[1:]:
    open(path, "w").write("up")
signal.pause()
"""


def survivors(folder: Path) -> list[str]:
    """Command lines in which a folder is named, of processes that do not end. A killed one has a moment to go."""
    living: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line:
                living[os.pidfd_open(int(path.parent.name))] = line
    for process in list(living):
        if select.select([process], [], [], LONG)[0]:  # readable when it has ended
            del living[process]
        os.close(process)
    return [*living.values()]


def test_a_run_that_is_stopped_stops_its_parts_and_the_next_goes_on(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--dry-run", "--only", "smooth_scale"]
    command = [*SUITE, *options]
    os.mkfifo(tmp_path / "up")
    hanging = (
        "import sys\n"
        "from benchmarks import gpu_suite\n"
        f"gpu_suite.Suite.command = lambda *_: [sys.executable, '-c', {HANGS!r}, {str(tmp_path / 'up')!r}]\n"
        f"sys.exit(gpu_suite.main({options}))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", hanging], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (tmp_path / "up").read_text() == "up"
    run.terminate()
    run.communicate(timeout=LONG)
    assert run.returncode == 128 + signal.SIGTERM
    assert not survivors(tmp_path)
    run_again = subprocess.run(command, capture_output=True, text=True)
    assert run_again.returncode == 0 and "12 cases, 0 wrong" in run_again.stdout


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    run = subprocess.run([*SUITE, "--out", str(file), "--dry-run"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert f"nothing can be written to --out {file}" in run.stderr


def test_a_full_disk_costs_the_files_and_not_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "table.txt").symlink_to("/dev/full")
    suite = gpu_suite.Suite(tmp_path, True, 5)
    suite.note({"part": "first", "state": "done"})
    suite.write("table.txt", "text")
    suite.log = Full(suite.log)
    suite.note({"part": "second", "state": "done"})
    assert set(suite.found()) == {"first", "second", "table.txt"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("could not be written" in line and "No space left" in line for line in said)


class Full(type(Path())):  # type: ignore[misc]
    """A file on a disk that is full."""

    def open(self, mode: str = "r", *more: Any, **options: Any) -> Any:
        return Path("/dev/full").open(mode, *more, **options) if "a" in mode else super().open(mode, *more, **options)


@pytest.fixture
def gpu() -> Machine:
    machine = Machine(dry=True)
    machine.tiny = False
    return machine


def test_the_sanitizer_runs_the_first_cases_or_is_skipped_by_name(
    tmp_path: Path, gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = (p for p in parts() if p.name == "sanitize triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("needs a machine without compute-sanitizer")
    assert gpu_suite.work(part, gpu)["why"] == "compute-sanitizer is not installed"
    tool = tmp_path / "compute-sanitizer"

    def says(last_line: str) -> dict[str, Any]:
        tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@" >> {tmp_path}/calls\n{last_line}\n')
        tool.chmod(0o755)
        return gpu_suite.work(part, gpu)

    found = says("echo Target application terminated; exit 1")
    assert found["state"] == "skipped" and "does not work here: Target application terminated" in found["why"]
    (tmp_path / "calls").unlink()
    assert says("exit 0")["state"] == "done"
    probe, checked = (tmp_path / "calls").read_text().splitlines()
    assert "torch.zeros" in probe
    script = f"{sys.executable} {ROOT / 'benchmarks/gpu_suite.py'}"
    assert checked == f"1 --tool memcheck --error-exitcode 9 {script} --sanitized triton"
    found = says("case $2 in memcheck) echo ERROR SUMMARY: 2 errors; exit 9;; esac")
    assert found["state"] == "failed" and "ERROR SUMMARY: 2 errors" in found["why"]


def test_failures_and_reasons_of_a_part_are_kept_with_its_rows() -> None:
    def fails(_: Machine) -> Any:
        yield {"case": "first"}
        raise RuntimeError("gone")

    def skips(_: Machine) -> Any:
        raise SkipError("nothing to see")
        yield

    found = gpu_suite.work(Part("x", 1, "", fails), DRY)
    assert found["state"] == "failed" and found["why"] == "RuntimeError: gone" and found["rows"] == [{"case": "first"}]
    assert gpu_suite.work(Part("x", 1, "", skips), DRY)["why"] == "nothing to see"


def test_what_a_part_found_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its limit it has failed, and keeps the rows it had; killed with the suite it is run again."""

    def slow(machine: Machine) -> Any:
        yield {"case": 1}
        yield {"case": 2}
        raise KeyboardInterrupt  # what no part catches

    monkeypatch.setattr(gpu_suite, "KEEP", 0.0)
    part = Part("slow", 1, "", slow)
    suite = gpu_suite.Suite(tmp_path, dry=True, minutes=1)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.work(part, DRY, suite.note)
    assert suite.found()["slow"]["state"] == "unfinished"
    assert suite.found()["slow"]["rows"] == [{"case": 1}, {"case": 2}]
    monkeypatch.setattr(suite, "command", lambda part: [sys.executable, "-c", HANGS])
    suite.run([part])
    assert suite.found()["slow"]["state"] == "failed" and "stopped after 1 s" in suite.found()["slow"]["why"]
    assert suite.found()["slow"]["rows"] == [{"case": 1}, {"case": 2}]


def test_the_towers_need_no_open_clip() -> None:
    code = (
        "import sys\n"
        "for name in ('open_clip', 'timm', 'transformers', 'pyarrow', 'PIL', 'torchvision'): sys.modules[name] = None\n"
        "from benchmarks.gpu import models\n"
        "from benchmarks.gpu.machine import Machine\n"
        "(row,) = models.tower(Machine(dry=True), 'ViT-L/14', 2)\n"
        "assert len(row['times']) == 5 and min(row['cosines'].values()) > 0.98, row\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_table_has_what_was_asked_beside_what_was_measured() -> None:
    row = {
        "asked": [
            {"what": "GEMM", "asked": 0.72, "measured": 0.4567, "unit": "of peak"},
            {"what": "over bf16", "asked": 1.7, "measured": float("inf"), "unit": "x"},
        ],
        "times": {"ours": {"error": "no"}},
        "case": "4k",
    }
    facts = {"device": "NVIDIA H200", "torch": "2", "triton": "3", "commit": None, "source": "s"}
    text = table.render(facts, {"time": {"state": "done", "seconds": 3.0, "rows": [row]}}, ["time", "later"])
    assert "72 %      46 %" in text and "1.70x         -" in text and "4k ours: no" in text
    assert "not run" in text and "run the same command again" in text
