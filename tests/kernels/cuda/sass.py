"""What nvcc and ptxas made of the kernels in the built library: resources and instructions, read by cuobjdump."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from qkernels import cuda


@dataclass
class Kernel:
    name: str  # demangled, without its parameters
    chip: str
    registers: int
    stack: int  # bytes per thread: spilled registers, or arrays that no register could hold
    instructions: list[str]

    def uses(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.instructions)

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.instructions)


def _cuobjdump() -> str:
    """The toolkit's own, or Triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if bundled.exists():
            return str(bundled)
    pytest.skip("needs cuobjdump (CUDA toolkit, or triton)")


@functools.cache
def kernels() -> list[Kernel]:
    """Every kernel of the library, once for each chip. Skips the test where there is no library or no cuobjdump."""
    if cuda.missing is not None:
        pytest.skip(f"needs the CUDA kernels: {cuda.missing}")
    assert cuda._spec is not None and cuda._spec.origin is not None
    tool = _cuobjdump()
    library = cuda._spec.origin

    def dump(what: str) -> str:
        return subprocess.run([tool, what, library], capture_output=True, text=True, check=True).stdout

    resources: dict[tuple[str, str], tuple[int, int]] = {}
    chip = ""
    for line in dump("--dump-resource-usage").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            chip = found[1]
        elif found := re.search(r"Function (\S+):", line):
            function = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            registers, stack, local = map(int, found.groups())
            resources[chip, function] = registers, stack + local
    bodies: dict[tuple[str, str], list[str]] = {}
    for line in dump("--dump-sass").splitlines():
        if found := re.search(r"code for (sm_\w+)", line):
            chip = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            body = bodies.setdefault((chip, found[1]), [])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            body.append(found[1])
    plain = subprocess.run(
        ["c++filt", "-p"], input="\n".join(name for _, name in bodies), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = dict(zip(bodies, plain, strict=True))
    return [
        Kernel(names[key].replace("qk::", "").replace("(anonymous namespace)::", ""), key[0], *resources[key], body)
        for key, body in bodies.items()
    ]


def named(pattern: str) -> list[Kernel]:
    """Kernels whose whole name matches; at least one must."""
    found = [kernel for kernel in kernels() if re.fullmatch(pattern, kernel.name)]
    assert found, f"no kernel is named like {pattern!r} any more: {sorted({kernel.name for kernel in kernels()})[:9]}"
    return found
