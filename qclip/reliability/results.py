"""Results: one tidy table for `evaluate` and everything after it. One row is one number, said completely."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qclip.errors import InputError, nearest

FORMAT = "qclip-results"
VERSION = 1

TEXT_COLUMNS = (
    "model",
    "source",
    "recipe",
    "method",
    "bits",
    "recipe_hash",
    "set",
    "subset",
    "corruption",
    "score",
    "metric",
    "reference",
    "host",
)
INTEGER_COLUMNS = ("severity", "n", "seed")
FLOAT_COLUMNS = ("value", "low", "high", "seconds")
COLUMNS = (
    "model",
    "source",
    "recipe",
    "method",
    "bits",
    "recipe_hash",
    "set",
    "subset",
    "corruption",
    "severity",
    "score",
    "metric",
    "value",
    "low",
    "high",
    "reference",
    "n",
    "seed",
    "seconds",
    "host",
)

Row = dict[str, Any]


def missing(column: str) -> Any:
    """What an unfilled column holds: "" for text, 0 for severity, None for the other numbers."""
    return "" if column in TEXT_COLUMNS else 0 if column == "severity" else None


def _checked(column: str, value: Any) -> Any:
    if value is None:
        return missing(column)
    if column in TEXT_COLUMNS:
        if not isinstance(value, str):
            raise InputError(f"results column {column!r} takes text, got {value!r}; pass a string")
        return value
    if isinstance(value, (str, bytes, bool)):
        raise InputError(f"results column {column!r} takes a number, got {value!r}; pass an int, a float or None")
    try:
        number = float(value)  # numpy and torch scalars too
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"results column {column!r} takes a number, got {value!r}; pass an int, a float or None"
        ) from None
    if math.isnan(number):
        return missing(column)  # undefined is None everywhere: NaN is not JSON and compares unequal to itself
    if column in INTEGER_COLUMNS:
        if not number.is_integer():
            raise InputError(f"results column {column!r} takes a whole number, got {value!r}")
        return int(value)
    return number


def _row(fields: dict[str, Any]) -> Row:
    _known(fields)
    row = {column: _checked(column, fields.get(column)) for column in COLUMNS}
    if not row["metric"]:
        raise InputError("a results row needs a metric; name what the value measures")
    return row


def _known(fields: Iterable[str]) -> None:
    for column in fields:
        if column not in COLUMNS:
            raise InputError(f"results have no column {column!r}; {nearest(column, COLUMNS)}")


def _matches(row: Row, filters: dict[str, Any]) -> bool:
    for column, wanted in filters.items():
        if isinstance(wanted, Collection) and not isinstance(wanted, str):
            if row[column] not in wanted:
                return False
        elif row[column] != wanted:
            return False
    return True


@dataclasses.dataclass
class Results:
    """Rows with exactly the columns `COLUMNS`.

    `reference=""` is an absolute value; `reference="float"` the paired difference to that model. `low`, `high` are the
    ends of a 95 % interval. A value that is undefined is None, and `notes` says why. `meta` holds what is true of the
    whole table: versions, CPU, threads, the command that made it.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = [_row(row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def add(self, **fields: Any) -> None:
        """Append one row. Raises InputError on an unknown column, a missing metric or a value of the wrong type."""
        self.rows.append(_row(fields))

    def note(self, text: str) -> None:
        """Append a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def extend(self, other: Results) -> None:
        """Append another table's rows and notes."""
        self.rows.extend(dict(row) for row in other.rows)
        for text in other.notes:
            self.note(text)

    def where(self, **filters: Any) -> Results:
        """The rows whose columns equal the given values; a list, tuple or set means "one of". Shares notes and meta."""
        _known(filters)
        part = Results(notes=self.notes, meta=self.meta)
        part.rows = [row for row in self.rows if _matches(row, filters)]
        return part

    def row(self, **filters: Any) -> Row | None:
        """The only row that matches, or None. `reference`, `corruption`, `severity` default to their missing value, so
        that a name without them means the clean absolute value. Raises InputError where several rows match."""
        filters = {"reference": "", "corruption": "", **filters}
        if not filters["corruption"]:
            filters.setdefault("severity", 0)
        found = self.where(**filters).rows
        if len(found) > 1:
            differ = [c for c in COLUMNS if len({repr(row[c]) for row in found}) > 1]
            raise InputError(
                f"{len(found)} results rows match {filters}; they differ in {', '.join(differ) or 'nothing'}"
            )
        return found[0] if found else None

    def value(self, **filters: Any) -> float | None:
        """The value of the only row that matches (see `row`), None where there is none or it is undefined."""
        row = self.row(**filters)
        return None if row is None else row["value"]

    def unique(self, column: str) -> list[Any]:
        """The distinct values of a column, in order of first appearance, without missing ones."""
        _known([column])
        return [v for v in dict.fromkeys(row[column] for row in self.rows) if v not in ("", None)]

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as strict JSON; missing columns are left out of a row, infinities are "inf" / "-inf".

        Written beside the target, synced and renamed, so that a reader sees the old file or the new one whole.
        """
        rows = [{c: _encode(v) for c, v in row.items() if v != missing(c) or c == "value"} for row in self.rows]
        body = {"format": FORMAT, "version": VERSION, "meta": self.meta, "notes": self.notes, "columns": list(COLUMNS)}
        head = json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False)[:-2]
        lines = ",\n  ".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows)
        return write_atomic(path, f'{head},\n "rows": [\n  {lines}\n ]\n}}\n'.encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `to_json` wrote. Raises InputError naming the file where it is something else, or newer."""
        path = Path(path)
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"no results file at {path}; write one with `Results.to_json` or `qclip evaluate`"
            ) from None
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"{path} is not a results file ({error}); write it again") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise InputError(f'{path} is not a results file: it has no "format": "{FORMAT}"')
        if not isinstance(body.get("version"), int) or body["version"] > VERSION:
            raise InputError(
                f"{path} has results version {body.get('version')!r}, this qclip reads up to {VERSION}; update qclip"
            )
        rows, notes, meta = body.get("rows"), body.get("notes", []), body.get("meta", {})
        if (
            not isinstance(rows, list)
            or not all(isinstance(r, dict) for r in rows)
            or not isinstance(notes, list)
            or not isinstance(meta, dict)
        ):
            raise InputError(f"{path} is damaged: rows, notes or meta have the wrong form; write it again")
        return cls([{c: _decode(v) if c in FLOAT_COLUMNS else v for c, v in row.items()} for row in rows], notes, meta)


def _encode(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _decode(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf") else value


def write_atomic(path: str | os.PathLike[str], data: bytes, sync: bool = True) -> Path:
    """Write beside the target, sync, rename: the file at `path` is the old one or the new one, never a part. Without
    `sync` that holds for a killed process, not for a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
