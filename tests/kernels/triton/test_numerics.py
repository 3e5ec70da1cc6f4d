"""What the interpreter cannot show: that the machine code of the quantizers rounds where the rules do. Every division
and root is correctly rounded, subnormal numbers count, and `y * inverse + 1.5 * 2^23` stays two roundings."""

from __future__ import annotations

import importlib.util
import re

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from qkernels.triton import aot, fake_quantize, layer_norm, quantize

pytestmark = pytest.mark.slow  # compiles kernels

CASES = [
    (case, capability)
    for case in quantize.aot_cases() + layer_norm.aot_cases() + fake_quantize.aot_cases()
    if re.search("-(static|zero-point|wide|bfloat16-768|float32-768)", case.name)
    or re.search("fake_quantize-forward-(lsq-tensor-.*-aligned$|lsq_plus-columns)", case.name)
    for capability in case.capabilities
]
SHIFT = "12582912"  # 1.5 * 2^23, as SASS writes it


@pytest.mark.parametrize(("case", "capability"), CASES, ids=[f"{case.name}-sm{chip}" for case, chip in CASES])
def test_roundings(case: aot.AotCase, capability: int) -> None:
    compiled = aot.compile_case(case, capability)
    ptx = compiled.ptx
    for inexact in (".ftz", ".approx", "div.full"):
        assert inexact not in ptx
    assert "div.rn.f32" in ptx and "max.NaN.f32" in ptx
    if case.name.startswith("layer_norm"):
        assert "sqrt.rn.f32" in ptx
    else:
        assert not re.search(r"\bfma\.", ptx)
    shifts = [line for line in compiled.sass.splitlines() if re.search(rf"\b{SHIFT}\b", line)]
    assert any("FADD" in line for line in shifts)
    assert not any("FFMA" in line for line in shifts)


def test_the_check_sees_a_fused_rounding() -> None:
    """With fusion allowed the same kernel rounds once."""
    case = quantize.aot_cases()[0]
    fused = aot.AotCase(
        case.name,
        case.kernel,
        case.signature,
        case.constexprs,
        case.divisible,
        {**case.options, "enable_fp_fusion": True},
    )
    assert re.search(rf"FFMA.*\b{SHIFT}\b", aot.compile_case(fused, 90).sass)
