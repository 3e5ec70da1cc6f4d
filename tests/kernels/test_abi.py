"""Arguments of native functions go by name, in the order that the function has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qkernels import cpu
from qkernels.abi import Parameters, epilogue_arguments
from qkernels.contract import Epilogue

LISTS = sorted((Path(__file__).parents[2] / "csrc").glob("*/ops.def"))


def test_words_stand_in_the_functions_order_whatever_the_calls() -> None:
    parameters = Parameters("const float* x, std::int64_t n, float eps, void* out")
    assert (parameters.names, parameters.pointers) == (("x", "n", "eps", "out"), (0, 3))
    x = torch.ones(3)
    assert parameters.words({"out": None, "eps": 0.5, "n": 3, "x": x}) == [x.data_ptr(), 3, 0.5, 0]


@pytest.mark.parametrize("arguments", [{"x": None}, {"x": None, "m": 1}, {"x": None, "n": 1, "m": 1}])
def test_missing_and_unknown_names_are_refused(arguments: dict) -> None:
    with pytest.raises(TypeError, match="arguments must be x, n; got"):
        Parameters("void* x, int n").words(arguments)


@pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")
def test_the_native_module_tells_what_the_list_says() -> None:
    for name in cpu.native.ops:
        text, kinds = cpu.native.parameters(name)
        parameters = Parameters(text)
        assert tuple(place for place, kind in enumerate(kinds) if kind in "rw") == parameters.pointers
        assert parameters.names[-1] == "threads" and len(set(parameters.names)) == len(parameters.names)


@pytest.mark.skipif(not LISTS, reason="needs a checkout with csrc/")
def test_both_backends_end_linear_ops_with_what_an_epilogue_gives() -> None:
    given = set(epilogue_arguments(Epilogue(), torch.empty(1)))
    for path in LISTS:
        for name in ("int8_linear", "int4_linear"):
            found = re.search(rf"\({name}, (.*?)\)", path.read_text(), re.S)
            assert found is not None and given <= set(Parameters(found[1]).names), (path, name)


def test_an_epilogue_knows_shape_and_dtype_of_its_results() -> None:
    cpu_device = torch.device("cpu")
    assert Epilogue(out_dtype=torch.bfloat16).results((2, 3), 130) == [((2, 3, 130), torch.bfloat16)]
    assert Epilogue(out_scale=torch.ones(())).results((), 5) == [((5,), torch.int8)]
    codes, scales = Epilogue(out_group=128).allocate((2,), 130, cpu_device)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == ((2, 130), torch.int8, (2, 2), torch.float32)
