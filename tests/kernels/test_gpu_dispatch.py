"""What runs on a GPU, and what is said where it cannot: seen without one, on fake tensors and with launchers that fail.

A fake tensor says that it is on a GPU and holds nothing: whoever reads a number out of one is found out.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import qkernels
from qkernels import FallbackError, FallbackWarning, Int4Weight, Int8Weight, cuda, dispatch, reference, registry, triton
from qkernels.triton import trial

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QKERNELS_BACKEND", "QKERNELS_STRICT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setattr(trial, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton.too_old.cache_clear()
    yield
    triton.too_old.cache_clear()


def fake(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


# -- the contract on GPU tensors -------------------------------------------------------------------------------------


class Crossings(TorchDispatchMode):
    """Counts ops that carry data from one device to another: illegal while a graph is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        leaves = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
        if len({t.device.type for t in leaves}) > 1:
            self.seen.append(function._schema.name)
        return result


def weights() -> tuple[Int8Weight, Int4Weight]:
    eight = Int8Weight(fake(48, 64, dtype=torch.int8), fake(48), (48, 64), "rows16")
    half = fake(48, 1, dtype=torch.float16)
    return eight, Int4Weight(fake(48, 64, dtype=torch.uint8), half, half, (48, 64), 64, "halves128")


CALLS = {
    "rows, dynamic": lambda: qkernels.quantize_per_token(fake(3, 64), fake(64)),
    "rows, static numbers": lambda: qkernels.quantize_per_token(fake(3, 64), None, 0.1, 3),
    "rows, static tensors": lambda: qkernels.quantize_per_token(fake(3, 64), None, fake(1), fake(dtype=torch.int32)),
    "patches": lambda: qkernels.quantize_patches(fake(2, 3, 8, 8), 4, None, 0.1),
    "norm": lambda: qkernels.layer_norm_quantize(fake(3, 64), fake(64, dtype=torch.float16), None, 1e-5, fake(64), 0.2),
    "int8": lambda: qkernels.int8_linear(
        fake(3, 64, dtype=torch.int8), fake(3), weights()[0], fake(48), "gelu", fake(3, 48)
    ),
    "int8, numbers": lambda: qkernels.int8_linear(
        fake(3, 64, dtype=torch.int8), 0.1, weights()[0], out_scale=0.2, out_zero_point=3
    ),
    "int8, groups": lambda: qkernels.int8_linear(
        fake(3, 64, dtype=torch.int8), fake(3, 1), weights()[0], out_group=128
    ),
    "int4": lambda: qkernels.int4_linear(fake(3, 64, dtype=torch.float16), None, weights()[1], out_dtype=torch.float16),
    "attention": lambda: qkernels.attention(*[fake(2, 5, 2, 8)] * 3, mask=fake(5, 5), out_scale=0.1),
    "attention, dynamic": lambda: qkernels.attention(*[fake(2, 5, 2, 8)] * 3, causal=True, out_dynamic=True),
    "maxima": lambda: qkernels.channel_absmax(fake(3, 64)),
    "running maxima": lambda: qkernels.channel_absmax(fake(3, 64), fake(64)) or fake(1),
    "smoothing": lambda: qkernels.smooth_scale(fake(64), fake(64), 0.5),
    "fake quantization": lambda: qkernels.fake_quantize(fake(3, 64), 0.1, 3, -8, 7, "lsq"),
    "fake quantization, offset": lambda: qkernels.fake_quantize(
        fake(3, 64), fake(3), fake(3), -8, 7, "lsq_plus", axis=0
    ),
    "gradients": lambda: registry.call(
        "fake_quantize_backward", None, fake(3, 64), fake(3, 64), fake(3), None, -8, 7, "lsq", 0, None, 1.0, 0.0
    ),
    "rotation": lambda: qkernels.hadamard_transform(fake(3, 48)),
}


@pytest.mark.parametrize("name", CALLS)
def test_ops_read_no_number_and_cross_no_device(name: str) -> None:
    crossings = Crossings()
    with FakeTensorMode(), crossings:
        found = [t for t in tree_flatten(CALLS[name]())[0] if isinstance(t, Tensor)]
    assert found and all(t.device == GPU for t in found) and crossings.seen == []


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: qkernels.quantize_per_token(fake(3, 64), fake(64, device="cpu")),
            "smooth is on cpu but x is on cuda:0",
        ),
        (
            lambda: qkernels.quantize_per_token(fake(3, 64), None, fake(1, device="cuda:1")),
            "scale is on cuda:1 but x is on",
        ),
        (
            lambda: qkernels.int8_linear(fake(3, 64, dtype=torch.int8, device="cuda:1"), 0.1, weights()[0]),
            "weight is on cuda:0",
        ),
        (
            lambda: qkernels.int8_linear(fake(3, 64, dtype=torch.int8), fake(3, device="cpu"), weights()[0]),
            "x_scale is on cpu",
        ),
        (
            lambda: qkernels.attention(fake(2, 5, 2, 8), *[fake(2, 5, 2, 8, device="cpu")] * 2),
            "k is on cpu but q is on cuda:0",
        ),
        (lambda: qkernels.channel_absmax(fake(3, 64), fake(64, device="cpu")), "running is on cpu"),
        (lambda: qkernels.fake_quantize(fake(3), fake(1, device="cpu"), None, -8, 7, "lsq"), "scale is on cpu"),
    ],
)
def test_mixed_devices_are_refused_in_one_sentence(call: Any, said: str) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value) and "move one of them" in str(caught.value)


# -- which backend ---------------------------------------------------------------------------------------------------


def test_an_old_gpu_falls_back_with_a_sentence_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        x = fake(2, 32)
    said = "needs compute capability 8.0 or newer, and cuda:0 has 7.5"
    with pytest.warns(
        FallbackWarning, match=f"quantize_per_token: the triton backend {said}; the reference backend runs"
    ):
        assert dispatch.select("quantize_per_token", GPU, x) is reference.quantize_per_token
    assert dispatch.runner("quantize_per_token", GPU) == ("reference", f"the triton backend {said}")
    monkeypatch.setenv("QKERNELS_STRICT", "1")
    with pytest.raises(FallbackError, match="compute capability"):
        dispatch.select("quantize_per_token", GPU, x)
    assert dispatch.runner("quantize_per_token", GPU)[0] == "reference"  # telling is no running


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_old_gpu_is_handed_what_the_reference_wants(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and bfloat16 are for kernels; where none runs, floats are passed as they are."""
    monkeypatch.setattr(triton, "missing", None)
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setenv("QKERNELS_BACKEND", backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, group, dtype in (((7, 5), None, torch.float32), ((8, 0), 128, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(cuda, "device_facts", lambda index, found=capability: (found, 40, 65536))
        triton.too_old.cache_clear()
        assert dispatch.output_group(GPU) == group
        assert dispatch.attention_dtype(GPU, torch.float32) is dtype


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "missing", "triton is not installed (pip install triton)")
    with pytest.warns(FallbackWarning, match="triton is not installed.*slow reference backend runs on the GPU"):
        assert qkernels.backend_for("cuda") is reference
    assert dispatch.runner("int8_linear", "cuda")[0] == "reference"


def test_a_kernel_that_does_not_compile_falls_back_loudly_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def launcher(*args: Any, out: Any) -> None:
        tries.append(1)
        raise RuntimeError("In file included\nfatal error: Python.h: No such file or directory")

    small = trial._small
    monkeypatch.setattr(trial, "_small", lambda op, device: small(op, torch.device("cpu")))
    monkeypatch.setattr(triton, "function", lambda op: launcher)
    with FakeTensorMode():
        x = fake(2, 32)
    said = "the triton backend could not compile its kernel on cuda:0 .RuntimeError: fatal error: Python.h"
    with pytest.warns(FallbackWarning, match=f"quantize_per_token: {said}.*; the reference backend runs"):
        assert dispatch.select("quantize_per_token", GPU, x) is reference.quantize_per_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select("quantize_per_token", GPU, x) is reference.quantize_per_token
    assert len(tries) == 1


def test_a_trial_is_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trial.failure("smooth_scale", device, lambda op: lambda *a, out: tries.append(1)) is None and tries == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert trial.failure("smooth_scale", device, lambda op: lambda *a, out: tries.append(1)) is None
    assert tries == [1]


def test_too_little_memory_says_nothing_about_a_kernel() -> None:
    def full(*args: Any, out: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        trial.failure("smooth_scale", torch.device("cpu"), lambda op: full)
    assert trial.failure("smooth_scale", torch.device("cpu"), lambda op: lambda *a, out: None) is None


@pytest.mark.parametrize("op", triton.FILES)
def test_every_op_has_a_trial_that_its_backend_could_run(op: str) -> None:
    arguments, out = trial._small(op, torch.device("cpu"))
    for target in out:
        target.fill_(-128 if target.dtype == torch.int8 else float("nan"))
    getattr(reference, op)(*arguments, out=out[0] if len(out) == 1 else tuple(out))
    assert not any((target == -128).any() if target.dtype == torch.int8 else target.isnan().any() for target in out)


def test_what_runs_on_the_gpu_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert qkernels.info()["gpu_backend"] is None and "torch" in qkernels.info()["gpu_reason"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton, "unfit", lambda op, device: None)
    assert dispatch.gpu() == ("triton", None)
    monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    assert dispatch.gpu() == ("reference", "QKERNELS_BACKEND=reference forces it")
    monkeypatch.setenv("QKERNELS_BACKEND", "cuda")
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setattr(cuda, "unfit", lambda op, device: "does not have this op")
    assert dispatch.gpu() == ("triton", "QKERNELS_BACKEND=cuda forces it")
    monkeypatch.setattr(triton, "missing", "triton is not installed")
    assert dispatch.gpu() == ("reference", "the cuda backend does not have this op")


def test_what_forced_cuda_cannot_take_runs_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_BACKEND", "cuda")
    monkeypatch.setenv("QKERNELS_STRICT", "1")
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setattr(triton, "unfit", lambda op, device: None)
    monkeypatch.setattr(triton, "function", lambda op: lambda *args, **kwargs: f"triton's {op}")
    with FakeTensorMode():
        x = fake(4, 64)
    assert dispatch.select("hadamard_transform", GPU, x)(x) == "triton's hadamard_transform"
    assert dispatch.runner("hadamard_transform", GPU) == ("triton", None)


def test_a_call_whose_kernel_does_not_compile_falls_back_loudly_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial compiled, for other shapes; theirs goes on to run on the kernel."""
    from triton.runtime.errors import OutOfResources

    tries = []

    def launcher(x: Tensor, *args: Any, **kwargs: Any) -> str:
        tries.append(tuple(x.shape))
        if x.shape[-1] == 33:
            raise OutOfResources(300000, 232448, "shared memory")
        return "compiled"

    monkeypatch.setattr(dispatch, "_uncompilable", set())
    monkeypatch.setattr(triton, "unfit", lambda op, device: None)
    monkeypatch.setattr(triton, "function", lambda op: launcher)
    dispatch._compiling.cache_clear()
    monkeypatch.setattr(reference, "quantize_per_token", lambda *args, **kwargs: "reference")
    run = dispatch.select("quantize_per_token", GPU, torch.ones(2, 33))
    with pytest.warns(FallbackWarning, match="quantize_per_token: .*could not compile.*OutOfResources.*shared memory"):
        assert run(torch.ones(2, 33)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(torch.ones(2, 33)) == "reference"
        assert run(torch.ones(2, 32)) == "compiled"
    assert tries == [(2, 33), (2, 32)]
    monkeypatch.setenv("QKERNELS_STRICT", "1")
    with pytest.raises(FallbackError, match="shared memory"):
        run(torch.ones(3, 33))
    dispatch._compiling.cache_clear()


def test_a_call_that_runs_out_of_memory_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref] = []

    def full(x: Tensor, *rest: Any, out: tuple[Tensor, Tensor]) -> None:
        kept.extend(map(weakref.ref, (x, *out)))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    monkeypatch.setattr(reference, "quantize_per_token", full)
    try:
        qkernels.quantize_per_token(torch.ones(2, 3))
    except torch.OutOfMemoryError:
        pass
    gc.collect()
    assert len(kept) == 3 and all(r() is None for r in kept)
