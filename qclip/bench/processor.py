"""The processor that is measured on: its cores, its speed at this moment, and its instruction sets, which every
contender should use alike."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

SLOW = 0.75  # a round counts if the processor then ran at this share of its best speed
#: What holds each library to an instruction set: our tier -> variable -> value.
HOLD = {
    "avx2": {
        "QKERNELS_CPU_TIER": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
}
TORCH_HELD_BY = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


def keep_to_cores() -> None:
    """Keep this process, and the threads that it will start, to as many processors as torch has threads, each
    on a core of its own where there are enough cores.

    Binding OpenMP's threads alone would put all threads of other pools on one core.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    usable = sorted(os.sched_getaffinity(0))
    cores: dict[object, int] = {}
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(path.read_text() if path.is_file() else cpu, cpu)
    first = list(cores.values())
    chosen = (first + [cpu for cpu in usable if cpu not in first])[: torch.get_num_threads()]
    os.sched_setaffinity(0, chosen)


def peak(threads: int | None = None) -> float | None:
    """INT8 operations per nanosecond of registers alone, now; None without native code."""
    import qkernels

    return qkernels.cpu.peak_gops(threads) if qkernels.info()["built"] else None


def crowded(best: float, threads: int) -> str | None:
    """What to say where the run was slow from start to end, so that no round stood out: threads that share a core, a
    neighbour that never rests."""
    together = threads * max(peak(1) or 0.0 for _ in range(3))
    if best >= SLOW * together:
        return None
    return (
        f"{threads} threads reached {best / together:.0%} of {threads} times one thread's INT8 peak: do they share "
        "cores?"
    )


def tiers() -> tuple[str | None, list[str]]:
    """The tier that our kernels use, and all that this processor has, the best one last."""
    import qkernels

    info = qkernels.info()
    return info["tier"], info["tiers"]


def settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of the variables of `HOLD` that are set."""
    return {name: environment[name] for name in HOLD["avx2"] if name in environment}


def unequal(
    held_by: Iterable[str], tier: str | None, all_tiers: list[str], environment: Mapping[str, str] = os.environ
) -> str | None:
    """Why a library that the variables `held_by` hold to an instruction set uses another one than our `tier`; None
    where both use the best that the processor has, or are held alike."""
    ours_held = bool(all_tiers) and tier != all_tiers[-1]
    held_by = tuple(held_by)
    if not ours_held:
        lower = [f"{name}={environment[name]}" for name in held_by if environment.get(name)]
        return f"is held by {' '.join(lower)}, our kernels are not (they run {tier})" if lower else None
    if not held_by:
        return f"cannot be held to {tier}, as our kernels are, and runs the best that this processor has"
    wanted = HOLD.get(str(tier), {})
    missing = [
        f"{name}={wanted.get(name, '?')}"
        for name in held_by
        if name not in wanted or environment.get(name, "").lower() != wanted[name].lower()
    ]
    if missing and wanted:
        return f"is not held to {tier}, as our kernels are; set {' '.join(missing)}"
    return f"cannot be held to {tier}, as our kernels are" if missing else None


def beyond(instructions: str, tier: str | None) -> bool:
    """Whether a library tells of instructions that our `tier` does without: oneDNN's variable, for one, holds its own
    kernels, but not those which OpenVINO has beside them."""
    return tier in ("scalar", "avx2", "avxvnni") and bool(re.search("avx512|amx", instructions.lower()))


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor adds four products of bytes into 32 bits; without it, libraries for x86 add pairs of
    products in 16 bits, which can saturate. True where it is no x86 processor."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    flags = re.search(r"^flags\s*:(.*)$", text, re.M)
    return flags is None or bool({"avx512_vnni", "avx_vnni"} & set(flags[1].split()))


def saturates(held_by: Iterable[str], tier: str | None, all_tiers: list[str]) -> bool:
    """Whether INT8 sums of a library can saturate here: there is no VNNI, or it is held to less."""
    held_by = tuple(held_by)
    held = bool(held_by) and str(tier) == "avx2" and unequal(held_by, tier, all_tiers) is None
    return not has_vnni() or held
