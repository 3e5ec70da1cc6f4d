"""Compilation ahead of time, without a GPU: every kernel and configuration of this backend, for any chip.

Each op's file lists what can be launched in `aot_cases()`; `compile_case` turns a case into machine code and reads it
with the cuobjdump that Triton brings. Needs a process in which Triton's interpreter is off.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import FILES
from . import __name__ as package
from .launch import SM80, SM90, Chip

CHIPS = {80: SM80, 90: SM90}
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class AotCase:
    """One kernel as it may be launched.

    `signature`: type of every argument of the launch, by name ("*i8", "i32", "fp32", "tensordesc<i8[128,128]>").
    `constexprs`: all others, also arguments that a launch would specialize (1, or None). `divisible`: arguments known
    to be multiples of 16 (pointers too), for which a launch specializes. `options`: num_warps, num_stages, ...
    `contains`: what the machine code (SASS) must contain, by capability; `forbids`: what it must not.
    `capabilities`: the chips that it is for. `spills`: pairs (capability, (major, minor) of Triton) for which spills
    are known and accepted.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    contains: dict[int, tuple[str, ...]] = field(default_factory=dict)
    forbids: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = (80, 90)
    spills: frozenset[tuple[int, tuple[int, int]]] = frozenset()


@dataclass(frozen=True)
class Compiled:
    """What a case became: machine code, PTX, Triton's own last form of it (TTGIR), registers and bytes of stack
    (spills) per thread, shared bytes per block."""

    sass: str
    ptx: str
    ttgir: str
    registers: int
    stack: int
    shared: int


def all_cases() -> list[AotCase]:
    """The cases of every op file, each file once. Names start with the file's."""
    cases = []
    for file in dict.fromkeys(FILES.values()):
        if find_spec(f"{package}.{file}") is not None:
            cases.extend(import_module(f"{package}.{file}").aot_cases())
    return cases


def compile_case(case: AotCase, capability: int) -> Compiled:
    """Machine code of a case for compute capability 80 or 90. Takes seconds; Triton caches what it made."""
    names = case.kernel.arg_names
    unknown = {*case.signature, *case.constexprs, *case.divisible} ^ set(names)
    if unknown or {*case.signature} & {*case.constexprs}:
        raise ValueError(f"{case.name}: signature and constexprs must name every argument once; look at {unknown}")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={name: case.constexprs[name] for name in names if name in case.constexprs},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (_cuobjdump(option, cubin) for option in ("--dump-resource-usage", "--dump-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    asm, spilled = compiled.asm, int(found[2])
    return Compiled(sass, asm["ptx"], asm["ttgir"], int(found[1]), spilled, compiled.metadata.shared)


@functools.cache
def _tool() -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not path.is_file():
        raise FileNotFoundError(f"Triton's own cuobjdump is not at {path}; reinstall triton from its wheel")
    return str(path)


def _cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run([_tool(), option, str(cubin)], check=True, capture_output=True, text=True).stdout


def faults(case: AotCase, capability: int, compiled: Compiled) -> list[str]:
    """What is wrong with the machine code, in words; empty where nothing is."""
    found = [f"no {word}" for word in case.contains.get(capability, ()) if word not in compiled.sass]
    found += [f"has {word}" for word in case.forbids if word in compiled.sass]
    if compiled.stack and (capability, TRITON) not in case.spills:
        found.append(f"spills: {compiled.stack} bytes of stack per thread, {compiled.registers} registers")
    limit: Chip = CHIPS[capability]
    if compiled.shared > limit.shared:
        found.append(f"uses {compiled.shared} bytes of shared memory of {limit.shared}")
    return found
