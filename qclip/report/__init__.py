"""Results -> one HTML page or a terminal table. Reads nothing but `Results`; the JSON is `Results.to_json`."""

from __future__ import annotations

import sys
import types
from typing import Any

from .page import html, report
from .table import table

__all__ = ["html", "report", "table"]


class _Module(types.ModuleType):
    """`qclip.report` is this package as soon as anything of it is imported, and the function in the public API: so the
    package can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Module
