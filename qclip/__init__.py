"""Quantize CLIP-like models on real kernels, and show what that did to their reliability.

import qclip
model = qclip.load_model("photos")
small = qclip.quantize(model, "w8a8")
results = qclip.evaluate({"float": model, "w8a8": small}, data="scenes:test")
print(qclip.table(results))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import load, save
    from .choosing import choose
    from .controls import controlled
    from .models import towers
    from .models.encoders import encoders
    from .models.replay import program_counts
    from .ptq import quantize, quantize_
    from .recipes import Recipe
    from .reliability import evaluate
    from .reporting.page import report
    from .reporting.table import table
    from .results import Results
    from .rewrite import Coverage, coverage, dequantize_
    from .sensitivities import budgeted, sensitivity
    from .spectral import weight_spectrum
    from .training import convert, prepare, train
    from .verification import verify
    from .zoo import load_model

    __version__: str

# Where each public name lives.
_PUBLIC = {
    "load_model": "zoo",
    "quantize": "ptq",
    "quantize_": "ptq",
    "dequantize_": "rewrite",
    "coverage": "rewrite",
    "Coverage": "rewrite",
    "save": "artifact",
    "load": "artifact",
    "towers": "models",
    "encoders": "models",
    "program_counts": "models.replay",
    "evaluate": "reliability",
    "Results": "results",
    "report": "reporting",
    "table": "reporting",
    "Recipe": "recipes",
    "weight_spectrum": "spectral",
    "verify": "verification",
    "choose": "choosing",
    "sensitivity": "sensitivities",
    "budgeted": "sensitivities",
    "prepare": "training",
    "convert": "training",
    "train": "training",
    "controlled": "controls",
}

__all__ = [
    "Coverage",
    "Recipe",
    "Results",
    "budgeted",
    "choose",
    "convert",
    "coverage",
    "dequantize_",
    "encoders",
    "evaluate",
    "load",
    "load_model",
    "prepare",
    "program_counts",
    "quantize",
    "quantize_",
    "report",
    "save",
    "sensitivity",
    "controlled",
    "table",
    "towers",
    "train",
    "verify",
    "weight_spectrum",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qclip' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # not at once: it takes longer than all of this file

    try:
        return version("qclip")
    except PackageNotFoundError:  # used from a checkout that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
