"""Files are whole or not there: outputs are checked before the work, replaced at once, and leftovers are removed."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qclip import files
from qclip.errors import InputError, OutputError, OutputExistsError

NAMES = ("results.json", "report.html")
HOLDER = """
import sys
sys.argv[0] = "qclip"
from pathlib import Path
from qclip import files
with files._part(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as (part, _):
    print(part.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def special(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Things that are neither a regular file nor a folder, and links to them."""
    os.mkfifo(tmp_path / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # the address of a socket is short
    listening.bind("socket")
    os.chdir(here)
    (tmp_path / "to-null").symlink_to("/dev/null")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "to-nothing").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    yield {name: tmp_path / name for name in ("fifo", "socket", "to-null", "to-fifo", "to-nothing", "loop")} | {
        "null": Path("/dev/null"),
        "full": Path("/dev/full"),
    }
    listening.close()


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {e.name: (e.lstat().st_ino, os.readlink(e) if e.is_symlink() else "") for e in folder.iterdir()}


def test_what_is_no_file_is_refused_and_stays(special: dict[str, Path], tmp_path: Path) -> None:
    before = state(tmp_path)
    for path in special.values():
        for force in (False, True):
            with pytest.raises(InputError):
                files.check_file(path, force)
            with pytest.raises(InputError):
                files.check_folder(path, NAMES, force)
        if path.name not in ("to-nothing", "loop"):
            with pytest.raises(OutputError, match="never replaced"):
                files.write_atomic(path, b"x")
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "empty name"),
        ("a\nb", "control character"),
        ("a\x1b[2J", "control character"),
        ("n" * 256, "too long"),
        ("new/" + "n" * 256, "too long"),
        ("m/" * 2100, "too long"),
        ("file/below", "Not a directory"),
        ("/proc/qclip", "cannot be written"),
        ("/sys/qclip", "cannot be written"),
        ("/proc/self/qclip/deep", "cannot be written"),
    ],
)
def test_a_place_where_nothing_can_be_is_refused(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    for check in (lambda: files.check_file(name, True), lambda: files.check_folder(name, NAMES, True)):
        with pytest.raises(InputError, match=says):
            check()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write"])
def test_a_place_that_takes_nothing_is_refused(
    code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    for check in (lambda: files.check_file(tmp_path / "x"), lambda: files.check_folder(tmp_path / "x", NAMES)):
        with pytest.raises(InputError, match=os.strerror(code)):
            check()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_checks_pass_where_it_can_be_written_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-file").symlink_to("file")
    (tmp_path / "to-empty").symlink_to("empty")
    before = state(tmp_path)
    files.check_file(tmp_path / "new" / "deep.html")
    files.check_file(tmp_path / ("n" * 255))
    files.check_file(tmp_path / "to-file", force=True)
    files.check_folder(tmp_path / "new", NAMES)
    files.check_folder(tmp_path / "to-empty", NAMES)
    files.check_folder(tmp_path / "empty", NAMES, alone=True)
    assert state(tmp_path) == before and not list((tmp_path / "empty").iterdir())


def test_what_is_there_needs_force(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("")
    for check in (
        lambda force: files.check_file(tmp_path / "file", force),
        lambda force: files.check_folder(tmp_path / "out", NAMES, force),
        lambda force: files.check_folder(tmp_path / "out", NAMES, force, alone=True),
    ):
        with pytest.raises(OutputExistsError, match="force=True"):
            check(False)
        check(True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    files.check_folder(tmp_path / "out", NAMES, True)
    with pytest.raises(OutputExistsError, match=r"notes\.txt"):
        files.check_folder(tmp_path / "out", NAMES, True, alone=True)
    (tmp_path / "out" / "report.html").symlink_to("notes.txt")
    with pytest.raises(InputError, match=r"report\.html' is a link, which is never replaced"):
        files.check_folder(tmp_path / "out", NAMES, True)


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "folder").symlink_to("there")
    files.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"
    with files.whole_folder(tmp_path / "folder", last="b") as part:
        (part / "b").write_text("b")
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "there" / "b").read_text() == "b"
    with files.whole_folder(tmp_path / "folder", last="b", alone=True) as part:
        (part / "b").write_text("c")
    assert (tmp_path / "folder").is_symlink() and state(tmp_path / "there").keys() == {"b"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ("n" * 255)
    files.write_atomic(path, b"old")
    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "disk went away")))
            with pytest.raises(OutputError, match="disk went away; what was there before is unchanged"):
                files.write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_a_folder_that_fails_leaves_what_was_there(
    error: BaseException, alone: bool, before: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if before != "nothing":
        out.mkdir()
    if before == "old":
        (out / "results.json").write_text("old")
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), files.whole_folder(out, last="report.html", alone=alone) as part:
        (part / "results.json").write_text("half")
        raise error
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == {
        "nothing": [],
        "empty": ["out"],
        "old": ["out", "out/results.json"],
    }[before]
    assert before != "old" or (out / "results.json").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_folders_join_or_replace(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for alone, expected in ((False, {"a": "2", "b": "2", "mine": "1"}), (True, {"a": "2", "b": "2"})):
        out = tmp_path / "deep" / str(alone)
        with files.whole_folder(out, last="b", alone=alone) as part:
            (part / "a").write_text("1")
        (out / "mine").write_text("1")
        with files.whole_folder(out, last="b", alone=alone) as part:
            for name in "ab":
                (part / name).write_text("2")
        assert {p.name: p.read_text() for p in out.iterdir()} == expected
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"False", "True"}


def test_the_last_file_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    (tmp_path / "out").mkdir()
    with files.whole_folder(tmp_path / "out", last="b", alone=True) as part:
        for name in "cba":
            (part / name).write_text("")
    assert moved == ["a", "c", "b"]


def test_modes_are_those_of_the_user(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "file", b"")
        with files.whole_folder(tmp_path / "folder", last="x"):
            pass
    finally:
        os.umask(mask)
    assert [oct((tmp_path / n).stat().st_mode & 0o777) for n in ("file", "folder")] == ["0o640", "0o750"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_the_dead_are_removed_and_parts_of_the_living_stay(kind: str, tmp_path: Path) -> None:
    def hold() -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), kind]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, tmp_path / process.stdout.readline().strip()

    (process, part), (killed, leftover) = hold(), hold()
    killed.kill()
    killed.wait()
    strangers = [".qclip-1234567.part", ".qclip-12345678.part.txt", "qclip-12345678.part", ".qclip-1234567g.part"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".qclip-00000000.part").symlink_to(tmp_path / strangers[0])
    assert part.exists() and leftover.exists()
    files.check_file(tmp_path / "x")
    assert part.exists() and not leftover.exists()
    assert all((tmp_path / name).exists() for name in [*strangers, ".qclip-00000000.part"])
    process.communicate("")
    assert process.returncode == 0 and not part.exists()


def test_a_part_taken_for_a_leftover_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, seen = files.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not seen:
            seen.extend(tmp_path.iterdir())
            monkeypatch.setattr(files.fcntl, "flock", lock)
            files.remove_leftovers(tmp_path)
        lock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    files.write_atomic(tmp_path / "file", b"whole")
    assert len(seen) == 1 and list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_without_locks_it_is_written_and_nothing_is_taken_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".qclip-00000000.part").write_text("perhaps somebody's")
    files.write_atomic(tmp_path / "file", b"x")
    assert (tmp_path / "file").exists() and (tmp_path / ".qclip-00000000.part").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no"),
        (b"", "is empty"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b"x" * (1 << 20) + b"x", "larger than"),
    ],
)
def test_text_that_is_none_is_refused(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        files.read_text(tmp_path / "x.txt", "templates file", limit=1 << 20)
    assert "templates file" in str(caught.value) and "x.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_that_blocks_or_never_ends_is_read(special: dict[str, Path], tmp_path: Path) -> None:
    names = ["/dev/zero", "/proc/kmsg", "/proc/self/mem", "/proc/self/environ", str(tmp_path), "a\0b", "n" * 300]
    for path in [*special.values(), *names]:
        with pytest.raises(InputError):
            files.read_text(path, "templates file")


ROOT = Path(__file__).resolve().parents[1]
WRITES = re.compile(
    r"\.write_(?:text|bytes)\(|\bopen\([^)]*[\"'][wxa]b?\+?[\"']|torch\.save\(|save_file\(|np\.save|os\.replace|\.rename\("
)
# File and a part of the line -> why it writes in place.
IN_PLACE = {
    ("qclip/zoo.py", "part / "): "into a part of `whole_folder`",
    ("qclip/artifact.py", "fresh / "): "into a part of `whole_folder`",
    ("qclip/reporting/exports/__init__.py", "part / "): "into a part of `whole_folder`",
    ("benchmarks/study_scale.py", "file.write_text("): "into a temporary folder",
    ("qclip/study/packing.py", "tarfile.open(fileobj=out"): "into memory",
    ("qclip/study/packing.py", "fresh / "): "into a part of `whole_folder`",
    ("benchmarks/study_report.py", "file.write_text("): "into a temporary folder",
    ("benchmarks/study_report.py", "(made / "): "into a temporary folder",
    ("benchmarks/study_speed.py", "plan.write_text("): "into a temporary folder",
    ("benchmarks/study_report.py", "outer.write_text("): "into a temporary folder",
    ("qclip/study/page.py", "part / "): "into a part of `whole_folder`",
    ("qclip/models/tokenizer.py", "target / SETTINGS"): "into a temporary folder",
    ("qclip/cli/process.py", "open(number"): "a standard stream",
    ("qclip/bench/seat.py", "torch.save("): "into a temporary folder",
    ("qclip/bench/seat.py", '"log", "wb"'): "into a temporary folder, while a peer runs",
    ("dev/compare_commits.py", "out.write_text("): "runs on checkouts that may have no `qclip.files`; a temporary file",
    ("dev/train_scenes.py", "torch.save(state, content)"): "into memory",
    ("dev/train_photos.py", "torch.save(state, content)"): "into memory",
    ("qclip/training/checkpoint.py", "safetensors.torch.save("): "into memory, for `write_atomic`",
    ("qclip/variants.py", "safetensors.torch.save("): "into memory",
    ("qclip/variants.py", "fresh / "): "into a part of `whole_folder`",
    ("benchmarks/exactness.py", "torch.save(found, args.to)"): "into a temporary folder",
    ("benchmarks/gpu_suite.py", "self.log.open("): "lines are added, each in one piece; needs no installed qclip",
    (
        "benchmarks/gpu_suite.py",
        "(self.out / name).write_text(text)",
    ): "made again by every run; needs no installed qclip",
}


def test_files_are_written_in_one_place() -> None:
    used = set()
    for path in (p for folder in ("qclip", "dev", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))):
        name = path.relative_to(ROOT).as_posix()
        for line in path.read_text().splitlines() if name != "qclip/files.py" else ():
            if WRITES.search(line):
                reasons = [key for key in IN_PLACE if key[0] == name and key[1] in line]
                assert reasons, f"{name}: {line.strip()!r} can leave half a file; use qclip/files.py"
                used.update(reasons)
    assert used == set(IN_PLACE), "these lines are gone; take them out of IN_PLACE"
