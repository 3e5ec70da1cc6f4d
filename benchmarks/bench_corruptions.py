"""Images per second of every corruption at 224 x 224, and how long 1,000 images at all severities take.

    python -m benchmarks.bench_corruptions [--images 4] [--full] [--json FILE]

Each corruption runs at five severities on `--images` generated images, in as many threads as there are cores, as
`evaluate` corrupts them. "total" is what 1,000 images would take at this speed; `--full` corrupts all of them once.
Where the package `imagecorruptions` (with opencv, scikit-image and scipy) can be imported, it corrupts the same images
in one process per core: its functions hold the interpreter's lock and draw from numpy's global generator.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

from qclip.data.corruptions import OWN, SEVERITIES, apply
from qclip.data.workers import pool
from qclip.files import write_atomic
from qclip.machine import cpu_name
from tests.data.corruption_statistics import images

IMAGES = 1000
THEIRS = {"frost_gen": "frost"}
RENAMED = {
    "multichannel=True": "channel_axis=-1",
    "np.float_": "np.float64",
    "scipy.ndimage.interpolation": "scipy.ndimage",
}


def ours(job: tuple[str, int, int]) -> None:
    name, severity, number = job
    apply(images(224)[number % len(images(224))], name, severity, 0, number)


def theirs(job: tuple[str, int, int]) -> None:
    name, severity, number = job
    _rival()(images(224)[number % len(images(224))], severity=severity, corruption_name=THEIRS.get(name, name))


def _rival() -> Callable:
    """`imagecorruptions.corrupt`; what newer libraries have renamed is renamed in its text."""
    if "imagecorruptions" not in sys.modules:
        from importlib.util import find_spec

        spec = find_spec("imagecorruptions")
        if spec is None or spec.origin is None:
            raise ImportError("imagecorruptions is not installed")
        package = types.ModuleType("imagecorruptions")
        package.__path__ = list(spec.submodule_search_locations or [])
        text = (Path(spec.origin).parent / "corruptions.py").read_text()
        for old, new in RENAMED.items():
            text = text.replace(old, new)
        inner = types.ModuleType("imagecorruptions.corruptions")
        inner.__file__ = str(Path(spec.origin).parent / "corruptions.py")
        sys.modules |= {"imagecorruptions": package, "imagecorruptions.corruptions": inner}
        try:
            exec(compile(text, inner.__file__, "exec"), vars(inner))
            exec(compile(Path(spec.origin).read_text(), spec.origin, "exec"), vars(package))
        except ImportError:
            del sys.modules["imagecorruptions"]
            raise
    return sys.modules["imagecorruptions"].corrupt


def seconds(run: Callable[[list], object], name: str, count: int) -> float:
    """Wall seconds for `count` images at all severities."""
    run([(name, severity, 0) for severity in SEVERITIES])
    began = time.perf_counter()
    run([(name, severity, number) for severity in SEVERITIES for number in range(count)])
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    cores, count = os.cpu_count() or 1, asked.images
    out: dict = {"cpu": cpu_name(), "cores": cores, "images": count, "ours": {}, "imagecorruptions": {}}
    try:
        _rival()
    except ImportError as why:
        print(f"without imagecorruptions: {why}")
    rival = "imagecorruptions" in sys.modules
    processes = multiprocessing.get_context("fork").Pool(cores) if rival else None
    with pool(cores, "corrupt") as workers:
        print(f"{'corruption':20s} {'ours':>8s} {'theirs':>8s}  images/s on {cores} cores")
        for name in OWN:
            out["ours"][name] = seconds(lambda jobs: list(workers.map(ours, jobs)), name, count)
            if processes:
                run = lambda jobs: processes.map(theirs, jobs, chunksize=1)  # noqa: B023, E731
                out["imagecorruptions"][name] = seconds(run, name, count)
            done = count * len(SEVERITIES)
            rate = [done / found[name] for found in (out["ours"], out["imagecorruptions"]) if name in found]
            print(f"{name:20s} " + " ".join(f"{r:8.1f}" for r in rate), flush=True)
        for who in ("ours", "imagecorruptions"):
            if out[who]:
                out[f"total_{who}"] = sum(out[who].values()) * IMAGES / count
                print(f"total of {IMAGES} images x {len(OWN)} x {len(SEVERITIES)}, {who}: {out[f'total_{who}']:.0f} s")
        if processes:
            print(f"{out['total_imagecorruptions'] / out['total_ours']:.1f} times faster")
        if asked.full:
            jobs = [(name, severity, n) for name in OWN for severity in SEVERITIES for n in range(IMAGES)]
            began = time.perf_counter()
            for _ in workers.map(ours, jobs):
                pass
            out["full"] = time.perf_counter() - began
            print(f"all of them, measured: {out['full']:.0f} s")
    if asked.json:
        write_atomic(asked.json, f"{json.dumps(out, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
