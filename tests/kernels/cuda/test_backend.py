"""The CUDA backend around its kernels: what it says where it cannot run."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels import FallbackError, FallbackWarning, cuda, dispatch, reference


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda.missing is not None:
        pytest.skip(f"needs the CUDA kernels: {cuda.missing}")
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.delenv("QKERNELS_STRICT", raising=False)
    monkeypatch.setenv("QKERNELS_BACKEND", "cuda")


def test_the_library_loads_and_types_its_functions(built: None) -> None:
    functions = cuda.library().qk_cuda_ops().decode().splitlines()
    assert any(line.startswith("device_facts(int* major") for line in functions)
    assert len(cuda.library().qk_cuda_device_facts.argtypes) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_a_call_fails_with_a_sentence(built: None) -> None:
    with pytest.raises(cuda.CudaError, match="device_facts: .*(driver is missing|no NVIDIA GPU)") as caught:
        cuda.device_facts(0)
    assert caught.value.code in (35, 100)


@pytest.mark.parametrize(
    "code, text", [(2, "out of memory"), (209, "no code in the library"), (710, "cudaErrorAssert")]
)
def test_every_error_is_a_sentence(built: None, code: int, text: str) -> None:
    with pytest.raises(cuda.CudaError, match=f"some_op: .*{text}") as caught:
        cuda._fail("some_op", code)
    assert caught.value.code == code


def test_tensors_elsewhere_fall_back_aloud(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert qkernels.backend_for("cuda") is cuda
    with pytest.warns(FallbackWarning, match="QKERNELS_BACKEND=cuda has no kernels for device type 'cpu'"):
        assert qkernels.backend_for("cpu") is reference
    monkeypatch.setenv("QKERNELS_STRICT", "1")
    with pytest.raises(FallbackError):
        qkernels.backend_for("cpu")
    assert qkernels.info()["backend"] == "reference" and qkernels.info()["cuda"] is None
    assert cuda.supports("no_such_op", torch.ones(1)) == "does not have this op"


def test_asked_for_but_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_BACKEND", "cuda")
    monkeypatch.setattr(cuda, "missing", "qkernels was installed without its CUDA kernels")
    with pytest.raises(ValueError, match="QKERNELS_BACKEND=cuda, but qkernels was installed without its CUDA"):
        qkernels.backend_for("cuda")
