"""What the compiler made of the loops: no accumulator on the stack, no wide instruction outside of its tier."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from qkernels import cpu

STACK = re.compile(r"[zy]mm\d+.*\(%r[sb]p|\(%r[sb]p.*[zy]mm\d+")


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """Mangled name (repeats numbered) -> instructions of the built extension."""
    if cpu.native is None:
        pytest.skip(f"needs the native kernels: {cpu.missing}")
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump (binutils)")
    if "avx512vnni" not in cpu.native.tiers():
        pytest.skip("needs the tiers of an x86 processor with AVX512-VNNI")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", cpu.native.__file__], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = start[1]
            while name in found:
                name += "'"
            body = found.setdefault(name, [])
        elif "\t" in line:
            body.append(line.split("\t", 1)[1])
    if not any("_avx512vnni" in name for name in found):
        pytest.skip("the extension was stripped of its symbols")
    return found


@pytest.fixture(scope="module")
def weak(functions: dict[str, list[str]]) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    text = subprocess.run(["nm", cpu.native.__file__], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in text.splitlines() if re.search(r" [WwVu] ", line)}


def tiles(functions: dict[str, list[str]], names: str, instruction: str, per_row: int) -> dict[int, list[list[str]]]:
    """Bodies of the register tiles `names` that use `instruction`, by their number of rows."""
    found: dict[int, list[list[str]]] = {}
    for name, body in functions.items():
        kind = re.search(rf"\d+(?:{names})ILi(\d)E", name)
        count = sum(instruction in line for line in body)
        if kind and count:
            rows = int(kind[1])
            assert count % (per_row * rows) == 0, f"{name}: {count} x {instruction} is not a whole tile of {rows} rows"
            found.setdefault(rows, []).append(body)
    return found


def test_vnni_tiles_keep_their_accumulators_in_registers(functions: dict[str, list[str]]) -> None:
    found = tiles(functions, "tile|linear_tile|group_tile", "vpdpbusd", 4)
    # int8_linear and int4_linear have two tiles each for 1..6 rows; one of a single row may have been inlined.
    # Those of 5 and 6 rows come again for every activation, residual and output type of the tile that they finish.
    assert all(len(found.get(rows, [])) == (4 if rows < 5 else 4 + 5 * 4) for rows in range(2, 7))
    for bodies in found.values():
        for body in bodies:
            spills = [line for line in body if STACK.search(line)]
            assert not spills, spills[:5]


def test_float_tiles_keep_their_accumulators_in_registers(functions: dict[str, list[str]]) -> None:
    found = tiles(functions, "float_tile|strip", "vfmadd", 1)
    assert found, "no float tile is named so any more"
    for bodies in found.values():
        for body in bodies:
            assert not [line for line in body if STACK.search(line)]


def test_what_the_linker_may_merge_has_no_wide_instruction(functions: dict[str, list[str]], weak: set[str]) -> None:
    """A weak function compiled in several tiers becomes one: it must run on every processor."""
    shared = [name for name in functions if name in weak]
    assert shared, "pybind11 alone makes weak symbols"
    for name in shared:
        wide = [line for line in functions[name] if re.search(r"%[yz]mm|%k[1-7]", line)]
        assert not wide, (name, wide[:3])


def test_scalar_tier_uses_the_baseline_only(functions: dict[str, list[str]]) -> None:
    bodies = {name: body for name, body in functions.items() if re.fullmatch(r"qk_\w+_scalar'*", name)}
    assert bodies, "no function of the scalar tier is named so any more"
    for name, body in bodies.items():
        wide = [line for line in body if re.search(r"%[yz]mm|\bv[a-z]+[sp][sd]\b", line)]
        assert not wide, (name, wide[:3])
