"""All that a GPU has to say about the kernels, in one command of under nine minutes:

    python benchmarks/gpu_suite.py --out DIR

It builds the extensions, checks every op of every GPU backend against float64, times ops and whole towers beside their
rivals, runs compute-sanitizer where that works, and prints a table last. DIR then holds `parts.jsonl` (a line per part,
written as soon as it ends, and what it found so far every few seconds), `results.json` (the same with hardware,
versions and commit) and `table.txt`.

The same command again goes on where a killed run stopped; results of other sources do not count. `--again`
repeats the parts that failed, `--only TEXT` runs the parts whose name contains it. It needs torch and triton, not an
installed qclip. Without a GPU it says so and ends with 2; `--dry-run` then runs the same code at tiny sizes on the CPU,
with `TRITON_INTERPRET=1` on the Triton kernels. Exit status 1: something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # a script has its own folder there
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu import table  # noqa: E402
from benchmarks.gpu.machine import Machine, source_hash  # noqa: E402
from benchmarks.gpu.parts import Part, SkipError, parts, sanitized  # noqa: E402

KEEP = 5.0  # seconds between two notes of what a part found so far


def work(part: Part, machine: Machine, keep: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run a part in this process: what it found, also where it then failed. `keep` is given what there is so far, as a
    part with the state "unfinished", for the case that the part is killed."""
    began, rows = time.monotonic(), []
    outcome: dict[str, Any] = {"part": part.name, "state": "done"}
    kept = began
    try:
        for row in part.run(machine):
            rows.append(row)
            if keep is not None and time.monotonic() - kept >= KEEP:
                kept = time.monotonic()
                keep({"part": part.name, "state": "unfinished", "seconds": kept - began, "rows": rows})
    except SkipError as reason:
        outcome |= {"state": "skipped", "why": str(reason)}
    except Exception as error:
        outcome |= {"state": "failed", "why": f"{type(error).__name__}: {str(error)[:1000]}"}
    return outcome | {"seconds": time.monotonic() - began, "rows": rows}


@dataclass(frozen=True)
class Started:
    part: Part
    process: subprocess.Popen
    said: IO[str]  # what it writes to stderr: a pipe would fill up while other parts are waited for
    began: float

    def kill(self) -> None:
        """With all that it started: compilers, the sanitizer."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Suite:
    """Raises OSError where nothing can be written to `out`."""

    def __init__(self, out: Path, dry: bool, minutes: float) -> None:
        self.out, self.dry, self.deadline = out, dry, time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.log, self.key = out / "parts.jsonl", source_hash() + (" dry" if dry else "")
        self.log.open("ab").close()
        self.unwritten: table.Parts = {}

    def found(self) -> table.Parts:
        """Parts that runs of the same sources finished; the latest of each name."""
        entries = [entry for line in self.log.read_text().splitlines() if (entry := _entry(line))]
        return {entry["part"]: entry for entry in entries if entry.get("key") == self.key} | self.unwritten

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line, in one piece, because several processes write; where the disk is full it is only remembered."""
        before = self.log.read_bytes()
        torn = before != b"" and not before.endswith(b"\n")  # the run before was killed while it wrote
        line = "\n" * torn + json.dumps(entry | {"key": self.key}) + "\n"
        try:
            with self.log.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            self.unwritten[entry["part"]] = entry
            print(f"gpu_suite: {entry['part']} could not be written to {self.log}: {error}", file=sys.stderr)

    def write(self, name: str, text: str) -> None:
        try:
            (self.out / name).write_text(text)
        except OSError as error:
            self.unwritten[name] = {}
            print(f"gpu_suite: {name} could not be written to {self.out}: {error}", file=sys.stderr)

    def command(self, part: Part) -> list[str]:
        return [sys.executable, __file__, "--out", str(self.out), "--part", part.name, *["--dry-run"] * self.dry]

    def start(self, part: Part) -> Started:
        said = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            self.command(part), stdout=subprocess.DEVNULL, stderr=said, text=True, start_new_session=True
        )
        return Started(part, process, said, time.monotonic())

    def finish(self, started: Started) -> None:
        """Wait for a part; what it did not write itself is written here: that it died, or was too slow."""
        part, process = started.part, started.process
        limit = max(1.0, min(started.began + part.limit, self.deadline) - time.monotonic())
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            started.kill()
            if time.monotonic() < self.deadline:  # else the next run may give it more
                self.fail(part, f"stopped after {part.limit} s")
            return
        if process.returncode:
            started.said.seek(0)
            last = started.said.read().strip().splitlines()[-1:] or ["it said nothing"]
            self.fail(part, f"died with {process.returncode}: {last[0][:500]}")

    def fail(self, part: Part, why: str) -> None:
        """Its rows up to there stay."""
        self.note(self.found().get(part.name, {}) | {"part": part.name, "state": "failed", "why": why})

    def run(self, chosen: list[Part]) -> None:
        most = max(1, min(8, (os.cpu_count() or 1) // 2))
        while chosen and time.monotonic() < self.deadline - 10:
            together = [chosen[0]]
            while (
                len(together) < min(most, len(chosen))
                and chosen[0].together
                and (chosen[len(together)].together == chosen[0].together)
            ):
                together.append(chosen[len(together)])
            running: list[Started] = []
            try:
                for part in together:
                    running.append(self.start(part))
                    print(f"{part.name} ...", file=sys.stderr, flush=True)
                for started in running:
                    self.finish(started)
            finally:  # where this run is stopped, so are its parts
                for started in running:
                    started.kill()
            chosen = chosen[len(together) :]


def _entry(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the run was killed while it wrote
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop; the next run goes on (default 8.5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only parts whose name contains TEXT")
    parser.add_argument("--again", action="store_true", help="repeat the parts that failed")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a process of the suite
    parser.add_argument("--sanitized", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print(
            "gpu_suite: torch sees no NVIDIA GPU here, so nothing was run; --dry-run runs the same code on the CPU",
            file=sys.stderr,
        )
        return 2
    machine = Machine(options.dry_run)
    if options.sanitized:
        return sanitized(machine, options.sanitized)
    if options.out is None:
        parser.error("--out DIR is needed")
    try:
        suite = Suite(options.out, options.dry_run, options.minutes)
    except OSError as error:
        print(f"gpu_suite: nothing can be written to --out {options.out}: {error}", file=sys.stderr)
        return 2
    everything = parts()
    if options.part:
        suite.note(work(next(p for p in everything if p.name == options.part), machine, suite.note))
        return 1 if suite.unwritten else 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that parts are stopped too
    done = {name: part for name, part in suite.found().items() if part["state"] != "unfinished"}
    wanted = [p for p in everything if options.only in p.name]
    suite.run([p for p in wanted if p.name not in done or (options.again and done[p.name]["state"] == "failed")])
    found, facts = suite.found(), machine.facts()
    text = table.render(facts, found, [p.name for p in wanted])
    suite.write("results.json", json.dumps({"facts": facts, "parts": found}, indent=1))
    suite.write("table.txt", text + "\n")
    print(text)
    return 0 if table.succeeded(found) and not suite.unwritten else 1


if __name__ == "__main__":
    sys.exit(main())
