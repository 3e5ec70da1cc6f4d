"""Runs this folder's other tests in a process where Triton's interpreter is on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # minutes of Triton's interpreter

FOLDER = Path(__file__).parent


def test_every_op_by_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QKERNELS_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(FOLDER)],
        cwd=FOLDER.parents[2],
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"under the interpreter:\n{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
