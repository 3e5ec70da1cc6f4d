"""What quantization did to reliability: accuracy, calibration, detection, noise, shift and groups, paired."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import check, evaluate

__all__ = ["check", "evaluate"]


def __getattr__(name: str) -> Any:
    # The engine imports the model libraries: a metric on arrays does without them.
    if name in __all__:
        from . import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
