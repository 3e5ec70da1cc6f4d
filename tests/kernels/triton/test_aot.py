"""Every kernel and configuration of the Triton backend, compiled ahead of time for sm_80 and sm_90: tensor-core
instructions where they belong, no spills, shared memory within the chip's limit. No GPU is needed."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from qkernels.triton import aot

pytestmark = pytest.mark.slow  # compiles every kernel

CASES = [(case, capability) for case in aot.all_cases() for capability in case.capabilities]


IDS = [f"{case.name}-sm{chip}" for case, chip in CASES]


@pytest.mark.parametrize(("case", "capability"), CASES, ids=IDS)
def test_aot(case: aot.AotCase, capability: int) -> None:
    assert not aot.faults(case, capability, aot.compile_case(case, capability))


def test_names_of_cases_differ() -> None:
    assert len(set(IDS)) == len(IDS)


FLAT = [(case, chip) for case, chip in CASES if case.constexprs.get("FLATTEN")]


@pytest.mark.parametrize(("case", "capability"), FLAT, ids=[f"{case.name}-sm{chip}" for case, chip in FLAT])
def test_tiles_share_one_pipeline(case: aot.AotCase, capability: int) -> None:
    """Barriers are made once and not for every tile: the loops over tiles and over K have become one, so that the next
    tile's operands are fetched while one is finished. Triton leaves them apart, without a word, where it must."""
    inside: list[tuple[int, str]] = []  # regions around a line, by their indentation
    around = []
    for line in aot.compile_case(case, capability).ttgir.splitlines():
        depth, words = len(line) - len(line.lstrip()), line.split("loc(")[0]
        inside = [region for region in inside if region[0] < depth]
        if "ttng.init_barrier" in words:
            around.append([kind for _, kind in inside])
        if kind := next((kind for kind in ("scf.for", "scf.if", "scf.while") if kind in words), None):
            inside.append((depth, kind))
    assert around and not any("scf.for" in kinds for kinds in around)
