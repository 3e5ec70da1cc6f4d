"""Programs on a GPU, on emulated CUDA graphs: what is captured, refused, waited for and given back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels
from qkernels import Int8Weight
from qkernels.recording import GraphProgram, UnrecordableError, capture
from tests.kernels.emulated_cuda_graph import EmulatedCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> EmulatedCuda:
    emulated = EmulatedCuda()
    emulated.install(monkeypatch)
    return emulated


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def block(width: int) -> Any:
    weight, gamma = qkernels.pack(Int8Weight.quantize(torch.randn(width, width))), torch.rand(width)

    def run(x: Tensor) -> dict:
        codes, scale = qkernels.layer_norm_quantize(x, gamma, None, 1e-5)
        y = x + qkernels.int8_linear(codes, scale, weight)
        heads = y.unflatten(-1, (2, -1)).transpose(1, 2)
        return {"y": y, "rest": (F.scaled_dot_product_attention(heads, heads, heads), "a word", None), "x": x}

    return run


@pytest.mark.parametrize("inference", [False, True])
def test_a_replay_gives_the_function_s_numbers_in_new_tensors(cuda: EmulatedCuda, inference: bool) -> None:
    function, x = block(16), torch.randn(2, 5, 16)
    with torch.inference_mode() if inference else torch.no_grad():
        program = capture(function, x)
    first = program(x)
    kept = first["y"].clone()
    for other in (torch.randn(2, 5, 16), torch.randn(2, 16, 5).transpose(1, 2), torch.ones(2, 5, 1).expand(2, 5, 16)):
        found, want = program(other), function(other)
        # torch's attention rounds by the strides of its input, and these are those that it was captured with.
        assert torch.equal(found["y"], want["y"]) and torch.allclose(found["rest"][0], want["rest"][0], atol=1e-5)
        assert found["rest"][1:] == ("a word", None) and torch.equal(found["x"], other)
    assert torch.equal(first["y"], kept)
    assert program.describe() == {"graphs": 1, "workspace_bytes": 1000}


def test_it_runs_once_before_it_is_captured_on_a_stream_that_waits(cuda: EmulatedCuda) -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(cuda.current.name)
        return x + 1

    capture(function, torch.ones(3))
    assert calls == ["stream 1", "stream 2"]  # captured on another than it was warmed up on, as torch does
    assert cuda.log[:2] == ["stream 1 waits for default", "default waits for stream 1"]


def test_what_it_reads_stays_alive_with_the_program(cuda: EmulatedCuda) -> None:
    def make() -> tuple[GraphProgram, Tensor, int]:
        constant = torch.randn(3)
        program = capture(lambda x: x + constant.view(3, 1).T, torch.ones(2, 3))
        held, place = constant.clone(), constant.data_ptr()
        constant.data = torch.zeros(3)  # a tensor can let go of its memory
        return program, held, place

    program, held, place = make()
    gc.collect()
    assert [storage.data_ptr() for storage in program._held] == [place]
    assert torch.equal(torch.tensor(program._held[0], dtype=torch.uint8).view(torch.float32), held)


def test_calls_on_another_stream_wait_for_the_last(cuda: EmulatedCuda) -> None:
    program, x = capture(lambda x: x * 2, torch.ones(3)), torch.ones(3)
    program(x)
    cuda.log.clear()
    program(x)
    assert cuda.log == ["replayed on default"]
    other = cuda.new_stream()
    with cuda.use(other):
        program(x)
        program(x)
    program(x)
    assert cuda.log[1:] == [
        f"{other.name} waits for what default did",
        f"replayed on {other.name}",
        f"replayed on {other.name}",
        f"default waits for what {other.name} did",
        "replayed on default",
    ]


def test_a_dropped_program_gives_its_memory_back_once_it_has_run(cuda: EmulatedCuda) -> None:
    program = capture(lambda x: x * 2, torch.ones(3))
    program(torch.ones(3))
    cuda.log.clear()
    del program
    gc.collect()
    assert cuda.log == ["waited for what default did", "reset"]


constant, numbers = torch.zeros(3), iter(range(100))


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda x: x.add_(1), "changes a tensor that is not its own"),
        (lambda x: x.view(3, 1).mul_(2), "changes a tensor that is not its own"),
        (lambda x: constant.copy_(x), "changes a tensor that is not its own"),
        (lambda x: qkernels.channel_absmax(x[None], constant), "changes a tensor that is not its own"),
        (lambda x: torch.add(x, 1, out=constant), "changes a tensor that is not its own"),
        (lambda x: x * x.sum().item(), "reads numbers out of a tensor"),
        (lambda x: x[x > 0], "reads numbers out of a tensor"),
        (lambda x: torch.rand_like(x) + x, "draws random numbers"),
        (lambda x: F.dropout(x), "draws random numbers"),
        (lambda x: (x.to("meta"), x)[1], "copies between devices"),
        (lambda x: x + next(numbers), "a replay gave other numbers"),
    ],
)
def test_refusals(cuda: EmulatedCuda, function: Any, said: str) -> None:
    x = torch.ones(3)
    with pytest.raises(UnrecordableError, match=said):
        capture(function, x)
    if "changes" in said:
        assert torch.equal(x, torch.ones(3)) and torch.equal(constant, torch.zeros(3))


def test_its_own_tensors_it_may_change(cuda: EmulatedCuda) -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:2].copy_(x[:2])
        y[2:].fill_(7)
        return y.mul_(2)

    program = capture(function, torch.ones(3))
    assert program(torch.tensor([1.0, 2.0, 3.0])).tolist() == [2, 4, 14]


def test_gradients_are_refused(cuda: EmulatedCuda) -> None:
    with torch.enable_grad(), pytest.raises(UnrecordableError, match="gradients are on"):
        capture(lambda x: x, torch.ones(3))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("not permitted\nx")]
)
def test_what_only_cuda_finds_out_is_a_refusal_that_leaves_nothing(cuda: EmulatedCuda, error: Exception) -> None:
    cuda.fails = error
    with pytest.raises(UnrecordableError, match="cannot be captured: (CUDA out of memory. Tried|not permitted)$"):
        capture(lambda x: x * 2, torch.ones(3))
    assert cuda.log[-1] == "empty cache"
    error.__traceback__ = None
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is GraphProgram]
    assert alive == []


def test_a_function_s_own_error_is_no_refusal(cuda: EmulatedCuda) -> None:
    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        capture(lambda x: x + torch.ones(4), torch.ones(3))
    assert not isinstance(caught.value, UnrecordableError)
