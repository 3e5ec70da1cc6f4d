"""The device under test, and the facts that a result is worth nothing without."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
#: INT8 tensor-core operations per second by NVIDIA's data sheets, dense
INT8_PEAKS = {"H100 PCIe": 1513e12, "H100": 1979e12, "H200": 1979e12, "A100": 624e12}


class Machine:
    """A GPU, or with `dry` the CPU: the same code at tiny sizes, whose times mean nothing."""

    def __init__(self, dry: bool) -> None:
        self.tiny = dry
        self.device = torch.device("cpu" if dry else "cuda")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def usable(self) -> None:
        """Raises where a failed kernel has taken the device with it."""
        torch.zeros(1, device=self.device).add_(1).item()

    @property
    def name(self) -> str:
        return "CPU, dry run" if self.tiny else torch.cuda.get_device_name()

    @property
    def int8_peak(self) -> float | None:
        return next((peak for chip, peak in INT8_PEAKS.items() if chip in self.name), None)

    def backends(self) -> list[str]:
        """Those with kernels for this device; in a dry run Triton's interpreter, or what a CPU has."""
        from qkernels import dispatch

        found = [
            n
            for n in ("triton", "cuda")
            if n in dispatch.BACKENDS and getattr(dispatch.BACKENDS[n], "missing", None) is None
        ]
        if not self.tiny:
            return found
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and "triton" in found
        return ["triton"] if interpreted else ["reference"]

    def facts(self) -> dict[str, Any]:
        import qkernels

        found: dict[str, Any] = {
            "device": self.name,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "host": platform.platform(),
            "cores": os.cpu_count(),
            "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
            "source": source_hash(),
            "kernels": {k: v for k, v in qkernels.info().items() if k != "forced"},
            "nvcc": (_output("nvcc", "--version") or "").splitlines()[-1:],
        }
        if not self.tiny:
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "capability": list(torch.cuda.get_device_capability()),
                "sms": properties.multi_processor_count,
                "memory": properties.total_memory,
                "l2": properties.L2_cache_size,
            }
            query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
            said = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
            found["nvidia_smi"] = dict(zip(query.split(","), (said or "").split(", "), strict=False))
        return found


def source_hash() -> str:
    """Of everything that decides what is measured: results of other sources are not gone on with."""
    digest = hashlib.sha256()
    for folder in ("qkernels", "qclip/layers", "qclip/models", "csrc", "benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cc", ".cu", ".cuh", ".h", ".def"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None
