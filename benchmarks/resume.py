"""What disturbs an evaluation and must not change what it says: `kill -9` at random moments, two evaluations at once on
one store, a disk that is full.

    python -m benchmarks.resume [--kills 10] [--images 1200] [--json FILE]

Every run is a process of its own, forked from one that has imported everything, so that a kill falls into the work and
not into imports. Moments are drawn by `--seed` over the time that an undisturbed run takes; after each the same call
runs again on the store that the killed one left. Equal means: every row, curve and note but for times. Exit 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qclip
from qclip.files import write_atomic
from qclip.machine import environment
from qclip.reliability import evaluate
from qclip.results import Results

MODEL, RECIPE = "scenes-clean", "w8a8"
BATCH = 64
ROOM = 200_000  # bytes of the full disk, or of its largest file where none can be mounted
NO_ROOM = "the full disk of this machine is a limit on the size of files: nothing can be mounted here"


def run(images: int, shard: int, store: Path, out: Path) -> None:
    """One evaluation of a float and a quantized model: clean images, noise, and detection of others."""
    import qclip.reliability.embed as embed

    embed.SHARD = shard  # more entries to lose than 1,024 images each would make
    model = qclip.load_model(MODEL)
    found = evaluate(
        {"float": model, RECIPE: qclip.quantize(model, RECIPE)},
        f"scenes:test?samples={images}",
        ood=f"scenes:far-ood?samples={images // 2}",
        batch=BATCH,
        cache=store,
        corruptions=(),
        measurements=("clean", "ood", "agreement", "neighbours"),
    )
    found.to_json(out)


def start(work: Callable[[], None], log: Path) -> int:
    """The process number of a fork that does the work; exit code 0, or 1 after an exception. Warnings go to `log`."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
        told_by_store = [str(each.message) for each in told if "Store" in each.category.__name__]
        write_atomic(log, "\n".join(told_by_store).encode())
        code = 0
    except BaseException as why:
        print(f"{type(why).__name__}: {why}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def wait(number: int) -> int:
    """Exit code, minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def numbers(path: Path) -> list[Any]:
    """Everything that was measured but times."""
    found = Results.from_json(path)
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "host")} for row in found.rows]
    rows = [row for row in rows if row["metric"] != "seconds" and not row["metric"].startswith("ms_")]
    return [*rows, *json.loads(path.read_text())["curves"], *found.notes]


def entries(store: Path) -> int:
    return len(list(store.rglob("*.safetensors")))


@contextmanager
def full_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """`folder` has room for `ROOM` bytes; what a process must call before it writes there."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    target = os.fsencode(folder)
    if libc.mount(b"tmpfs", target, b"tmpfs", 0, f"size={ROOM}".encode()) == 0:
        try:
            yield lambda: None
        finally:
            libc.umount(target)
        return
    print(NO_ROOM)

    def limit() -> None:
        sys.dont_write_bytecode = True  # Python would leave cut modules behind, for everybody
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))

    yield limit


class Trials:
    """Runs, and the table of what became of them."""

    def __init__(self, images: int, shard: int, folder: Path) -> None:
        self.images, self.shard, self.folder = images, shard, folder
        self.rows: list[dict[str, Any]] = []
        self.wanted: list[Any] = []

    def begin(self, store: Path, name: str, before: Callable[[], None] = lambda: None) -> int:
        def work() -> None:
            before()
            run(self.images, self.shard, store, self.folder / f"{name}.json")

        return start(work, self.folder / f"{name}.log")

    def ended(self, name: str, code: int, began: float, store: Path, **more: Any) -> None:
        """Add a row about a run that should have come to its end."""
        out, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        found = numbers(out) if code == 0 else []
        self.wanted = self.wanted or found
        row = {"run": name, "exit": code, "seconds": round(time.perf_counter() - began, 2), **more}
        row |= {"entries": entries(store), "warnings": len(log.read_text().splitlines()) if log.exists() else 0}
        row["equal"] = code == 0 and found == self.wanted
        row["leftovers"] = sum(path.is_file() and path.suffix != ".safetensors" for path in store.rglob("*"))
        self.rows.append(row)
        shown = "  ".join(f"{k} {v}" for k, v in row.items() if k != "run")
        print(f"{name:16} {shown}", flush=True)

    def alone(self, name: str, store: Path, before: Callable[[], None] = lambda: None, **more: Any) -> float:
        began = time.perf_counter()
        self.ended(name, wait(self.begin(store, name, before)), began, store, **more)
        return time.perf_counter() - began

    def killed(self, name: str, after: float) -> None:
        """Killed after so many seconds, then run again. One that came to its end before is taken earlier, from anew."""
        store, code = self.folder / f"store {name}", 0
        there = 0
        while code != -signal.SIGKILL:
            shutil.rmtree(store, ignore_errors=True)
            number = self.begin(store, name)
            time.sleep(after)
            os.kill(number, signal.SIGKILL)
            code, there = wait(number), entries(store)
            after *= 0.8 if code == 0 else 1
        began = time.perf_counter()
        code_again = wait(self.begin(store, name))
        killed = {"killed_after": round(after, 2), "killed": code == -signal.SIGKILL, "entries_left": there}
        self.ended(name, code_again, began, store, **killed)

    def two(self) -> None:
        store, began = self.folder / "store two", time.perf_counter()
        running = {name: self.begin(store, name) for name in ("two at once: a", "two at once: b")}
        for name, number in running.items():
            self.ended(name, wait(number), began, store)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--shard", type=int, default=128, help="Images in an entry of the store.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        trials = Trials(asked.images, asked.shard, folder)
        took = trials.alone("undisturbed", folder / "store")
        took = min(took, trials.alone("undisturbed too", folder / "another store"))
        trials.alone("stored", folder / "store")
        draw = random.Random(asked.seed)
        for k in range(asked.kills):
            trials.killed(f"killed {k + 1}", draw.uniform(0, took))
        trials.two()
        with full_disk(folder / "small") as limited:
            trials.alone("full disk", folder / "small", limited)
            trials.alone("full disk again", folder / "small", limited)
    killed = [row for row in trials.rows if "killed" in row]
    good = all(row["equal"] for row in trials.rows)
    lost = sum(row["leftovers"] for row in trials.rows)
    print(
        f"{sum(row['killed'] for row in killed)} of {len(killed)} runs were killed; {len(trials.rows)} came to their "
        f"end and say the same: {'yes' if good else 'NO'}; files left behind: {lost}"
    )
    if asked.json:
        facts = {"images": asked.images, "shard": asked.shard, "seed": asked.seed, "runs": trials.rows}
        write_atomic(asked.json, f"{json.dumps(facts | environment(), indent=1)}\n".encode())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
