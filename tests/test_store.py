"""A store saves time and nothing else: whatever happens to its folder, a caller gets right numbers or None."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from qclip.store import Entry, Store, StoreWarning, _checksum, key_of

KEY = key_of("tested", 1, a=1)
ARRAYS = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), "i": np.arange(5)[::2]}
FACTS = {"seconds": 0.1, "unreadable": [[3, "why"]]}


def test_arrays_come_back_bit_for_bit(tmp_path) -> None:
    store = Store(tmp_path)
    assert store.open(KEY) is None and not store.has(KEY)
    assert store.write(KEY, Entry(ARRAYS, FACTS)) and store.has(KEY)
    found = store.open(KEY)
    assert found.facts == FACTS and set(found.arrays) == {"x", "i"}
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype and (found.arrays[name] == array).all()
    assert store.fill(KEY, lambda: pytest.fail("it is there")).facts == FACTS


def test_a_key_depends_on_the_stage_its_version_and_every_part() -> None:
    keys = {key_of("a", 1, x=1), key_of("b", 1, x=1), key_of("a", 2, x=1), key_of("a", 1, x=2), key_of("a", 1, y=1)}
    assert len(keys) == 5 and key_of("a", 1, x=1, y=2) == key_of("a", 1, y=2, x=1)


def test_what_the_caller_finds_wrong_is_computed_again(tmp_path) -> None:
    store = Store(tmp_path)
    store.write(KEY, Entry({"x": np.zeros(3)}))
    with pytest.warns(StoreWarning, match="is not what was stored: too short; it is computed again"):
        entry = store.fill(KEY, lambda: Entry(ARRAYS), lambda e: "too short" if len(e.arrays["x"]) < 9 else "")
    assert entry.arrays is ARRAYS and (Store(tmp_path).open(KEY).arrays["x"] == ARRAYS["x"]).all()


@pytest.fixture
def told():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield lambda: [str(each.message) for each in found]


@pytest.mark.parametrize("kind", ["folder", "full folder", "pipe", "dangling link"])
def test_an_entry_that_is_no_file_is_left_alone_and_said_once(tmp_path, told, kind: str) -> None:
    store = Store(tmp_path)
    path = store.path(KEY)
    path.parent.mkdir()
    if kind.endswith("folder"):
        path.mkdir()
        if kind.startswith("full"):
            (path / "mine").write_text("kept")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "gone" / "away")
    for _ in range(2):
        assert store.fill(KEY, lambda: Entry(ARRAYS)).arrays is ARRAYS
    assert len(told()) == 1 and "is no file and is left alone" in told()[0]
    other = key_of("tested", 1, a=2)
    assert store.write(other, Entry(ARRAYS)) and store.has(other)  # the rest of the folder goes on working


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG]
)
def test_a_folder_that_takes_nothing_is_said_once_and_not_tried_again(tmp_path, told, monkeypatch, number: int) -> None:
    tried = []

    def refuse(*_) -> None:
        tried.append(1)
        raise OSError(number, os.strerror(number))

    store = Store(tmp_path)
    monkeypatch.setattr("qclip.files.os.replace", refuse)
    for k in range(3):
        assert store.fill(key_of("tested", 1, a=k), lambda: Entry(ARRAYS)).arrays is ARRAYS
    assert len(tried) == 1 and len(told()) == 1
    assert "nothing more is kept in" in told()[0] and os.strerror(number) in told()[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_is_said_once(tmp_path, told, monkeypatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    real = open

    def full(file, *rest, **options):
        return real("/dev/full", "wb") if isinstance(file, int) else real(file, *rest, **options)

    store = Store(tmp_path)
    monkeypatch.setattr("builtins.open", full)
    for k in range(2):
        assert not store.write(key_of("tested", 1, a=k), Entry(ARRAYS))
    assert len(told()) == 1 and os.strerror(errno.ENOSPC) in told()[0]


def test_an_entry_that_cannot_be_read_is_computed(tmp_path, told, monkeypatch) -> None:
    store = Store(tmp_path)
    store.write(KEY, Entry(ARRAYS))
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Denied")))
    for _ in range(2):
        assert store.fill(KEY, lambda: Entry(ARRAYS, FACTS)).facts == FACTS
    assert len(told()) == 1 and "cannot be read (Denied)" in told()[0]


def _foreign(path: Path, tensor: dict, facts: str, content: bytes) -> None:
    """An entry as another program would write it: under the right name, and with a right checksum where it has one."""
    metadata = {"key": KEY, "facts": facts, "sha256": _checksum({"x": np.zeros(2, np.uint8)}, facts)}
    header = json.dumps({"__metadata__": metadata, "x": tensor}).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)


@pytest.mark.parametrize("entries", [1, 3, 9])
@pytest.mark.parametrize("kind", ["cut", "foreign", "folder", "unreadable"])
def test_entries_with_a_fault_are_counted_and_named_at_the_end(
    tmp_path, told, monkeypatch, kind: str, entries: int
) -> None:
    keys = [key_of("tested", 1, a=k) for k in range(entries)]
    store = Store(tmp_path)
    for key in keys:
        path = store.path(key)
        store.write(key, Entry(ARRAYS))
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-7])
        elif kind == "foreign":
            other = key_of("tested", 1, b=1)
            store.write(other, Entry(ARRAYS))
            path.write_bytes(store.path(other).read_bytes())
        elif kind == "folder":
            path.unlink()
            path.mkdir()
    if kind == "unreadable":
        refuse = lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Denied"))  # noqa: E731
        monkeypatch.setattr("safetensors.safe_open", refuse)
    for key in [*keys, keys[0]]:
        assert store.open(key) is None
    assert len(told()) == 1 and keys[0] in told()[0]
    store.tell_of_the_others()
    if entries == 1:
        assert len(told()) == 1
        return
    assert len(told()) == 2 and told()[1].startswith(f"{entries} entries of {tmp_path} ")
    assert {"folder": "left alone", "unreadable": "cannot be read"}.get(kind, "computed again") in told()[1]
    assert [key for key in keys if key in told()[1]] == keys[:5] and ("..." in told()[1]) == (entries > 5)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"])
def test_an_entry_of_a_dtype_that_numpy_lacks_is_computed_again(tmp_path, told, dtype: str) -> None:
    store = Store(tmp_path)
    size = {"BF16": 8, "C64": 32, "F4": 2}.get(dtype, 4)
    _foreign(store.path(KEY), {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}, "{}", bytes(size))
    assert store.fill(KEY, lambda: Entry(ARRAYS)).arrays is ARRAYS
    assert len(told()) == 1 and "it is computed again" in told()[0] and Store(tmp_path).open(KEY) is not None


@pytest.mark.parametrize("facts", ["[" * 10**5 + "]" * 10**5, '{"a": ' + "9" * 5000 + "}", "[1]", "", "{", "NaN"])
def test_facts_that_are_none_are_computed_again_though_their_checksum_is_right(tmp_path, told, facts: str) -> None:
    store = Store(tmp_path)
    _foreign(store.path(KEY), {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, facts, bytes(2))
    assert store.fill(KEY, lambda: Entry(ARRAYS)).arrays is ARRAYS
    assert len(told()) == 1 and "it is computed again" in told()[0]


def test_an_entry_larger_than_memory_is_computed_again(tmp_path, told) -> None:
    store, size = Store(tmp_path), 2**42
    _foreign(store.path(KEY), {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}, "{}", b"")
    try:
        os.truncate(store.path(KEY), store.path(KEY).stat().st_size + size)  # sparse: takes no room
    except OSError:
        pytest.skip("needs a file system that holds sparse files of 4 TiB")
    assert store.fill(KEY, lambda: Entry(ARRAYS)).arrays is ARRAYS
    assert len(told()) == 1 and "it is computed again" in told()[0]


def test_without_a_home_nothing_is_kept_and_that_is_said(told, monkeypatch) -> None:
    monkeypatch.setattr("qclip.store.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    store = Store.of(None, "tested")
    assert store.folder is None and not store.write(KEY, Entry(ARRAYS)) and store.open(KEY) is None
    assert len(told()) == 1 and "no home" in told()[0]
    assert Store.of(False, "tested").folder is None and len(told()) == 1


WRITER = """
import sys, numpy as np
from pathlib import Path
from qclip.store import Entry, Store, key_of
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for k in range(60):
    key = key_of("tested", 1, a=k % 3)
    entry = Entry({"x": np.full((2000,), k % 3, np.float32)}, {"by": sys.argv[2]})
    assert store.write(key, entry)
    found = store.open(key)
    assert found is not None and (found.arrays["x"] == k % 3).all() and found.facts["by"] in ("one", "two")
"""


def test_two_processes_write_and_read_the_same_keys(tmp_path) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in ("one", "two")]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # both are in their loops at the same time
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, complaint = writer.communicate()
        assert writer.returncode == 0, complaint
    assert [path.suffix for path in Path(tmp_path).rglob("*") if path.is_file()] == [".safetensors"] * 3


CLAIM = """
import sys
from pathlib import Path
from qclip.store import Store
with Store(Path(sys.argv[1])).claimed([sys.argv[2]], wait=False) as mine:
    print(*mine, flush=True)
    sys.stdin.read()
"""


def test_what_another_process_computes_is_left_to_it_until_it_ends(tmp_path) -> None:
    store, other = Store(tmp_path / "made with it"), key_of("tested", 1, a=2)
    command = [sys.executable, "-c", CLAIM, store.folder, KEY]
    elsewhere = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        elsewhere.kill()  # what it holds it loses

    try:
        assert elsewhere.stdout.readline().split() == [KEY]
        with store.claimed([KEY, other], wait=False) as mine:
            assert mine == {other}
        threading.Timer(0.3, kill).start()
        with store.claimed([KEY, other], wait=True) as mine:
            assert mine == {KEY, other} and killed.is_set()
            # for others it is this process's now
            assert subprocess.run(command, input="", capture_output=True, text=True, check=True).stdout.split() == []
    finally:
        elsewhere.kill()
        elsewhere.wait()
    assert subprocess.run(command, input="", capture_output=True, text=True, check=True).stdout.split() == [KEY]
    assert [path.name for path in store.folder.iterdir()] == ["claims"]


def test_nobody_waits_where_nothing_can_be_locked(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no folder can be here")
    for folder in (None, tmp_path / "file" / "folder"):
        with Store(folder).claimed([KEY], wait=True) as mine:
            assert mine == {KEY}

    for code in (errno.ENOLCK, errno.EACCES):  # the latter means without `wait` that another process has it

        def refused(*_: object, code: int = code) -> None:
            raise OSError(code, "no locks")

        monkeypatch.setattr("qclip.store.fcntl.lockf", refused)
        with Store(tmp_path).claimed([KEY], wait=True) as mine:
            assert mine == {KEY}
    with Store(tmp_path).claimed([KEY], wait=False) as mine:
        assert mine == set()


def test_who_keeps_nothing_claims_nothing(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("qclip.store.write_atomic", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "")))
        with pytest.warns(StoreWarning, match="nothing more is kept"):
            store.write(KEY, Entry(ARRAYS))
    with store.claimed([KEY], wait=True) as mine:
        assert mine == {KEY} and not store.keeps and not any(tmp_path.iterdir())


def test_two_that_wait_never_wait_for_each_other(tmp_path, monkeypatch) -> None:
    """Whatever the order in which they ask, they take what they need in one order."""
    taken, keys = [], [key_of("tested", 1, a=number) for number in range(9)]
    monkeypatch.setattr("qclip.store.fcntl.lockf", lambda _, how, length, start: taken.append(start))
    for each in (keys, keys[::-1]):
        with Store(tmp_path).claimed(each, wait=True) as mine:
            assert mine == set(keys)
    assert taken[:9] == taken[9:] == sorted(set(taken))
