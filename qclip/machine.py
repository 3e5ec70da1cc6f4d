"""The environment that numbers were measured in: the processor's name, versions, threads."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment(**facts: Any) -> dict[str, Any]:
    """Versions, processor and threads, and `facts` of the caller, for `Results.meta`."""
    import numpy as np
    import torch

    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    for package in ("qclip", "open_clip_torch", "timm", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": sys.platform,
    } | facts


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
