"""Runs that are killed, stopped, or beside each other on one cache. Moments are events, never times: the n-th call that
changes a file, a line of progress, a module that is imported."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qclip.artifact import DESCRIPTION, file_hash, is_artifact, read_description
from tests.hostile import processes

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
