"""What ptxas made of the INT8 linear map: tensor-core instructions on operands that TMA and cp.async brought, sums that
never leave registers, an epilogue without shared memory."""

from __future__ import annotations

import pytest

from tests.kernels.cuda.sass import Kernel, named

# Template arguments -> instruction, and how many make a stage of 128 bytes of K
HOPPER = {
    "1, 128, true, 8, false": ("64x128x32", 4),
    "2, 128, true, 6, false": ("64x128x32", 8),
    "1, 256, false, 4, false": ("64x256x32", 4),
    "1, 128, false, 6, true": ("64x128x32", 4),
}
AMPERE = {"2, false": 2, "1, false": 1, "1, true": 1}  # -> MI, the rows of 16 that a warp has


def in_registers(kernel: Kernel) -> bool:
    """Nothing spilled, and nothing that passes through shared memory but the operands. (ptxas puts loads that are never
    executed before cp.async.)"""
    return kernel.stack == 0 and not kernel.uses(r"\b(LDL|STL)\b") and not kernel.uses(r"^(?!@!PT).*\b(LDS|STS)\b")


@pytest.mark.parametrize("configuration", HOPPER)
def test_hopper_multiplies_what_tma_brought(configuration: str) -> None:
    shape, products = HOPPER[configuration]
    (kernel,) = named(rf"(void )?int8_linear_kernel<Config<{configuration}> ?>")
    assert kernel.chip == "sm_90a" and in_registers(kernel)
    # One copy of the main loop, all of whose products are asynchronous: ptxas serializes them, or copies sums between
    # them, where it cannot prove that nothing touches the registers.
    assert kernel.count(rf"\bIGMMA\.{shape}\.S8\.S8\b") == kernel.count(r"\bIGMMA\b") == products
    assert kernel.count(r"\bUTMALDG\.2D\b") == 2
    assert kernel.count(r"\bUSETMAXREG\b") == 2 and kernel.registers == 168
    first = next(i for i, line in enumerate(kernel.instructions) if "IGMMA" in line)
    last = max(i for i, line in enumerate(kernel.instructions) if "IGMMA" in line)
    loop = kernel.instructions[first:last]
    assert not [line for line in loop if line.startswith(("MOV ", "IMAD.MOV", "WARPGROUP.DEPBAR"))], loop
    grouped = configuration.endswith("true")
    assert kernel.uses(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1\b") != grouped, "one stage's products stay in flight"
    assert kernel.uses(r"\bSTG\.E\.128\b") and kernel.uses(r"\bSTG\.E\.64\b")


@pytest.mark.parametrize("configuration", AMPERE)
def test_ampere_multiplies_what_cp_async_brought(configuration: str) -> None:
    rows = AMPERE[configuration]
    (kernel,) = named(rf"(void )?int8_linear_kernel<{configuration}>")
    assert kernel.chip == "sm_80" and in_registers(kernel) and kernel.registers <= 255
    # Two steps of 32 of K in a stage: 16 blocks of 8 columns each.
    assert kernel.count(r"\bIMMA\.16832\.S8\.S8\b") == kernel.count(r"\bIMMA\b") == 2 * 16 * rows
    assert kernel.count(r"\bLDSM\.16\.M88\.4\b") == 2 * (8 + rows)
    assert kernel.uses(r"\bLDGSTS\.E\.BYPASS\.128\b") and kernel.uses(r"\bSTG\.E\.128\b")
