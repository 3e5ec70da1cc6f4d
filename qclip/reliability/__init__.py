"""What quantization did to reliability: accuracy, calibration, detection, noise, shift and groups, paired."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    # The engine imports the model libraries: a metric on arrays does without them.
    if name == "evaluate":
        from .engine import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
