"""setup.py: builds with a compiler, installs without one, and fails where a compiler fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # runs compilers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """setup.py with a small csrc: the bindings, and one op."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs a checkout with setup.py")
    for name in ("ninja", "pybind11", "setuptools"):
        pytest.importorskip(name, reason=f"needs {name} to build")
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "qkernels").mkdir()
    (tmp_path / "qkernels/__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "small"\nversion = "0"\n[tool.setuptools]\npackages = ["qkernels"]\n'
    )
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "csrc/bindings.cc", tmp_path / "csrc")
    for name in ("ops.h", "dispatch.cc", "parallel.h", "program.h", "simd.h", "simd_neon.h"):
        shutil.copy(ROOT / "csrc/cpu" / name, tmp_path / "csrc/cpu")
    (tmp_path / "csrc/cpu/ops.def").write_text(
        "QK_OP(double_all, const float* x, std::int64_t n, float* out, int threads)\n"
    )
    (tmp_path / "csrc/cpu/double_all.cc").write_text(
        '#include "parallel.h"\n#include "simd.h"\n'
        'extern "C" void QK_IMPL(double_all)(const float* x, std::int64_t n, float* out, int threads) {\n'
        "  parallel_for(threads, n, 4, [&](std::int64_t begin, std::int64_t end) {\n"
        "    for (std::int64_t i = begin; i < end; ++i) out[i] = 2.0f * x[i];\n  });\n}\n"
    )
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def compiler_or_skip() -> None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("needs a C++ compiler")


def test_an_op_is_a_file_and_a_line(checkout: Path) -> None:
    compiler_or_skip()
    run = build(checkout)
    assert run.returncode == 0, run.stdout + run.stderr
    code = (
        "import array, qkernels._native as n\n"
        "x = array.array('f', range(9)); y = array.array('f', [0] * 9)\n"
        "for tier in n.tiers():\n"
        "    n.set_tier(tier); n.double_all(x.buffer_info()[0], 9, y.buffer_info()[0], 2)\n"
        "    assert list(y) == [2 * v for v in x], tier\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True)
    again = build(checkout)
    assert "no work to do" in again.stdout
    (checkout / "csrc/cpu/simd.h").touch()
    assert "compile" in build(checkout).stdout, "a changed header must rebuild what includes it"


def test_without_a_compiler_it_installs_with_one_warning(checkout: Path) -> None:
    run = build(checkout, CXX="no-such-compiler")
    assert run.returncode == 0, run.stdout + run.stderr
    assert not list((checkout / "qkernels").glob("*.so"))
    assert (run.stdout + run.stderr).count("no C++ compiler was found") == 1
    wheel = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "out", "."],
        cwd=checkout,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert wheel.returncode == 0, wheel.stdout + wheel.stderr
    assert len(list((checkout / "out").glob("*.whl"))) == 1


def test_a_compiler_that_fails_stops_the_build(checkout: Path) -> None:
    compiler_or_skip()
    (checkout / "csrc/bindings.cc").write_text("int nothing;\n")
    (checkout / "csrc/cpu/double_all.cc").write_text("this is not C++\n")
    run = build(checkout)
    assert run.returncode != 0 and "double_all" in run.stdout + run.stderr
    assert not list((checkout / "qkernels").glob("*.so"))


def test_flags_from_the_environment_are_used(checkout: Path) -> None:
    compiler_or_skip()
    (checkout / "csrc/bindings.cc").write_text("#if QK_SEEN != 12\n#error CXXFLAGS was ignored\n#endif\n")
    run = build(checkout, CXXFLAGS="-DQK_SEEN='(3 * 4)'", LDFLAGS="-Wl,--no-undefined-version")
    assert run.returncode == 0, run.stdout + run.stderr
    text = next((checkout / "build").rglob("build.ninja")).read_text()
    assert "QK_SEEN=(3 * 4)" in text and "-Wl,--no-undefined-version" in text


@pytest.fixture
def cuda_checkout(checkout: Path) -> Path:
    """The same, with a CUDA library of one function."""
    (checkout / "csrc/cuda").mkdir()
    (checkout / "csrc/cuda/seven_sm80.cu").write_text(
        '__global__ void kernel(int* x) { *x = 7; }\nextern "C" __attribute__((visibility("default"))) int seven() '
        "{ kernel<<<1, 1>>>(nullptr); return cudaGetLastError(); }\n"
    )
    return checkout


def fake_nvcc(directory: Path, script: str) -> str:
    """A CUDA_HOME whose nvcc is a shell script."""
    (directory / "home/bin").mkdir(parents=True)
    nvcc = directory / "home/bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(directory / "home")


@pytest.mark.parametrize(
    "script, sentence",
    [
        ("echo release 11.8", "nvcc is release 11.8, and 12.5 or newer is needed"),
        ("echo hello", "nvcc is of unknown version"),
        ("echo release 13.0; [ $1 = --version ] || { echo no host compiler >&2; exit 1; }", ": no host compiler"),
        (None, "QKERNELS_CUDA=0 is set"),
    ],
    ids=["old", "unknown", "broken", "unwanted"],
)
def test_without_a_working_nvcc_everything_else_is_built(
    cuda_checkout: Path, script: str | None, sentence: str
) -> None:
    compiler_or_skip()
    wanted = {"QKERNELS_CUDA": "0"} if script is None else {"CUDA_HOME": fake_nvcc(cuda_checkout, script)}
    run = build(cuda_checkout, **wanted)
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert sentence in said and said.count("so the CUDA kernels are not built") == 1
    assert [path.name.split(".")[0] for path in (cuda_checkout / "qkernels").glob("*.so")] == ["_native"]


def test_the_cuda_library_loads_without_a_driver(cuda_checkout: Path) -> None:
    compiler_or_skip()
    run = build(cuda_checkout)
    if "so the CUDA kernels are not built" in run.stdout + run.stderr:
        pytest.skip("needs nvcc 12.5 or newer")
    assert run.returncode == 0, run.stdout + run.stderr
    text = next((cuda_checkout / "build").rglob("_cuda/build.ninja")).read_text()
    assert "sm_90a" not in text.split("seven_sm80.o: compile")[1], "a file of one target is compiled for it alone"
    code = "import ctypes, glob; print(ctypes.CDLL(glob.glob('qkernels/_cuda*.so')[0]).seven())"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=cuda_checkout, capture_output=True, text=True)
    assert loaded.returncode == 0 and loaded.stdout.strip().isdigit(), loaded.stderr


def test_a_second_install_compiles_nothing(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Editable installs build in folders that are new each time, isolated ones bring new copies of pybind11."""
    compiler_or_skip()
    said = []
    for _ in range(2):
        headers = tmp_path_factory.mktemp("isolated")
        shutil.copytree(
            Path(pytest.importorskip("pybind11", reason="needs pybind11").__file__).parent, headers / "pybind11"
        )
        code = (
            "import sys; from setuptools import build_meta as b\n"
            f"b.build_editable({str(tmp_path_factory.mktemp('wheel'))!r})\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(headers), "QKERNELS_CUDA": "0"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        said.append(run.stdout)
        assert list((checkout / "qkernels").glob("_native*.so")), "an editable install has its library in the sources"
    assert "] compile " in said[0], said[0]
    assert "] compile " not in said[1] and "no work to do" in said[1], said[1]
