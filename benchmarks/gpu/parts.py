"""The parts of the suite in the order in which they run: names, how long each may take, and what they do. A part is a
process of its own, so that a kernel that takes the device down, or hangs, costs one part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .machine import ROOT, Machine

OPS = (
    "int8_linear",
    "int4_linear",
    "attention",
    "layer_norm_quantize",
    "quantize_per_token",
    "quantize_patches",
    "fake_quantize",
    "channel_absmax",
    "smooth_scale",
    "hadamard_transform",
    "streams_and_sizes",
)
#: the op's first cases that compute-sanitizer, some fifty times slower, looks at
SANITIZED = 6


class SkipError(Exception):
    """A part cannot run here; the message says why."""


@dataclass(frozen=True)
class Part:
    name: str
    limit: int  # seconds
    together: str  # parts of equal `together` in a row run at once; "" alone
    run: Callable[[Machine], Iterator[dict[str, Any]]]


def build(machine: Machine) -> Iterator[dict[str, Any]]:
    """The extensions of this checkout, in place."""
    if machine.tiny:
        raise SkipError("a dry run builds nothing")
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True
    )
    said = (run.stdout + run.stderr).splitlines()
    yield {"rc": run.returncode, "nvcc": shutil.which("nvcc"), "output": said[-40:]}
    if run.returncode:
        raise RuntimeError("setup.py build_ext failed: " + (said[-1] if said else "it said nothing"))


def _check(op: str, backend: str, most: int | None = None) -> Callable[[Machine], Iterator[dict[str, Any]]]:
    def run(machine: Machine) -> Iterator[dict[str, Any]]:
        from . import checks

        if machine.tiny:
            yield from checks.run(machine, op, machine.backends()[0], most)
        elif backend in machine.backends():
            yield from checks.run(machine, op, backend, most)
        else:
            from qkernels import dispatch

            missing = getattr(dispatch.BACKENDS.get(backend), "missing", None)
            raise SkipError(f"no {backend} backend: {missing or 'this version has none'}")

    return run


def _sanitize(backend: str) -> Callable[[Machine], Iterator[dict[str, Any]]]:
    """Each op's first cases under compute-sanitizer, where it is installed and the device lets it."""

    def run(machine: Machine) -> Iterator[dict[str, Any]]:
        if machine.tiny:
            raise SkipError("a dry run has no device to look at")
        tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if tool is None:
            raise SkipError("compute-sanitizer is not installed")
        probe = subprocess.run(
            [tool, sys.executable, "-c", "import torch; torch.zeros(9, device='cuda').add_(1).sum().item()"],
            capture_output=True,
            text=True,
        )
        if probe.returncode:
            raise SkipError("compute-sanitizer does not work here: " + (probe.stdout + probe.stderr).strip()[-200:])
        command = [
            tool,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            sys.executable,
            str(ROOT / "benchmarks/gpu_suite.py"),
            "--sanitized",
            backend,
        ]
        # Without torch's pools every tensor is an allocation of its own, past whose end memcheck sees.
        alone = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        said = (done.stdout + done.stderr).splitlines()
        yield {"rc": done.returncode, "output": said[-60:]}
        if done.returncode:
            raise RuntimeError(f"memcheck found something: {' '.join(said[-3:])[-300:]}")

    return run


def sanitized(machine: Machine, backend: str) -> int:
    """What runs under compute-sanitizer: 1 if a case is wrong."""
    from . import checks

    rows = [row for op in OPS[:-1] for row in checks.run(machine, op, backend, SANITIZED)]
    for row in rows:
        print(row["op"], row["cases"], "cases;", *row["failed"])
    return int(any(row["failed"] for row in rows))


def _timed(what: str) -> Callable[[Machine], Iterator[dict[str, Any]]]:
    def run(machine: Machine) -> Iterator[dict[str, Any]]:
        from . import ops

        _need_backend(machine)
        yield from getattr(ops, what)(machine)

    return run


def _tower(name: str, batch: int) -> Callable[[Machine], Iterator[dict[str, Any]]]:
    def run(machine: Machine) -> Iterator[dict[str, Any]]:
        from . import models

        _need_backend(machine)
        yield from models.tower(machine, name, batch)

    return run


def _training(machine: Machine) -> Iterator[dict[str, Any]]:
    from . import models

    _need_backend(machine)
    yield from models.training(machine)


def _need_backend(machine: Machine) -> None:
    if not machine.backends():
        raise SkipError("no backend of this version has kernels that can run here, so there is nothing to time")


def parts() -> list[Part]:
    checked = [
        Part(f"check {backend} {op}", 150, f"check {backend}", _check(op, backend))
        for backend in ("triton", "cuda")
        for op in OPS
    ]
    return [
        Part("build", 170, "", build),
        *checked,
        Part("time gemms", 110, "", _timed("gemms")),
        Part("time rows", 45, "", _timed("rows")),
        Part("time int4", 45, "", _timed("int4")),
        Part("time attention", 25, "", _timed("attention")),
        Part("tower ViT-L/14 b64", 60, "", _tower("ViT-L/14", 64)),
        Part("tower ViT-L/14 b1", 60, "", _tower("ViT-L/14", 1)),
        Part("tower ViT-L/14 b256", 60, "", _tower("ViT-L/14", 256)),
        Part("tower ViT-B/32 b256", 45, "", _tower("ViT-B/32", 256)),
        Part("training step", 60, "", _training),
        Part("sanitize triton", 120, "", _sanitize("triton")),
        Part("sanitize cuda", 120, "", _sanitize("cuda")),
        Part("time autotuned", 120, "", _timed("autotuned")),
    ]
