"""Where in a TOML file something stands: `tomllib` does not say, and whoever reads a refusal wants the line."""

from __future__ import annotations

import json
import re


def line_of(text: str, table: str, key: str, value: object = None, at: int = 0) -> int:
    """The line (from 1) of `key` in `table` ("": before all tables; at: in which of several tables of that name), or,
    with a value, the first line from there on that holds it; the last place that was found where there is none."""
    lines = text.splitlines()
    own = rf"""["']?{re.escape(key)}["']?\s*="""
    short = rf"{re.escape(table)}\s*(=|\.\s*{own})"  # TABLE = {KEY = ...} and TABLE.KEY = ..., before all headings
    top, inside, seen, found, header = True, table == "", -1, 0, 1
    for number, line in enumerate(lines, 1):
        heading = re.match(r"\s*\[{1,2}\s*([^\]]+?)\s*\]", line)
        if heading:
            if found:
                break
            top = False
            if heading[1] == table:
                seen += 1
                inside = seen == at
                header = number if inside else header
            else:
                inside = False
        elif (inside and re.match(rf"\s*{own}", line)) or (top and table and re.match(rf"\s*{short}", line)):
            found = number
            break
    if not found or value is None:
        return found or header
    written = {json.dumps(value), f"'{value}'"} if isinstance(value, str) else {str(value)}
    for number in range(found, len(lines) + 1):
        if any(each in lines[number - 1] for each in written):
            return number
    return found


def first_line(text: str, value: str) -> int:
    """The first line that holds a text value, 1 where none does."""
    written = json.dumps(value), f"'{value}'"
    return next((n for n, line in enumerate(text.splitlines(), 1) if any(each in line for each in written)), 1)
