"""The kernels of csrc/cuda on this machine's CPU: the same sources, compiled by g++ against the emulated GPU of
`emulated/`, called through `qkernels.cuda` with CPU tensors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import cuda
from tests.once import alone, shared_folder

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "csrc/cuda"
# All but those that are written for one chip's own instructions.
SOURCES = ("quantize.cu", "fake_quantize.cu", "int4_linear.cu")
STRICT = "-std=c++20 -O2 -fPIC -shared -ffp-contract=off -Wall -Wextra -Werror"
FLAGS = "-std=c++20 -O1 -fPIC -shared -ffp-contract=off -U_FORTIFY_SOURCE -Wall -Wno-unknown-pragmas -Wno-clobbered"


def library(target: Path, flags: list[str], sources: list[Path]) -> ctypes.CDLL:
    """`target`, compiled unless another process of this test run did."""
    with alone(target.with_suffix("")):
        if not target.exists():
            command = ["g++", *flags, *map(str, sources), "-o", str(target)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`emulator.cc`: the INT8 linear map's loops and epilogue over models of the instructions."""
    if not KERNELS.is_dir() or shutil.which("g++") is None:
        pytest.skip("needs a checkout and g++")
    flags = [*STRICT.split(), f"-I{KERNELS}"]
    loaded = library(shared_folder(tmp_path_factory) / "emulator.so", flags, [HERE / "emulator.cc"])
    loaded.emulator_message.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    flags = [*FLAGS.split(), f"-I{HERE / 'emulated'}", "-x", "c++"]
    sources = [KERNELS / "device.cu", *(KERNELS / name for name in SOURCES)]
    return library(shared_folder(tmp_path_factory) / "emulated_cuda.so", flags, sources)


@pytest.fixture
def emulated(emulated_library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`qkernels.cuda`, its kernels running on the CPU."""

    parameters = cuda.functions(emulated_library)

    def launch(name: str, device: torch.device, **arguments: Any) -> None:
        assert device.type == "cpu"
        assert getattr(emulated_library, f"qk_cuda_{name}")(*parameters[name].words(arguments), 0, None) == 0

    monkeypatch.setattr(cuda, "launch", launch)
    return cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the emulated GPU runs is slow, to build and to run."""
    for item in items:
        if {"emulator", "emulated_library"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
