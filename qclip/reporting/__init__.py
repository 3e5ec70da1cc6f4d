"""Results -> one HTML page or a terminal table. Reads nothing but `Results`; the JSON is `Results.to_json`."""

from .page import html, report
from .table import table

__all__ = ["html", "report", "table"]
