"""Which backend runs, what is said about it, and what the environment can force."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import qkernels
from qkernels import FallbackError, FallbackWarning, Int4Weight, Int8Weight, cpu, dispatch, reference, triton
from tests.kernels import remote


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QKERNELS_BACKEND", "QKERNELS_CPU_TIER", "QKERNELS_STRICT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "_announced", set())


@pytest.fixture
def built() -> None:
    if cpu.native is None:
        pytest.skip(f"needs the native kernels: {cpu.missing}")


def small() -> tuple[torch.Tensor, torch.Tensor, Int8Weight]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 20), generator=generator, dtype=torch.int8)
    return x, torch.rand(3, generator=generator), Int8Weight.quantize(torch.randn(5, 20, generator=generator))


def test_backend_by_device_and_environment(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert qkernels.backend_for("cpu") is cpu and qkernels.backend_for(torch.device("meta")) is reference
    monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    assert qkernels.backend_for("cpu") is reference
    assert qkernels.pack(Int8Weight.quantize(torch.ones(2, 2))).layout == "canonical"
    monkeypatch.setenv("QKERNELS_BACKEND", "cpu")
    assert qkernels.backend_for("cpu") is cpu
    monkeypatch.setenv("QKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="QKERNELS_BACKEND=fast is not a backend.*reference, cpu"):
        qkernels.backend_for("cpu")


def test_what_is_handed_over_between_ops_on_a_gpu(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v of float32 models in bfloat16, results of linear ops in groups; elsewhere neither unless the processor
    multiplies bfloat16."""
    monkeypatch.setattr(triton, "missing", None)
    assert dispatch.attention_dtype("cuda", torch.float32) is torch.bfloat16
    assert dispatch.attention_dtype(torch.device("cuda", 1), torch.float16) is torch.float16
    assert dispatch.attention_dtype("cuda", torch.bfloat16) is torch.bfloat16
    assert qkernels.output_group("cuda") == 128 and qkernels.output_group("cpu") is None
    for bf16 in (True, False):
        monkeypatch.setattr(cpu, "native", type("Native", (), {"has_bf16": lambda self, bf16=bf16: bf16})())
        monkeypatch.setattr(dispatch, "_use_tier", lambda: None)
        assert dispatch.attention_dtype("cpu", torch.float32) is (torch.bfloat16 if bf16 else torch.float32)
    monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    assert dispatch.attention_dtype("cuda", torch.float32) is torch.float32
    assert qkernels.output_group("cuda") is None


def test_gpu_tensors_run_on_triton_and_cpu_tensors_only_by_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "missing", None)
    assert qkernels.backend_for("cuda") is triton
    monkeypatch.setenv("QKERNELS_BACKEND", "triton")
    assert qkernels.backend_for("cuda") is triton and qkernels.backend_for("meta") is reference
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="QKERNELS_BACKEND=triton, but this tensor is on the CPU.*TRITON_INTERPRET=1"):
        qkernels.backend_for("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert qkernels.backend_for("cpu") is triton
    assert qkernels.pack(Int8Weight.quantize(torch.ones(2, 20))).layout == "rows16"
    assert qkernels.pack(Int4Weight.quantize(torch.ones(2, 20))).layout == "halves128"
    x, scale, weight = small()
    assert triton.supports("no_such_op", x) == "does not have this op"


def test_without_triton_gpu_tensors_run_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "missing", "triton is not installed")
    with pytest.warns(FallbackWarning, match="triton is not installed: the slow reference backend runs on the GPU"):
        assert qkernels.backend_for("cuda") is reference
    monkeypatch.setenv("QKERNELS_BACKEND", "triton")
    with pytest.raises(ValueError, match="QKERNELS_BACKEND=triton, but triton is not installed"):
        qkernels.backend_for("cuda")


def test_import_works_without_triton_and_loads_no_kernel() -> None:
    code = "import sys; sys.modules['triton'] = None; import qkernels, qkernels.triton as t; sys.exit(not t.missing)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, qkernels; sys.exit(any(name.startswith('qkernels.triton.') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tier_by_environment(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for tier in cpu.native.tiers():
        monkeypatch.setenv("QKERNELS_CPU_TIER", tier)
        assert qkernels.info()["tier"] == tier
        qkernels.backend_for("cpu")
        assert cpu.native.tier() == tier
    monkeypatch.setenv("QKERNELS_CPU_TIER", "sse9")
    with pytest.raises(ValueError, match="unknown CPU tier 'sse9'"):
        qkernels.backend_for("cpu")
    monkeypatch.delenv("QKERNELS_CPU_TIER")
    qkernels.backend_for("cpu")
    assert cpu.native.tier() == cpu.native.tiers()[-1]


def test_the_neon_tier_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := remote.missing("neon"):
        pytest.skip(why)
    assert remote.install(monkeypatch, "neon").can_run


def test_packing_follows_the_backend(built: None) -> None:
    assert qkernels.pack(Int8Weight.quantize(torch.ones(2, 2))).layout == "vnni64"
    assert qkernels.pack(Int4Weight.quantize(torch.ones(2, 2))).layout == "nibble64"


def test_a_canonical_weight_runs_on_the_reference_and_says_so_once(built: None) -> None:
    x, scale, weight = small()
    with pytest.warns(
        FallbackWarning, match="int8_linear: the cpu backend wants a weight in layout 'vnni64'.*reference backend runs"
    ):
        y = qkernels.int8_linear(x, scale, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(qkernels.int8_linear(x, scale, weight), y)
        assert torch.allclose(qkernels.int8_linear(x, scale, qkernels.pack(weight)), y)


def test_strict_turns_a_fall_back_into_an_error(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale, weight = small()
    monkeypatch.setenv("QKERNELS_STRICT", "1")
    with pytest.raises(FallbackError, match="vnni64.*QKERNELS_STRICT"):
        qkernels.int8_linear(x, scale, weight)
    qkernels.int8_linear(x, scale, qkernels.pack(weight))


def test_an_op_that_the_backend_lacks_falls_back(built: None) -> None:
    assert cpu.supports("no_such_op") == "does not have this op"
    assert cpu.supports("int8_linear", *small()) is not None


def test_without_native_code_the_reference_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "missing", "qkernels was installed without its native code")
    x, scale, weight = small()
    with pytest.warns(FallbackWarning, match="without its native code: the slow reference backend runs") as caught:
        qkernels.int8_linear(x, scale, qkernels.pack(weight))
        qkernels.quantize_per_token(torch.ones(2, 2))
    assert len(caught) == 1
    info = qkernels.info()
    assert not info["built"] and info["reason"] and info["tier"] is None and info["backend"] == "reference"
    monkeypatch.setenv("QKERNELS_BACKEND", "cpu")
    with pytest.raises(ValueError, match="QKERNELS_BACKEND=cpu, but qkernels was installed without"):
        qkernels.backend_for("cpu")
    with pytest.raises(RuntimeError, match="no peak can be measured"):
        cpu.peak_gops()


def test_info_says_what_runs(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    info = qkernels.info()
    assert info["built"] and info["reason"] is None and info["backend"] == "cpu" and info["forced"] == {}
    assert info["tier"] in info["tiers"] and info["tiers"][0] == "scalar" and info["threads"] == torch.get_num_threads()
    monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    assert qkernels.info()["backend"] == "reference" and qkernels.info()["forced"] == {"QKERNELS_BACKEND": "reference"}


def test_peak_is_measured_on_every_tier(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {}
    for tier in cpu.native.tiers():
        monkeypatch.setenv("QKERNELS_CPU_TIER", tier)
        qkernels.backend_for("cpu")
        peaks[tier] = cpu.peak_gops(1)
    # A register loop cannot be slower than 0.1 or faster than 10,000 GOPS on one core of any processor; a wrong count
    # would be.
    assert all(0.1 < peak < 10_000 for peak in peaks.values()), peaks


def test_module_reports_and_checks_itself(built: None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QKERNELS_")}
    run = subprocess.run([sys.executable, "-m", "qkernels"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "native code     built" in run.stdout and "FAILED" not in run.stdout
    assert all(f"{tier:<11} ok" in run.stdout for tier in cpu.native.tiers())


def test_self_check_sees_a_wrong_kernel(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkernels import __main__ as module

    real = cpu.int8_linear
    monkeypatch.setattr(cpu, "int8_linear", lambda *args, **kwargs: real(*args, **kwargs) + 1)
    assert set(module.self_check().values()) == {"FAILED: int8_linear"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("QKERNELS_BACKEND", "cpuu", "QKERNELS_BACKEND=cpuu is not a backend of this version; known:"),
        ("QKERNELS_CPU_TIER", "avx", "QKERNELS_CPU_TIER=avx: unknown CPU tier 'avx'"),
    ],
)
def test_the_report_says_a_bad_environment_in_one_sentence(name, value, said, monkeypatch, capsys):
    from qkernels.__main__ import main

    monkeypatch.setenv(name, value)
    assert main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"qkernels: {said}") and err.count("\n") == 1


def test_a_forked_process_goes_on_with_one_thread() -> None:
    """OpenMP's threads stay behind in the parent; a child that waited for them would hang."""
    if cpu.native is None or not hasattr(os, "fork"):
        pytest.skip("needs the native kernels and fork")
    code = (
        "import os, signal, torch, qkernels\n"
        "torch.set_num_threads(2)\n"
        "w = qkernels.pack(qkernels.Int8Weight.quantize(torch.randn(256, 256)))\n"
        "x = torch.randn(512, 256)\n"
        "w4 = qkernels.pack(qkernels.Int4Weight.quantize(torch.randn(256, 256)))\n"
        "q = torch.randn(4, 50, 4, 16)\n"
        "def run():\n"
        "    codes, scales = qkernels.layer_norm_quantize(x, None, None, 1e-5)\n"
        "    y = qkernels.int8_linear(codes, scales, w), qkernels.int4_linear(codes, scales, w4)\n"
        "    return *y, *qkernels.quantize_per_token(x), qkernels.attention(q, q, q), qkernels.hadamard_transform(x)\n"
        "same = lambda a, b: all((p.numpy() == q.numpy()).all() for p, q in zip(a, b))\n"  # torch's own would hang
        "y = run()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(20)\n"
        "    os._exit(0 if same(run(), y) else 3)\n"
        "assert os.waitpid(pid, 0)[1] == 0, 'the child hung or differed'\n"
        "assert same(run(), y)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
