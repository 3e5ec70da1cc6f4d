"""Every command that writes, at every place that cannot be written: refused before the work, in one sentence, exit 2;
what is no regular file or folder of ours is never replaced. A disk that fills up later harms nothing that was there."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qclip
from qclip.cli import main
from tests.hostile import processes
from tests.hostile.test_numbers import COMMANDS, options

LINES = {
    "quantize": ["quantize", "photos"],
    "evaluate": ["evaluate", "photos", "--data", "scenes:test?samples=20"],
    "verify": ["verify", "a", "--against", "photos", "--data", "scenes:test?samples=20", "--require", "top1>=-1"],
    "spectrum": ["spectrum", "photos"],
    "sensitivity": ["sensitivity", "photos", "--data", "scenes:test?samples=20"],
    "report": ["report", "results.json"],
    "demo": ["demo"],
    "study table": ["study", "table", "plan.toml"],
    "study report": ["study", "report", "plan.toml"],
    "train": ["train", "photos", "--recipe", "w4a4-lsq", "--pairs", "scenes:train?samples=12"],
    "controls": ["controls", "photos", "--recipe", "w4a4-lsq", "--pairs", "scenes:train?samples=12"]
    + ["--data", "scenes:test?samples=20", "--dev", "scenes:dev?samples=20"],
}
FOLDERS = {"quantize", "evaluate", "verify", "sensitivity", "demo", "train", "controls"}  # whose output is one
FOLDERS |= {"study report"}
Place = Callable[[Path], str]


def make(name: str, do: Callable[[Path], object]) -> Place:
    def place(here: Path) -> str:
        do(here / name)
        return name

    return place


def a_socket(path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path.name)  # in the current folder: the address of a socket is short
    listening.close()


# name -> what makes the place and names it. Refused whatever --force says.
NEVER: dict[str, Place] = {
    "null device": lambda _: "/dev/null",
    "full device": lambda _: "/dev/full",
    "fifo": make("out", os.mkfifo),
    "socket": make("out", a_socket),
    "dangling link": make("out", lambda p: p.symlink_to("nothing")),
    "link to itself": make("out", lambda p: p.symlink_to("out")),
    "link to a device": make("out", lambda p: p.symlink_to("/dev/null")),
    "below a file": lambda _: "results.json/out",
    "in /proc": lambda _: "/proc/out",
    "in /sys": lambda _: "/sys/out",
    "too long a name": lambda _: "n" * 256,
    "too long a path": lambda _: "m/" * 2100,
    "a newline": lambda _: "a\nb",
    "empty": lambda _: "",
}


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    results = qclip.Results(notes=["mine"])
    results.add(metric="top1", model="m", set="s", value=0.5)
    results.to_json("results.json")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model, or results, is work."""

    def work(*_: object, **__: object) -> None:
        pytest.fail("work began before the output was looked at")

    monkeypatch.setattr(qclip, "load_model", work)
    monkeypatch.setattr(qclip.Results, "from_json", work)


def tree(folder: Path) -> dict[str, object]:
    """What is in a folder, links not followed: kind, inode, content."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (facts.st_mode, facts.st_ino, content)
    return found


def refused(line: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qclip: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert "--debug" not in err and len(err) < 600
    return err


def test_every_command_that_writes_is_here() -> None:
    assert {name for name in COMMANDS if "--output" in options(name)} == set(LINES)


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("place", NEVER)
def test_what_cannot_be_an_output_is_refused_before_the_work(
    command: str, place: str, folder: Path, no_work: None, capsys: pytest.CaptureFixture
) -> None:
    output = NEVER[place](folder)
    before = tree(folder)
    for force in ([], ["--force"]):
        err = refused([*LINES[command], "--output", output, *force], capsys)
        assert "output" in err or "name" in err
        assert tree(folder) == before


@pytest.mark.parametrize("command", LINES)
def test_what_is_there_is_refused_before_the_work(
    command: str, folder: Path, no_work: None, capsys: pytest.CaptureFixture
) -> None:
    Path("file").write_text("precious")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("precious")
    Path("link").symlink_to("full")
    before = tree(folder)
    for output in ("file", "full", "link"):
        refused([*LINES[command], "--output", output], capsys)
        if command == "quantize" or (output == "file") == (command in FOLDERS):
            if command != "report":  # which writes report.html into a folder
                refused([*LINES[command], "--output", output, "--force"], capsys)
    assert tree(folder) == before


@pytest.mark.parametrize("command", ["evaluate", "demo", "report"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_stands_where_a_file_of_the_output_comes_is_never_replaced(
    command: str, kind: str, folder: Path, no_work: None, capsys: pytest.CaptureFixture
) -> None:
    Path("out").mkdir()
    inside = Path("out/report.html")
    {"fifo": os.mkfifo, "folder": os.mkdir, "link": lambda p: p.symlink_to("/dev/null")}[kind](inside)
    before = tree(folder)
    assert "report.html" in refused([*LINES[command], "--output", "out", "--force"], capsys)
    assert tree(folder) == before


def test_an_output_that_is_the_input_is_refused(
    tiny_model: str, folder: Path, no_work: None, capsys: pytest.CaptureFixture
) -> None:
    weights = shutil.copy(Path(tiny_model.removeprefix("local-dir:")) / "open_clip_model.safetensors", "w.safetensors")
    before = tree(folder)
    assert "is what is read" in refused(["report", "results.json", "--output", "./results.json", "--force"], capsys)
    assert "is what is read" in refused(["spectrum", str(weights), "--output", str(weights), "--force"], capsys)
    assert tree(folder) == before


def test_the_demo_replaces_only_its_own_folder_unasked(no_work: None, capsys: pytest.CaptureFixture) -> None:
    Path("mine").mkdir()
    Path("mine/results.json").write_text("of an hour's evaluation")
    assert "--force" in refused(["demo", "--output", "mine"], capsys)


def test_quantize_names_its_own_output_and_looks_there_first(
    monkeypatch: pytest.MonkeyPatch, no_work: None, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir("/proc")
    assert "photos-w8a8" in refused(["quantize", "photos"], capsys)


def test_links_to_a_file_are_written_through(folder: Path, capsys: pytest.CaptureFixture) -> None:
    Path("page.html").write_text("old")
    Path("link").symlink_to("page.html")
    assert main(["report", "results.json", "--output", "link", "--force"]) == 0
    assert Path("link").is_symlink() and "<html" in Path("page.html").read_text()


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder that a user without rights may look into."""
    folder = Path(tempfile.mkdtemp(prefix="qclip-test-"))
    (folder / "shut").mkdir()
    folder.chmod(0o755)
    (folder / "shut").chmod(0o555)
    yield folder / "shut"
    shutil.rmtree(folder)


def test_a_folder_without_the_right_to_write(unwritable: Path) -> None:
    """The checks themselves, for somebody without rights: not even the libraries of a command may be theirs to read."""
    code = (
        "import os, sys; sys.argv[0] = 'qclip'\n"
        "from pathlib import Path\n"
        "from qclip import errors, files\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "out = Path(sys.argv[1]) / 'out'\n"
        "below = lambda p: files.check_file(p / 'y')\n"
        "for check in (files.check_file, lambda p: files.check_folder(p, ('x',)), below):\n"
        "    try: check(out)\n"
        "    except errors.InputError as error: assert 'cannot be written: Permission denied' in str(error), error\n"
        "    else: sys.exit('written')\n"
        "try: files.write_atomic(out, b'x')\n"
        "except errors.OutputError as error: assert 'could not be written: Permission denied' in str(error), error\n"
        "else: sys.exit('written')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(unwritable)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(unwritable.iterdir()) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", LINES)
def test_a_full_disk_is_seen_before_the_work(
    command: str, full_disk: Path, no_work: None, capsys: pytest.CaptureFixture
) -> None:
    with open(full_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(4096))
    err = refused([*LINES[command], "--output", str(full_disk / "out")], capsys)
    assert "No space left on device" in err and [p.name for p in full_disk.iterdir()] == ["filler"]


def limit(size: int) -> None:
    """No file of this process grows beyond `size` bytes: what a full disk does, in any folder and for any user."""
    sys.dont_write_bytecode = True  # Python would leave cut modules behind, for everybody
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("command", "before"),
    [(c, "nothing") for c in ("quantize", "evaluate", "spectrum")] + [(c, "earlier") for c in ("quantize", "report")],
)
def test_a_disk_that_fills_up_harms_nothing_that_was_there(
    command: str, before: str, tiny_model: str, folder: Path
) -> None:
    line = {
        "quantize": ["quantize", tiny_model],
        "evaluate": ["evaluate", tiny_model, "--data", "scenes:test?samples=20", "--no-cache", "--no-spectrum"],
        "spectrum": ["spectrum", tiny_model],
        "report": ["report", "results.json"],
    }[command]
    line += ["--output", "out", "--force"]
    if before == "earlier":
        assert processes.run(line, folder)[0] == 0
    there = tree(folder)
    code, out, err = processes.run(line, folder, limit, 4096)
    told = [text for text in err.splitlines() if text.startswith("qclip: ")]
    assert code == 1 and out == "" and "Traceback" not in err, err
    assert len(told) == 1
    assert "'out' could not be written: File too large; what was there before is unchanged" in told[0]
    assert tree(folder) == there
