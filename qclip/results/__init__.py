"""One tidy table for everything that is measured: rows, curves beside them, notes, and what they were made with."""

from __future__ import annotations

from .table import COLUMNS, KEY, ROLES, VERSION, Curve, Results, Row

__all__ = ["COLUMNS", "KEY", "ROLES", "VERSION", "Curve", "Results", "Row"]
