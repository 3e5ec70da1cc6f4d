"""What the compiler made of the loops: no accumulator on the stack, no wide instruction outside of its tier."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from qkernels import cpu

pytestmark = pytest.mark.slow  # compiles and disassembles the kernels

ROOT = Path(__file__).resolve().parents[2]
SPILL = re.compile(r"%[zy]mm\d+,-?(0x)?[0-9a-f]*\(%r([sb])p\)")
COMPILERS = [f"g++-{n}" for n in range(11, 15)] + [f"clang++-{n}" for n in range(14, 20)]


def disassemble(*binaries: Path | str) -> dict[str, list[str]]:
    """Mangled name (repeats numbered) -> instructions."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump (binutils)")
    found: dict[str, list[str]] = {}
    body: list[str] = []
    for binary in binaries:
        text = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", binary], capture_output=True, text=True, check=True
        ).stdout
        for line in text.splitlines():
            if start := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
                name = start[1]
                while name in found:
                    name += "'"
                body = found.setdefault(name, [])
            elif "\t" in line:
                body.append(line.split("\t", 1)[1])
    return found


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """The functions of the built extension."""
    if cpu.native is None:
        pytest.skip(f"needs the native kernels: {cpu.missing}")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("needs the tiers of an x86 processor")
    found = disassemble(cpu.native.__file__)
    if not any("_avx512vnni" in name for name in found):
        pytest.skip("needs the extension's symbols, of which it was stripped")
    return found


@pytest.fixture(scope="module", params=["as built", *COMPILERS])
def linears(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The functions of the linear ops, as built and by every compiler that is here."""
    if request.param == "as built":
        return request.getfixturevalue("functions")
    compiler = shutil.which(request.param)
    if compiler is None or platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"needs {request.param} on an x86 processor")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs a checkout with setup.py and csrc")
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    folder, objects = tmp_path_factory.mktemp("objects"), []
    for op in ("int8_linear", "int4_linear"):
        for tier in ("avx2", "avxvnni", "avx512vnni"):
            objects.append(folder / f"{op}.{tier}.o")
            own = [*setup["TIERS"][tier], f"-DQK_TIER={tier}", f"-DQK_TIER_{tier}"]
            command = [compiler, *setup["FLAGS"], *setup["QUIET"], *own]
            subprocess.run([*command, "-c", str(ROOT / f"csrc/cpu/{op}.cc"), "-o", str(objects[-1])], check=True)
    return disassemble(*objects)


@pytest.fixture(scope="module")
def weak(functions: dict[str, list[str]]) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    text = subprocess.run(["nm", cpu.native.__file__], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in text.splitlines() if re.search(r" [WwVu] ", line)}


def tiles(
    functions: dict[str, list[str]], names: str, instruction: str, per_row: int, register: str
) -> dict[int, list[list[str]]]:
    """Bodies of the register tiles `names` that use `instruction` on `register`s, by their number of rows."""
    found: dict[int, list[list[str]]] = {}
    for name, body in functions.items():
        kind = re.search(rf"\d+(?:{names})ILi(\d)E", name)
        count = sum(instruction in line and register in line for line in body)
        if kind and count:
            rows = int(kind[1])
            assert count % (per_row * rows) == 0, f"{name}: {count} x {instruction} is not a whole tile of {rows} rows"
            found.setdefault(rows, []).append(body)
    return found


def spills(body: list[str]) -> list[str]:
    """Stores of vectors to the stack. %rbp points there only where it was taken from %rsp."""
    frame = any(re.match(r"mov +%rsp,%rbp", line) for line in body)
    return [line for line in body if (hit := SPILL.search(line)) and (hit[2] == "s" or frame)]


def assert_nothing_spilled(found: dict[int, list[list[str]]]) -> None:
    for rows, bodies in found.items():
        for body in bodies:
            assert not spills(body), (rows, spills(body)[:5])


def test_vnni_tiles_keep_their_accumulators_in_registers(linears: dict[str, list[str]]) -> None:
    found = tiles(linears, "tile|linear_tile|group_tile", "vpdpbusd", 4, "zmm")
    # int8_linear and int4_linear have two tiles each for 1..6 rows; one of a single row may have been inlined.
    # Those of 5 and 6 rows come again for every activation, residual and output type of the tile that they finish.
    assert all(len(found.get(rows, [])) == (4 if rows < 5 else 4 + 5 * 4) for rows in range(2, 7))
    assert_nothing_spilled(found)


def test_avxvnni_tiles_keep_their_accumulators_in_registers(linears: dict[str, list[str]]) -> None:
    found = tiles(linears, "tile|strip", "{vex} vpdpbusd", 2, "ymm")
    assert all(len(found.get(rows, [])) >= 2 for rows in range(2, 7))
    assert_nothing_spilled(found)


def test_avx2_tiles_keep_their_accumulators_in_registers(linears: dict[str, list[str]]) -> None:
    # Of int8_linear: two rows by half a panel, one by half, one by all of it; sums are kept, or scaled.
    strips = {name: body for name, body in linears.items() if re.search(r"\d+stripI\w+7Flipped", name)}
    assert len(strips) == 6, list(strips)
    for name, body in strips.items():
        multiplied = sum("vpmaddubsw" in line and "%ymm" in line for line in body)
        assert multiplied in (4, 8), (name, multiplied)
    assert_nothing_spilled({0: list(strips.values())})
    # And with weights of few bits, scaled, four numbers of pair sums: the loop of rounds and the one of what is left.
    narrow = {name: body for name, body in linears.items() if re.search(r"\d+stripI\w+6Narrow", name)}
    assert len(narrow) == 4 * 3, list(narrow)
    for name, body in narrow.items():
        pairs, rows, vectors = map(int, re.search(r"6NarrowILi(\d)EEELi(\d)ELi(\d)E", name).groups())
        multiplied = sum("vpmaddubsw" in line and "%ymm" in line for line in body)
        assert multiplied in (rows * vectors * (pairs + 1), rows * vectors * pairs), (name, multiplied)
    assert_nothing_spilled({0: list(narrow.values())})


def test_avx2_strips_keep_their_sums_in_registers(linears: dict[str, list[str]]) -> None:
    """Weights of 4 bits from bytes, or for 1..2 rows from nibbles."""
    for kind, number in {"sum": 3 + 2, "round": 3 + 2, "scale": 2 * (3 + 2)}.items():
        bodies = [
            body
            for name, body in linears.items()
            if re.search(rf"\d+{kind}_stripI", name) and any("vpmaddubsw" in line for line in body)
        ]
        assert len(bodies) == number, f"{kind}_strip is not the name of {number} strips any more"
        assert_nothing_spilled({0: bodies})


def test_float_tiles_keep_their_accumulators_in_registers(linears: dict[str, list[str]]) -> None:
    found = tiles(linears, "float_tile|strip", "vfmadd", 1, "mm")
    assert found, "no float tile is named so any more"
    assert_nothing_spilled(found)


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
