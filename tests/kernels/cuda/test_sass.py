"""The instructions of the row kernels: registers hold the rows, memory moves in whole vectors."""

from __future__ import annotations

import re

from tests.kernels.cuda.sass import Kernel, named

CHIPS = {"sm_80", "sm_90a"}


def assert_in_registers(kernel: Kernel) -> None:
    assert kernel.stack == 0 and not kernel.uses(r"\b(LDL|STL)\b"), (kernel.chip, kernel.name)


def test_rows_stay_in_registers_between_two_vector_accesses() -> None:
    found = named(r"(short|long)_rows<.*>")
    assert {kernel.chip for kernel in found} == CHIPS and len(found) == 2 * 36
    for kernel in found:
        assert_in_registers(kernel)
        numbers = [int(word) for word in re.findall(r"\b\d+\b", kernel.name)]  # threads and values of a thread
        vector = 8 if "16" in kernel.name.split(",")[0] else 4
        assert kernel.count(r"LDG\.E\.NA\.128") >= (numbers[-1] // vector if numbers else 2), kernel.name
        codes = r"STG\.E\.64" if vector == 8 else r"STG\.E (desc|\[)"  # of one vector of x
        assert kernel.uses(codes), kernel.name
        # Rounding is a sum of its own: contracted with the product before it, ties would be decided twice.
        assert kernel.uses(r"FADD.*, 12582912") and not kernel.uses(r"FFMA.*, 12582912"), kernel.name
        if kernel.name.startswith("short_rows") and ", 32, " in kernel.name:
            assert not kernel.uses(r"\bBAR\b"), kernel.name


def test_fake_quantize_moves_whole_vectors_and_sums_without_atomics() -> None:
    found = named(r"by_(runs|columns)<.*>")
    assert {kernel.chip for kernel in found} == CHIPS and len(found) == 2 * 12
    for kernel in [*found, *named(r"total<\d+>")]:
        assert_in_registers(kernel)
        assert not kernel.uses(r"\b(ATOM|ATOMG|RED)\b"), kernel.name
    for kernel in found:
        # Loads of a thread are under way together: as many as the piece has vectors, of both arrays backward.
        at_once = 1 if kernel.name.startswith("by_columns") else 8 if "float" in kernel.name else 4
        assert kernel.count(r"LDG\.E\.NA\.128") >= at_once and kernel.uses(r"STG\.E\.128"), kernel.name


def test_int4_linear_multiplies_on_tensor_cores_from_a_ring_of_copies() -> None:
    found = named(r"int4_linear<.*>")
    assert {kernel.chip for kernel in found} == CHIPS and len(found) == 2 * 12
    for kernel in found:
        assert_in_registers(kernel)
        tiles = 2 if ", 16, " in kernel.name else 8
        # Of the 8 (16-bit) or 4 (int8) products of a step and tile; ones for the sums of x are more.
        products, name = (4, r"IMMA\.16832\.S8\.S8") if "signed char" in kernel.name else (8, r"HMMA\.16816\.F32")
        assert kernel.count(name) >= products * tiles, kernel.name
        assert kernel.uses(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128"), kernel.name
        assert not kernel.uses(r"LDG\.E\.U8\b|LDS\.U?8\b|LDS\.U?16\b") or "signed char" in kernel.name, kernel.name
        # Sign extension and byte shuffles would show here: one PRMT for each half word of codes in 16-bit kernels.
        assert kernel.registers <= (128 if tiles == 2 else 255), kernel.name
