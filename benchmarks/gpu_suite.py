"""All that a GPU has to say about the kernels, in one command of under nine minutes:

    python benchmarks/gpu_suite.py --out DIR

It builds the extensions, checks every op of every GPU backend against float64, times ops and whole towers beside their
rivals, runs compute-sanitizer where that works, and prints a table last. DIR then holds `parts.jsonl` (a line a part,
written as soon as it ends), `results.json` (the same with hardware, versions and commit) and `table.txt`.

The same command again goes on where a killed run stopped; results of other sources do not count. `--again`
repeats the parts that failed, `--only TEXT` runs the parts whose name contains it. It needs torch and triton, not an
installed qclip. Without a GPU it says so and ends with 2; `--dry-run` then runs the same code at tiny sizes on the CPU,
with `TRITON_INTERPRET=1` on the Triton kernels. Exit status 1: something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # a script has its own folder there
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu import table  # noqa: E402
from benchmarks.gpu.machine import Machine, source_hash  # noqa: E402
from benchmarks.gpu.parts import Part, SkipError, parts, sanitized  # noqa: E402


def work(part: Part, machine: Machine) -> dict[str, Any]:
    """Run a part in this process: what it found, also where it then failed."""
    began, rows = time.monotonic(), []
    outcome: dict[str, Any] = {"part": part.name, "state": "done"}
    try:
        for row in part.run(machine):
            rows.append(row)
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


class Suite:
    def __init__(self, out: Path, dry: bool, minutes: float) -> None:
        self.out, self.dry, self.deadline = out, dry, time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.log, self.key = out / "parts.jsonl", source_hash() + (" dry" if dry else "")

    def found(self) -> table.Parts:
        """Parts that earlier runs of the same sources finished; the latest of each name."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return {entry["part"]: entry for line in lines if (entry := _entry(line)) and entry.get("key") == self.key}

    def note(self, entry: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(entry | {"key": self.key}) + "\n")

    def start(self, part: Part) -> Started:
        command = [sys.executable, __file__, "--out", str(self.out), "--part", part.name, *["--dry-run"] * self.dry]
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        said = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, text=True)
        return Started(part, process, said, time.monotonic())

    def finish(self, started: Started) -> None:
        """Wait for a part; what it did not write itself is written here: that it died, or was too slow."""
        part, process = started.part, started.process
        limit = max(1.0, min(started.began + part.limit, self.deadline) - time.monotonic())
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if time.monotonic() < self.deadline:  # else the next run may give it more
                self.note({"part": part.name, "state": "failed", "why": f"stopped after {part.limit} s"})
            return
        if process.returncode:
            started.said.seek(0)
            last = started.said.read().strip().splitlines()[-1:] or ["it said nothing"]
            self.note({"part": part.name, "state": "failed", "why": f"died with {process.returncode}: {last[0][:500]}"})

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
            for started in [self.start(part) for part in together]:
                self.finish(started)
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
    suite = Suite(options.out, options.dry_run, options.minutes)
    everything = parts()
    if options.part:
        suite.note(work(next(p for p in everything if p.name == options.part), machine))
        return 0
    done = suite.found()
    wanted = [p for p in everything if options.only in p.name]
    suite.run([p for p in wanted if p.name not in done or (options.again and done[p.name]["state"] == "failed")])
    found, facts = suite.found(), machine.facts()
    text = table.render(facts, found, [p.name for p in wanted])
    (options.out / "results.json").write_text(json.dumps({"facts": facts, "parts": found}, indent=1))
    (options.out / "table.txt").write_text(text + "\n")
    print(text)
    return 0 if table.succeeded(found) else 1


if __name__ == "__main__":
    sys.exit(main())
