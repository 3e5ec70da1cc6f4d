"""Thousands of random calls of the ops, good and bad: none is wrong, and none brings the process down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qkernels import cpu

pytestmark = pytest.mark.slow  # thousands of calls

ROOT = Path(__file__).resolve().parents[2]
TIERS = ["reference"] if cpu.native is None else list(cpu.native.tiers())


@pytest.mark.parametrize("tier", TIERS)
def test_random_calls(tier: str, full: bool, tmp_path: Path) -> None:
    """1,500 calls over the tiers that this processor runs, 12,200 with --full; each tier draws its own."""
    share = (12_200 if full else 1_500) // len(TIERS)
    log = tmp_path / "calls"
    command = [sys.executable, "-m", "tests.hostile.kernel_calls", str(TIERS.index(tier)), str(share), str(log)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QKERNELS_CPU_TIER": tier}
    if tier == "reference":
        environment = {**environment, "QKERNELS_CPU_TIER": "", "QKERNELS_BACKEND": "reference"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = log.read_text().splitlines()[-1] if log.exists() else "before the first call"
    assert done.returncode >= 0, f"signal {-done.returncode} in call {last}"
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}\nlast: {last}"
    counts = done.stdout.rsplit("{", 1)[1]
    assert "'wrong': 0" in counts and "'right': 0" not in counts and "'refused': 0" not in counts
