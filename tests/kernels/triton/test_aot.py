"""Every kernel and configuration of the Triton backend, compiled ahead of time for sm_80 and sm_90: tensor-core
instructions where they belong, no spills, shared memory within the chip's limit. No GPU is needed."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from qkernels.triton import aot

CASES = [(case, capability) for case in aot.all_cases() for capability in case.capabilities]


IDS = [f"{case.name}-sm{chip}" for case, chip in CASES]


@pytest.mark.parametrize(("case", "capability"), CASES, ids=IDS)
def test_aot(case: aot.AotCase, capability: int) -> None:
    assert not aot.faults(case, capability, aot.compile_case(case, capability))


def test_names_of_cases_differ() -> None:
    assert len(set(IDS)) == len(IDS)
