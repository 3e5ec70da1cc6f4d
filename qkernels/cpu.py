"""The CPU backend: functions of the same names and arguments as in `qkernels.reference`, over `qkernels._native`.

Arguments were validated in `qkernels.ops`. Float inputs may be float32, bfloat16 or float16. A function takes every case that `supports`
lets through.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from qkernels.weights import Int4Weight, Int8Weight

# Found or not, never "found but broken": an extension that fails to import raises.
native: Any = importlib.import_module("qkernels._native") if importlib.util.find_spec("qkernels._native") else None
missing: str | None = None
if native is None:
    missing = "qkernels was installed without its native code (no C++ compiler was found then; install g++ and reinstall)"

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # QkType in csrc/cpu/ops.h
ACTIVATIONS = {None: 0, "gelu": 1, "quick_gelu": 2, "gelu_tanh": 3}

_tier_wanted: str | None = None


def use_tier(name: str | None) -> None:
    """Run `name` (`scalar`, `avx2`, `avx512vnni`) from now on; None means the best one.

    Raises ValueError where the name is unknown or the processor cannot run it.
    """
    global _tier_wanted
    if name != _tier_wanted:
        native.set_tier(name or native.tiers()[-1])
        _tier_wanted = name


def supports(op: str, *args: Any, **kwargs: Any) -> str | None:
    """None where this backend runs `op` with these arguments, else the reason, worded to follow "the cpu backend"."""
    limits = _limits.get(op)
    if limits is None:
        return "does not have this op"
    return limits(*args, **kwargs)


def _always(*args: Any, **kwargs: Any) -> str | None:
    return None


def _address(tensor: Tensor | None) -> int:
    """data_ptr, or a null pointer for None. The caller keeps the tensor alive."""
    return 0 if tensor is None else tensor.data_ptr()


# One line an op: what it cannot take. An op that is not here falls back.
_limits: dict[str, Any] = {}
