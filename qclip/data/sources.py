"""Data names: KIND:PATH[?samples=N&seed=S&split=NAME&where=COLUMN]."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.parse import unquote

from qclip.data import scenes
from qclip.data.folders import load_folder
from qclip.data.imageset import ImageSet
from qclip.data.parquet import load_parquet
from qclip.errors import DataError, nearest

KINDS = ("scenes", "parquet", "folder")
_OPTIONS = ("samples", "seed", "split", "where", "side")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A parsed data name."""

    kind: str
    path: str
    samples: int | None = None
    seed: int = 0
    split: str | None = None
    where: str | None = None
    side: int | None = None  # scenes only


def parse(spec: str) -> Spec:
    """Raises DataError naming what is unknown and what is near it."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        hint = _guess(spec) or f"write KIND:PATH. For the kind {kind!r}: {nearest(kind, KINDS)}"
        raise DataError(f"{spec!r} is no data set name; {hint}")
    path, _, query = rest.partition("?")
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if key not in _OPTIONS:
            raise DataError(f"{spec!r}: unknown option {key!r}; {nearest(key, _OPTIONS)}")
        if not equals or not value:
            raise DataError(f"{spec!r}: option {key!r} has no value; write {key}=VALUE.")
        if key in options:
            raise DataError(f"{spec!r}: option {key!r} is given twice.")
        options[key] = unquote(value)
    samples, seed, side = (_whole(spec, key, options) for key in ("samples", "seed", "side"))
    if samples is not None and samples < 1:
        raise DataError(f"{spec!r}: samples={samples}; ask for at least one image.")
    if side is not None and kind != "scenes":
        raise DataError(f"{spec!r}: only scenes are drawn to a side; images of a {kind} are resized by the model.")
    return Spec(kind, path, samples, seed or 0, options.get("split"), options.get("where"), side)


def load(spec: str, classes_file: Path | None = None, need: int = 1) -> ImageSet:
    """The images that a data name stands for.

    `samples=N` draws N images without replacement (`seed`), or the first N of scenes, whose `seed` draws other images;
    `split` is a scenes split, a value of the column `split`, or a sub-folder; `where` names a bool column.
    `classes_file` holds one class name a line. Raises DataError for a name that is unknown, missing data, or fewer
    than `need` images.
    """
    found = parse(spec)
    classes = None if classes_file is None else read_classes(Path(classes_file))
    if found.kind == "scenes":
        if found.path and found.split:
            raise DataError(f"{spec!r}: a split is given twice; write scenes:{found.split}.")
        split = found.path or found.split or "test"
        data = scenes.load_scenes(split, found.samples, found.seed, found.side or scenes.SIDE)
        data.spec = spec
    else:
        path = _existing(found, spec)
        if found.kind == "parquet":
            data = load_parquet(path, spec, found.split)
        else:
            data = load_folder(path, spec, classes, found.split)
    if classes is not None and found.kind != "folder":
        data.classes = classes
    if found.where is not None:
        column = data.groups.get(found.where)
        if column is None or column.dtype != bool:
            flags = [name for name, values in data.groups.items() if values.dtype == bool]
            hint = nearest(found.where, flags) if flags else "it has no bool columns."
            raise DataError(f"{spec!r}: no bool column {found.where!r}; {hint}")
        data = data.select(column)
        data.name += f"-{found.where}"
    wanted = need if found.samples is None else max(need, found.samples)
    if len(data) < wanted:
        raise DataError(f"{spec!r} has {len(data)} images, but {wanted} were asked for.")
    if found.samples is not None and found.kind != "scenes":
        data = data.sample(found.samples, found.seed)
    if len(data) < need:
        raise DataError(f"{spec!r} gives {len(data)} images, but {need} are needed.")
    return data


def read_classes(path: Path) -> list[str]:
    """Class names, one a line; blank lines are left out. Raises DataError where there are none, or one twice."""
    if not path.is_file():
        raise DataError(f"classes file {path} does not exist.")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"classes file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not names:
        raise DataError(f"classes file {path} names no class; write one name a line.")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"classes file {path} names {twice[0]!r} twice.")
    return names


def _whole(spec: str, key: str, options: dict[str, str]) -> int | None:
    if key not in options:
        return None
    if not options[key].isdecimal():
        raise DataError(f"{spec!r}: {key}={options[key]} is not a whole number.")
    return int(options[key])


def _existing(found: Spec, spec: str) -> Path:
    path, wants_folder = Path(found.path).expanduser(), found.kind == "folder"
    if not found.path:
        raise DataError(f"{spec!r}: no path; write {found.kind}:PATH.")
    if path.is_dir() and not wants_folder:
        raise DataError(f"{path} is a folder; write folder:{path}, or name a Parquet file in it.")
    if path.is_file() and wants_folder:
        raise DataError(f"{path} is a file; a folder of images is needed (parquet:PATH reads a Parquet file).")
    if not path.exists():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        beside = [n for n in beside if n.endswith(".parquet")] if not wants_folder else beside
        raise DataError(f"{path} does not exist; " + (nearest(path.name, beside) if beside else "check the path."))
    return path


def _guess(spec: str) -> str | None:
    """What somebody meant who wrote a bare path or a bare split."""
    path = Path(spec.partition("?")[0])
    if path.suffix == ".parquet":
        return f"did you mean 'parquet:{spec}'?"
    if path.is_dir():
        return f"did you mean 'folder:{spec}'?"
    if spec.partition("?")[0] in scenes.SIZES:
        return f"did you mean 'scenes:{spec}'?"
    return None
