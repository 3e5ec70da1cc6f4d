"""Two processes. Where `TRITON_INTERPRET=1` is set, the tests of the ops are collected and run by Triton's interpreter
on CPU tensors. Elsewhere they are left out, `test_aot.py` compiles ahead of time, and `test_interpreter.py` runs this
folder once more in a process that has the variable: triton reads it when it is imported.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/test_int8_linear.py
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILING = ["test_aot.py", "test_interpreter.py", "test_numerics.py"]


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the files of the other process."""
    name = collection_path.name
    return True if name.startswith("test_") and (name in COMPILING) == INTERPRETED else None


@pytest.fixture(autouse=True)
def triton_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public ops run the Triton kernels, or fail: no fall-back."""
    pytest.importorskip("triton", reason="needs triton")
    if INTERPRETED:
        if _version("triton") < (3, 8) and _version("numpy") >= (2, 4):  # arrays of one number are no numbers there
            pytest.skip("needs Triton 3.8 or numpy below 2.4: Triton's interpreter")
        monkeypatch.setenv("QKERNELS_BACKEND", "triton")
        monkeypatch.setenv("QKERNELS_STRICT", "1")
