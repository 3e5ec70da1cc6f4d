"""Runs that are killed, stopped, or beside each other on one cache. Moments are events, never times: the n-th call that
changes a file, a line of progress, a module that is imported."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qclip
from qclip import files
from qclip.artifact import DESCRIPTION, file_hash, is_artifact, read_description
from tests.hostile import processes

pytestmark = pytest.mark.slow  # starts and kills many processes

EVALUATE = ["evaluate", "scenes-clean", "--data", "scenes:test?samples=12"]
EVALUATE += ["--no-spectrum", "--force", "--output", "out"]
MOMENTS, ALL_MOMENTS = (4, 4), (33, 20)  # of an evaluation and of a quantization


def quantize(model: str, recipe: str = "w8a8") -> list[str]:
    return ["quantize", model, "--recipe", recipe, "--force", "--output", "small"]


def cache(folder: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(folder.parent / "cache")}


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.parent.rglob("*") if path.name.startswith(".") or path.suffix == ".part"]


def numbers(file: Path) -> list[Any]:
    """Everything measured but times."""
    body = json.loads(file.read_text())
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "host")} for row in body["rows"]]
    rows = [row for row in rows if not row["metric"].startswith("ms_")]
    assert rows
    return [*rows, *body["curves"], *body["notes"]]


def moments(calls: Path, count: int, seed: int) -> list[int]:
    """One moment in each of `count` equal parts of a run, drawn by `seed`."""
    total = len(calls.read_text().splitlines())
    assert total > 4 * count
    draw = random.Random(seed)
    return [1 + draw.randrange(i * total // count, (i + 1) * total // count) for i in range(count)]


def test_an_evaluation_that_is_killed_goes_on_where_it_stopped(folder: Path, full: bool) -> None:
    calls = folder.parent / "calls"
    assert processes.run(EVALUATE, folder, processes.note_calls, calls, **cache(folder))[0] == 0
    undisturbed = numbers(folder / "out" / "results.json")
    assert leftovers(folder) == []
    killed = 0
    for number, moment in enumerate(moments(calls, (ALL_MOMENTS if full else MOMENTS)[0], 1)):
        shutil.rmtree(folder.parent / "cache")
        earlier = {}
        if number % 2:
            earlier = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
        else:
            shutil.rmtree(folder / "out")
        code, _, _ = processes.run(EVALUATE, folder, processes.kill_at, moment, **cache(folder))
        killed += code == -signal.SIGKILL
        found = [path for path in folder.glob("out/*") if path.name[0] != "."]
        for path in found:  # whole, the earlier one or the new one
            if path.suffix == ".json":
                assert numbers(path) == undisturbed
            else:
                assert path.read_text().endswith("</html>")
        assert len(found) in ((2,) if earlier else (0, 2))
        code, _, err = processes.run(EVALUATE, folder, **cache(folder))
        assert code == 0, err
        assert numbers(folder / "out" / "results.json") == undisturbed, moment
        assert leftovers(folder) == []
    assert killed == number + 1


def test_a_quantization_that_is_killed_leaves_the_old_artifact_or_the_new_one(
    tiny_model: str, folder: Path, full: bool
) -> None:
    def recipe() -> str:
        content = read_description(folder / "small")
        assert file_hash(folder / "small" / "model.safetensors") == content["tensors_sha256"]
        return content["recipe"]["name"]

    calls = folder.parent / "calls"
    assert processes.run(quantize(tiny_model), folder, processes.note_calls, calls)[0] == 0
    undisturbed = (folder / "small" / DESCRIPTION).read_bytes()
    found = set()
    for moment in moments(calls, (ALL_MOMENTS if full else MOMENTS)[1], 2):
        assert processes.run(quantize(tiny_model, "w4a8"), folder)[0] == 0
        code, _, _ = processes.run(quantize(tiny_model), folder, processes.kill_at, moment)
        assert code == -signal.SIGKILL
        assert recipe() in ("w4a8", "w8a8")
        found.add(recipe())
        assert processes.run(quantize(tiny_model), folder)[0] == 0
        assert (folder / "small" / DESCRIPTION).read_bytes() == undisturbed
        assert leftovers(folder) == [] and is_artifact(folder / "small")
    assert "w4a8" in found


def test_a_gptq_that_is_killed_goes_on_at_the_block_where_it_was(tiny_model: str, folder: Path) -> None:
    command = [*quantize(tiny_model, "w4a8-gptq"), "--calibration", "scenes:dev?samples=4"]
    kept, calls = folder.parent / "cache" / "qclip" / "quantize", folder.parent / "calls"
    assert processes.run(command, folder, processes.note_calls, calls, **cache(folder))[0] == 0
    undisturbed = file_hash(folder / "small" / "model.safetensors")
    total, most = len(calls.read_text().splitlines()), 0
    for moment in moments(calls, 4, 3):
        shutil.rmtree(folder / "small", ignore_errors=True)
        code, _, _ = processes.run(command, folder, processes.kill_at, moment, **cache(folder))
        assert code == -signal.SIGKILL
        found = {path: path.read_bytes() for path in kept.rglob("*.safetensors")}
        most = max(most, len(found))
        assert processes.run(command, folder, processes.note_calls, calls, **cache(folder))[0] == 0
        # What was kept is read, not written again; then nothing is left.
        assert len(calls.read_text().splitlines()) < total or not found
        assert file_hash(folder / "small" / "model.safetensors") == undisturbed
        assert [path for path in kept.rglob("*") if path.is_file()] == [] and leftovers(folder) == []
    assert most > 0


OLD, NEW = ({name: f"{age} {name}" for name in names} for age, names in (("old", "abc"), ("new", "abd")))


def killed_at_every_call(write: Callable[[], object], after: Callable[[], None]) -> int:
    """Runs `write` in forks of this process that are killed right before their first, second, ... call that changes a
    file, and `after` here each time, until one comes to its end. Returns how many were killed."""
    for moment in itertools.count(1):
        if not (child := os.fork()):
            processes.kill_at(moment)
            write()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        after()
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return moment - 1
    raise AssertionError


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if not files.PART.fullmatch(path.name)}


@pytest.mark.parametrize("how", ["exchanged", "moved", "joined", "new"])
def test_a_folder_whose_writer_is_killed_at_any_call(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out"
    if how == "moved":  # a file system that cannot exchange
        monkeypatch.setattr(files, "_exchange", lambda *_: False)

    def write() -> None:
        with files.whole_folder(out, last="d", alone=how in ("exchanged", "moved")) as part:
            for name, text in NEW.items():
                (part / name).write_text(text)

    def anew() -> None:
        for path in folder.iterdir():
            shutil.rmtree(path)
        if how != "new":
            out.mkdir()
            for name, text in OLD.items():
                (out / name).write_text(text)

    found: list[str] = []

    def after() -> None:
        aside = [path for path in folder.iterdir() if path.name.endswith(".old")]
        there = content(out) if out.exists() else None
        if how == "joined":  # each file is whole, and the last one comes last
            assert there is not None and set("abc") <= set(there) <= set("abcd")
            assert all(text in (f"old {name}", f"new {name}") for name, text in there.items())
            assert "d" not in there or there == OLD | NEW
            found.append("new" if "d" in there else "old")
        elif there is None:
            assert how == "new" or [content(path) for path in aside] == [OLD]
            found.append("none")
        else:
            assert there in (OLD, NEW)
            found.append("old" if there == OLD else "new")
        files.remove_leftovers(folder)
        files.remove_leftovers(out)
        assert not [path for path in folder.rglob("*") if files.PART.fullmatch(path.name)]
        anew()

    anew()
    assert killed_at_every_call(write, after) > 20
    ages = {
        "exchanged": ["old", "new"],
        "moved": ["old", "none", "new"],
        "joined": ["old", "new"],
        "new": ["none", "new"],
    }
    assert list(dict.fromkeys(found)) == ages[how] and found == sorted(found, key=ages[how].index)


def test_a_file_whose_writer_is_killed_at_any_call(folder: Path) -> None:
    out, found = folder / "results.json", []
    results = qclip.Results(notes=["new"])
    before, now = qclip.Results(notes=["old"]).text(), results.text()

    def after() -> None:
        assert out.read_text() in (before, now)
        found.append(out.read_text() == now)
        out.write_text(before)
        files.remove_leftovers(folder)
        assert list(folder.iterdir()) == [out]

    out.write_text(before)
    assert killed_at_every_call(lambda: results.to_json(out), after) > 5
    assert found == sorted(found) and set(found) == {False, True}


def test_two_runs_on_one_cache_at_once(folder: Path) -> None:
    assert processes.run(EVALUATE, folder, XDG_CACHE_HOME=str(folder.parent / "alone"))[0] == 0
    undisturbed = numbers(folder / "out" / "results.json")
    folders = [folder.parent / name for name in ("one", "other")]
    for path in folders:
        path.mkdir()
    runs = [processes.start(EVALUATE, path, **cache(folder)) for path in folders]
    assert [run.wait()[0] for run in runs] == [0, 0]
    for path in folders:
        assert numbers(path / "out" / "results.json") == undisturbed
    assert leftovers(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_leaves_nothing_half_written(number: int, folder: Path) -> None:
    line = ["evaluate", "scenes-clean", "--data", "scenes:test?samples=50000", "--output", "new/out", "--no-cache"]
    run = processes.start(line, folder, **cache(folder))
    for said in run.errors:
        if "%" in said and "rounding" not in said:  # the first images are being embedded
            break
    os.kill(run.process.pid, number)
    code, out, err = run.wait()
    assert code == 128 + number, err
    assert out == "" and err.splitlines()[-1] == "qclip: interrupted; nothing half-written was left behind"
    assert "Traceback" not in err and list(folder.iterdir()) == [] and leftovers(folder) == []


@pytest.mark.parametrize("module", ["rich.", "torch.", "open_clip."])
def test_ctrl_c_while_it_starts(module: str, folder: Path) -> None:
    """Python itself tells, on stderr, what it has imported."""
    command = [sys.executable, "-X", "importtime", "-m", "qclip", *EVALUATE]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.rpartition("|")[2].strip().startswith(module):
            break
    else:
        pytest.fail(f"{module} was not imported")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    said = [text for text in err.splitlines() if not text.startswith("import time:")]
    assert (process.returncode, out, said) == (130, "", ["qclip: interrupted; nothing half-written was left behind"])
    assert list(folder.iterdir()) == []


def test_an_interrupt_that_python_swallows_comes_again() -> None:
    """Where Python is called back from C, as when a weak reference dies during an import, exceptions are dropped."""
    code = (
        "import os, signal, sys, weakref; sys.argv = ['qclip', 'recipes']\n"
        "import qclip.recipes\n"
        "from qclip.cli import main\n"
        "class Thing: pass\n"
        "def presets():\n"
        "    thing = Thing()\n"
        "    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))\n"
        "    del thing\n"
        "    for _ in range(10**8): pass\n"  # far longer than it takes to come, and with an end where it does not
        "qclip.recipes.presets = presets\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "qclip: interrupted; nothing half-written was left behind\n"


def test_a_training_that_is_killed_goes_on_to_the_bit(tiny_model: str, folder: Path, full: bool) -> None:
    command = ["train", tiny_model, "--recipe", "w4a4-lsq", "--pairs", "scenes:train?samples=12", "--steps", "4"]
    command += ["--batch", "4", "--save-every", "1", "--threads", "1", "--force", "--output", "small"]
    calls, kept = folder.parent / "calls", folder / "small.training"
    assert processes.run(command, folder, processes.note_calls, calls)[0] == 0
    undisturbed = file_hash(folder / "small" / "model.safetensors"), (kept / "log.csv").read_bytes()
    went_on = 0
    for moment in moments(calls, 12 if full else 3, 4):
        shutil.rmtree(folder / "small", ignore_errors=True)
        shutil.rmtree(kept, ignore_errors=True)
        code, _, _ = processes.run(command, folder, processes.kill_at, moment)
        assert code == -signal.SIGKILL
        went_on += bool(list(kept.glob("step-*.safetensors")))
        code, _, err = processes.run(command, folder)
        assert code == 0, err
        assert (file_hash(folder / "small" / "model.safetensors"), (kept / "log.csv").read_bytes()) == undisturbed
        assert leftovers(folder) == []
    assert went_on


def test_controls_that_are_killed_or_interrupted_go_on_where_they_were(
    tiny_model: str, folder: Path, full: bool
) -> None:
    command = ["controls", tiny_model, "--recipe", "w4a4-lsq", "--control", "noise", "--pairs", "scenes:train"]
    command += [
        "--samples",
        "12",
        "--steps",
        "2",
        "--batch",
        "4",
        "--save-every",
        "1",
        "--seeds",
        "1",
        "--threads",
        "1",
    ]
    command += ["--data", "scenes:test?samples=12", "--dev", "scenes:dev?samples=12", "--force", "--output", "out"]
    calls, arms, trained = folder.parent / "calls", folder / "out.arms", set()

    def found() -> tuple[Any, ...]:
        files = sorted(path for path in arms.rglob("*") if path.is_file())  # no checkpoint among them
        return numbers(folder / "out" / "results.json"), [(str(path), path.read_bytes()) for path in files]

    assert processes.run(command, folder, processes.note_calls, calls, **cache(folder))[0] == 0
    undisturbed = found()
    count = 12 if full else 4
    # the first arm has a checkpoint, whose log is not written yet
    behind = [number for number, name in enumerate(calls.read_text().splitlines(), 1) if name == "replace"][1]
    for number, moment in enumerate([behind, *moments(calls, count, 5)[1:]]):
        for path in (folder / "out", arms, folder.parent / "cache"):
            shutil.rmtree(path, ignore_errors=True)
        how = signal.SIGINT if number == count // 2 else signal.SIGKILL
        code, _, err = processes.run(command, folder, processes.kill_at, moment, how, **cache(folder))
        assert code == (130 if how == signal.SIGINT else -signal.SIGKILL), err
        trained.add(len(list(arms.glob("*/qclip.json"))))
        assert moment != behind or len(list(arms.rglob("step-*.safetensors"))) == 1
        code, _, err = processes.run(command, folder, **cache(folder))
        assert code == 0, err
        assert found() == undisturbed and leftovers(folder) == []
    assert len(trained) > 1  # arms that were finished when it ended
