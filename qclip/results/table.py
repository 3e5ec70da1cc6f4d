"""`Results`: one row is one number, said completely; a curve is a row whose value is several columns of numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qclip import files
from qclip.errors import InputError, nearest
from qclip.untrusted import parse_json

from . import version1

FORMAT = "qclip-results"
VERSION = 2

COLUMNS = (
    "model",
    "source",
    "recipe",
    "method",
    "bits",
    "recipe_hash",
    "set",
    "role",
    "subset",
    "axis",
    "at",
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
    "backend",
    "host",
)
INTEGER_COLUMNS = ("severity", "n", "seed")
FLOAT_COLUMNS = ("value", "low", "high", "seconds")
TEXT_COLUMNS = tuple(c for c in COLUMNS if c not in (*INTEGER_COLUMNS, *FLOAT_COLUMNS, "at"))
CURVE_COLUMNS = tuple(c for c in COLUMNS if c not in (*FLOAT_COLUMNS, "host"))
# What tells one row from another. The rest says more about it.
KEY = ("model", "metric", "set", "subset", "axis", "at", "corruption", "severity", "score", "reference")

ROLES = {
    "id": "a labelled set of the classes that the model is asked for",
    "shift": "a labelled set of the same classes from elsewhere",
    "images": "images without labels: only their embeddings are compared",
    "corrupted": "an ID set, or a sample of it, under a corruption; severity 0 is the sample without",
    "dev": "the labelled set on which something was fitted",
    "proxy": "images with captions on which the logit scale was tuned",
    "train": "the set from which a score or a probe learned",
    "ood": "a set of other classes",
    "ood-near": "a set of other classes that look alike",
    "ood-far": "a set of something else",
    "ood-mean": "the mean over several OOD sets",
    "captions": "images with captions, which need no labels",
    "model": "no images: the model itself, its size and how it is computed",
    "site": "no images: one weight",
    "tower": "no images: the weights of one tower",
}

Row = dict[str, Any]
Curve = dict[str, Any]  # `CURVE_COLUMNS` and "points": name -> list of numbers, all of one length


def missing(column: str) -> Any:
    """The value of an unfilled column: the whole set, no severity, "" for other text, None for other numbers."""
    return {"subset": "all", "severity": 0}.get(column, "" if column in TEXT_COLUMNS else None)


def _checked(column: str, value: Any) -> Any:
    if value is None:
        return missing(column)
    if column in TEXT_COLUMNS:
        if not isinstance(value, str):
            raise InputError(f"results column {column!r} takes text, got {value!r}; pass a string")
        return value or missing(column)
    if column == "at" and isinstance(value, str):
        return value
    number = _number(value, f"results column {column!r}")
    if number is None:
        return missing(column)
    if column in INTEGER_COLUMNS:
        if not number.is_integer():
            raise InputError(f"results column {column!r} takes a whole number, got {value!r}")
        return int(value)
    if column == "at":
        if math.isinf(number):
            raise InputError("results column 'at' takes a finite number or a name, got an infinite one")
        return int(number) if number.is_integer() else number
    return number


def _number(value: Any, where: str) -> float | None:
    """A float, None where it is undefined: NaN is not JSON and compares unequal to itself."""
    if isinstance(value, (str, bytes, bool)):
        raise InputError(f"{where} takes a number, got {value!r}; pass an int, a float or None")
    try:
        number = float(value)  # numpy and torch scalars too
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} takes a number, got {value!r}; pass an int, a float or None") from None
    return None if math.isnan(number) else number


def _point(value: Any, where: str) -> float | None:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # a place such as a rank stays a whole number
    return None if value is None else _number(value, where)


def _row(fields: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> Row:
    _known(fields, columns)
    row = {column: _checked(column, fields.get(column)) for column in columns}
    if not row["metric"]:
        raise InputError("a results row needs a metric; name what the value measures")
    if row["role"] and row["role"] not in ROLES:
        raise InputError(f"results know no role {row['role']!r} of a set; {nearest(row['role'], ROLES)}")
    if bool(row["axis"]) != (row["at"] is not None):
        raise InputError(f"a results row of {row['metric']!r} needs `axis` and `at` together: what varies, and where")
    return row


def _curve(fields: Mapping[str, Any], points: Mapping[str, Iterable[float | None]]) -> Curve:
    curve = _row(fields, CURVE_COLUMNS)
    where = f"points of curve {curve['metric']!r}"
    listed = {str(name): [_point(v, where) for v in column] for name, column in points.items()}
    lengths = {len(column) for column in listed.values()}
    if len(lengths) != 1:
        shown = ", ".join(f"{name}: {len(column)}" for name, column in listed.items()) or "none"
        raise InputError(f"{where} are columns of different length ({shown}); give at least one, all of one length")
    return curve | {"points": listed}


def _known(fields: Iterable[str], columns: Sequence[str] = COLUMNS) -> None:
    for column in fields:
        if column not in columns:
            raise InputError(f"results have no column {column!r}; {nearest(column, columns)}")


def _matches(row: Row, filters: dict[str, Any]) -> bool:
    for column, wanted in filters.items():
        if column not in row:
            return False
        if isinstance(wanted, Collection) and not isinstance(wanted, str):
            if row[column] not in wanted:
                return False
        elif row[column] != wanted:
            return False
    return True


def key_of(row: Row) -> tuple[Any, ...]:
    """The values of `KEY`."""
    return tuple(row.get(column) for column in KEY)


@dataclasses.dataclass
class Results:
    """Rows with exactly the columns `COLUMNS`, and curves.

    `reference=""` is an absolute value; `reference="float"` the paired difference to that model. `low`, `high` are the
    ends of a 95 % interval. `role` (`ROLES`) says what the set is for. Rows of one metric that differ along something
    (a group, a rank band, a state of computation) name it in `axis` and their place on it, a number or a name, in
    `at`. A value that is undefined is None, and `notes` says why. `meta` holds what is true of the whole table:
    versions, CPU, threads, the command that made it.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    curves: list[Curve] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = [_row(row) for row in self.rows]
        self.curves = [_curve({c: v for c, v in k.items() if c != "points"}, k.get("points", {})) for k in self.curves]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def add(self, **fields: Any) -> None:
        """Append one row. Raises InputError on an unknown column, a missing metric or a value of the wrong type."""
        self.rows.append(_row(fields))

    def add_curve(self, points: Mapping[str, Iterable[float | None]], **fields: Any) -> None:
        """Append one curve: `points` holds columns of equal length, `fields` are those of a row (`metric` is its
        name). Raises InputError as `add` does."""
        self.curves.append(_curve(fields, points))

    def note(self, text: str) -> None:
        """Append a note once."""
        if text not in self.notes:
            self.notes.append(text)

    @classmethod
    def merge(cls, *parts: Results) -> Results:
        """One table of several; a row or note that several hold is kept once.

        Mappings in `meta` (what each model is) are joined. Where another fact differs, the first part's stands and a
        note tells the others. Raises InputError where two parts give different values to one row (`KEY`): their models
        or sets need different names.
        """
        whole = cls()
        rows: dict[tuple[Any, ...], Row] = {}
        curves: dict[tuple[Any, ...], Curve] = {}
        for part in parts:
            for known, found in ((rows, part.rows), (curves, part.curves)):
                for row in found:
                    other = known.setdefault(key_of(row), dict(row))
                    if other != row:
                        raise InputError(
                            f"two results of {row['metric']!r} for model {row['model']!r} on {row['set']!r} differ; "
                            "rename the model or the set in one of them before they are merged"
                        )
            for text in part.notes:
                whole.note(text)
            for name, fact in part.meta.items():
                stands = whole.meta.setdefault(name, dict(fact) if isinstance(fact, dict) else fact)
                if isinstance(stands, dict) and isinstance(fact, dict):
                    differ = [key for key in fact if key in stands and stands[key] != fact[key]]
                    stands |= {key: value for key, value in fact.items() if key not in stands}
                    for key in differ:
                        whole.note(f"{name} of {key} differ between parts: {stands[key]} stands, not {fact[key]}")
                elif stands != fact and name != "command":
                    whole.note(f"{name} differ between parts: {stands} stands, not {fact}")
        whole.rows, whole.curves = list(rows.values()), list(curves.values())
        return whole

    def where(self, **filters: Any) -> Results:
        """The rows and curves whose columns equal the given values; a list, tuple or set means "one of". Shares notes
        and meta."""
        _known(filters)
        part = Results(notes=self.notes, meta=self.meta)
        part.rows = [row for row in self.rows if _matches(row, filters)]
        part.curves = [curve for curve in self.curves if _matches(curve, filters)]
        return part

    def row(self, **filters: Any) -> Row | None:
        """The only row that matches, or None. `subset`, `axis`, `reference`, `corruption` and `severity` default to
        their missing value, so that a name without them means the clean absolute value of the whole set. Raises
        InputError where several rows match."""
        return _only(self.where(**_whole(filters)).rows, filters)

    def value(self, **filters: Any) -> float | None:
        """The value of the only row that matches (see `row`), None where there is none or it is undefined."""
        row = self.row(**filters)
        return None if row is None else row["value"]

    def curve(self, **filters: Any) -> dict[str, list[float | None]] | None:
        """The points of the only curve that matches, as `row` matches, or None."""
        found = _only(self.where(**_whole(filters)).curves, filters)
        return None if found is None else found["points"]

    def unique(self, column: str) -> list[Any]:
        """The distinct values of a column, in order of first appearance, without missing ones."""
        _known([column])
        return [v for v in dict.fromkeys(row[column] for row in self.rows) if v not in ("", None)]

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as strict JSON; missing columns are left out of a row, infinities are "inf" / "-inf".

        Written beside the target, synced and renamed, so that a reader sees the old file or the new one whole.
        """
        return files.write_atomic(path, self.text().encode("utf-8", "backslashreplace"))  # \udcXX is JSON, too

    def text(self) -> str:
        """What `to_json` writes."""
        body = {"format": FORMAT, "version": VERSION, "meta": self.meta, "notes": self.notes, "columns": list(COLUMNS)}
        head = json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False)[:-2]
        rows, curves = (
            ",\n  ".join(json.dumps(_brief(row), allow_nan=False, ensure_ascii=False) for row in found)
            for found in (self.rows, self.curves)
        )
        return f'{head},\n "rows": [\n  {rows}\n ],\n "curves": [\n  {curves}\n ]\n}}\n'

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `to_json` wrote, or what version 1 wrote. Raises InputError naming the file where it is something
        else, or newer."""
        path = Path(path)
        body = parse_json(files.read_text(path, "results file"), f"results file {str(path)!r}", InputError, files.LIMIT)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise InputError(f'{path} is not a results file: it has no "format": "{FORMAT}"')
        version = body.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise InputError(f"{path} has results version {version!r}, this qclip reads 1 to {VERSION}; update qclip")
        rows: Any = body.get("rows")
        curves: Any = body.get("curves", [])
        notes, meta = body.get("notes", []), body.get("meta", {})
        texts = isinstance(notes, list) and all(isinstance(note, str) for note in notes)
        if not (_dicts(rows) and _dicts(curves) and texts and isinstance(meta, dict)):
            raise InputError(f"{path} is damaged: rows, curves, notes or meta have the wrong form; write it again")
        try:
            if version == 1:
                rows, curves = version1.upgraded(rows)
            decoded = [{c: _decode(v) if c in FLOAT_COLUMNS else v for c, v in row.items()} for row in rows]
            points = [curve | {"points": _decoded_points(curve)} for curve in curves]
            return cls(decoded, notes, meta, points)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from None


def _whole(filters: dict[str, Any]) -> dict[str, Any]:
    """Filters with what a caller who does not name it means: the whole set, clean, absolute."""
    filters = {"subset": "all", "reference": "", "corruption": "", **filters}
    if not filters["corruption"]:
        filters.setdefault("severity", 0)
    if "at" not in filters:
        filters.setdefault("axis", "")
    return filters


def _only(found: list[Row], filters: dict[str, Any]) -> Row | None:
    if len(found) > 1:
        differ = [c for c in found[0] if len({repr(row[c]) for row in found}) > 1]
        raise InputError(f"{len(found)} results rows match {filters}; they differ in {', '.join(differ) or 'nothing'}")
    return found[0] if found else None


def _dicts(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(each, dict) for each in found)


def _brief(row: Row) -> Row:
    """Without missing columns. Infinities are text: JSON has none."""
    out = {c: _encode(v) for c, v in row.items() if c == "value" or c == "points" or v != missing(c)}
    if "points" in out:
        out["points"] = {name: [_encode(v) for v in column] for name, column in row["points"].items()}
    return out


def _decoded_points(curve: Mapping[str, Any]) -> dict[str, list[Any]]:
    points = curve.get("points")
    if not isinstance(points, dict) or not all(isinstance(column, list) for column in points.values()):
        raise InputError(f"curve {curve.get('metric')!r} has no points")
    return {name: [_decode(v) for v in column] for name, column in points.items()}


def _encode(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _decode(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("inf", "-inf") else value
