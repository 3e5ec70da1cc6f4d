"""Kernels in another process: tiers of other processors under an emulator, and builds with a sanitizer.

`install` puts a stand-in for `qkernels.cpu.native` there: its ops run in `driver.cc`, which is built on first use.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import platform
import runpy
import shutil
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from qkernels import cpu
from tests.once import alone

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CXX = {"neon": "aarch64-linux-gnu-g++", "avxvnni": "g++", "threads": "g++"}
FLAGS = {
    "neon": ["-static"],
    "avxvnni": ["-DQK_ONLY_PRODUCTS", "-mno-red-zone"],
    # std::thread, since OpenMP's own synchronization is invisible to the sanitizer; two callers at once.
    "threads": ["-fsanitize=thread", "-g1", "-DQK_STD_THREADS", "-DQK_CALLERS=2"],
}


def missing(kind: str) -> str | None:
    """Why `kind` (`avxvnni`, `neon`, or `threads`: ThreadSanitizer) cannot run here, or None."""
    machine = platform.machine().lower()
    if not (ROOT / "setup.py").is_file():
        return "needs a checkout with setup.py and csrc"
    if machine not in ("x86_64", "amd64") or platform.system() != "Linux":
        return "needs Linux on an x86-64 processor"
    if cpu.native is None or "avx512vnni" not in cpu.native.tiers():
        return "needs the native kernels and AVX512-VNNI"
    if shutil.which(CXX[kind]) is None:
        return f"needs {CXX[kind]}"
    if kind == "neon" and shutil.which("qemu-aarch64") is None:
        return "needs qemu-aarch64 (qemu-user)"
    return None


def _setup(machine: str) -> dict[str, Any]:
    """What setup.py says on a machine of that kind."""
    with mock.patch("platform.machine", lambda: machine), mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def _build(kind: str) -> Path:
    """The driver for `kind`, built unless these sources were built before."""
    tier = {"threads": cpu.native.module.tiers()[-1]}.get(kind, kind)
    setup = _setup("aarch64" if kind == "neon" else "x86_64")
    only = setup["ONLY"].get(tier)
    sources = [p for p in sorted((ROOT / "csrc/cpu").glob("*.cc")) if not only or p.stem in (*only, "dispatch")]
    sources += [HERE / "driver.cc", *([HERE / "avxvnni.cc"] if kind == "avxvnni" else [])]
    flags = [*setup["FLAGS"], "-O2", *setup["QUIET"], *FLAGS[kind], f"-I{ROOT / 'csrc'}", f"-DQK_TIER={tier}"]
    flags += ["-fopenmp"] if kind == "neon" else []
    own = [*setup["TIERS"][tier], f"-DQK_TIER_{tier}"]
    digest = hashlib.sha256(repr((CXX[kind], flags, own, setup["MORE"])).encode())
    for path in [*sources, *sorted((ROOT / "csrc/cpu").glob("*.[hd]*"))]:
        digest.update(path.read_bytes())
    folder = ROOT / "build/remote" / f"{kind}-{digest.hexdigest()[:16]}"
    driver = folder / "driver"
    with alone(folder):
        if driver.exists():
            return driver
        objects = []
        for source in sources:
            # What is not a kernel must run before anybody knows what the processor can do.
            kernel = source.parent.name == "cpu" and source.stem != "dispatch"
            more = [*own, *setup["MORE"].get((source.stem, tier), [])] if kernel else []
            objects.append(folder / f"{source.stem}.o")
            subprocess.run([CXX[kind], *flags, *more, "-c", str(source), "-o", str(objects[-1])], check=True)
        subprocess.run([CXX[kind], *flags, *map(str, objects), "-pthread", "-o", str(folder / "new")], check=True)
        return (folder / "new").rename(driver)


class Native:
    """Like the native module, its ops run by a driver; what the driver lacks runs here, in the avx2 tier."""

    def __init__(self, kind: str, here: Any) -> None:
        self.kind, self.ops, self._here = kind, here.ops, here
        self._lock, self._ends = threading.Lock(), {}
        emulator = ["qemu-aarch64"] if kind == "neon" else []
        self._process = subprocess.Popen(
            [*emulator, str(_build(kind))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        atexit.register(self._end)
        self.can_run = self._read(1) == b"y"

    def _end(self) -> None:
        with self._process:  # closes the pipes, by which the driver ends, and waits for it
            pass

    def tiers(self) -> list[str]:
        return [self.kind]

    def tier(self) -> str:
        return self.kind

    def set_tier(self, name: str) -> None:
        if self.kind != "threads":
            self._here.set_tier("avx2")

    def has_bf16(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        there = name in self.ops and (self.kind != "avxvnni" or name in ("int8_linear", "int4_linear"))
        return functools.partial(self._call, name) if there else getattr(self._here, name)

    def saw(self, tensor: torch.Tensor, address: int) -> None:
        """Remembers where the memory of a tensor ends."""
        storage = tensor.untyped_storage()
        self._ends[address] = storage.data_ptr() + storage.nbytes()

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = b""
        while len(data) < size:
            part = self._process.stdout.read(size - len(data))
            if not part:
                raise RuntimeError(f"the {self.kind} driver ended with status {self._process.wait()}")
            data += part
        return data

    def _call(self, name: str, *arguments: Any) -> None:
        kinds = self._here.parameters(name)[1]
        assert len(kinds) == len(arguments), name
        parts = [struct.pack("<q", len(name)), name.encode()]
        written = []
        for kind, value in zip(kinds, arguments, strict=True):
            if kind == "f":
                parts.append(struct.pack("<fi", value, 0))
            elif kind == "i":
                parts.append(struct.pack("<q", value))
            elif value == 0:
                parts.append(struct.pack("<q", -1))
            else:
                size = self._ends[value] - value
                parts.append(struct.pack("<qq", size, value % 64) + ctypes.string_at(value, size))
                if kind == "w":
                    written.append((value, size))
        with self._lock:
            assert self._process.stdin is not None
            request = memoryview(b"".join(parts))
            while request:  # a pipe takes what fits
                request = request[self._process.stdin.write(request) :]
            for address, size in written:
                ctypes.memmove(address, self._read(size), size)


@functools.cache
def _native(kind: str) -> Native:
    return Native(kind, cpu.native)


def install(monkeypatch: pytest.MonkeyPatch, kind: str) -> Native:
    """Run the ops by `kind` for the rest of the test. One process serves the whole test run."""
    native, data_ptr = _native(kind), torch.Tensor.data_ptr

    def seen(tensor: torch.Tensor) -> int:
        address = data_ptr(tensor)
        native.saw(tensor, address)
        return address

    monkeypatch.setattr(cpu, "native", native)
    monkeypatch.setattr(torch.Tensor, "data_ptr", seen)
    return native
