"""Data names: KIND:PATH[?samples=N&seed=S&split=NAME&where=COLUMN&among=own], for Parquet also image=, label=,
captions=COLUMN and counts=FILE, for lists root=FOLDER, for torchvision set=NAME."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from qclip.data import classes as class_names
from qclip.data import scenes
from qclip.data.arrow import from_dataset, is_dataset, load_saved
from qclip.data.counteranimal import load_counteranimal
from qclip.data.counts import add_counts
from qclip.data.files import shown
from qclip.data.folders import load_folder
from qclip.data.imageset import ImageSet
from qclip.data.listed import load_celeba, load_list, load_waterbirds
from qclip.data.parquet import load_parquet
from qclip.data.parquet_columns import Columns
from qclip.data.tars import load_tars
from qclip.data.torchvision_sets import load_torchvision
from qclip.errors import DataError, nearest

KINDS = ("scenes", "parquet", "hf", "folder", "tar", "torchvision", "waterbirds", "celeba", "counteranimal", "list")
_COLUMNS = ("image", "label", "captions")
_OPTIONS = ("samples", "seed", "split", "where", "side", "counts", "among", "root", "set", *_COLUMNS)
AMONG = ("all", "own")
_DIGITS = 18  # of a number that somebody means


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
    columns: Columns = Columns()  # Parquet and saved data sets only
    counts: str | None = None  # Parquet only
    among: str = "all"
    root: str | None = None  # lists only
    set: str | None = None  # torchvision only


def parse(spec: str) -> Spec:
    """What a data name says. In a path `%3F` is a question mark, as in a URL; a path that exists as it is written is
    taken as it is written, with its question marks and percent signs.

    Raises DataError naming what is unknown and what is near it.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        hint = _guess(spec) or f"write KIND:PATH. For the kind {kind!r}: {nearest(kind, KINDS)}"
        raise DataError(f"{spec!r} is no data set name; {hint}")
    path, query = rest.partition("?")[::2] if kind == "scenes" else _path_and_query(rest)
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
    named = {key: options[key] for key in _COLUMNS if key in options}
    if named and kind not in ("parquet", "hf"):
        raise DataError(
            f"{spec!r}: only a Parquet file and a saved data set have columns to name; leave {next(iter(named))}= out."
        )
    if "counts" in options and kind != "parquet":
        raise DataError(f"{spec!r}: only a Parquet set has rows to count people for; leave counts= out.")
    if "root" in options and kind != "list":
        raise DataError(f"{spec!r}: only a list names images below another folder; leave root= out.")
    if "set" in options and kind != "torchvision":
        raise DataError(f"{spec!r}: only torchvision names sets; leave set= out.")
    if "split" in options and kind in ("counteranimal", "list"):
        raise DataError(f"{spec!r}: a {kind} has no splits; leave split= out.")
    if (among := options.get("among", "all")) not in AMONG:
        raise DataError(f"{spec!r}: among={among}; {nearest(among, AMONG)}")
    split, where, counts, root, of = (options.get(key) for key in ("split", "where", "counts", "root", "set"))
    return Spec(kind, path, samples, seed or 0, split, where, side, Columns(**named), counts, among, root, of)


def is_set(data: object) -> bool:
    """Whether this is one set and not a list of them."""
    return isinstance(data, (str, os.PathLike, ImageSet)) or is_dataset(data)


def as_set(data: object, progress: Callable[[str, int, int], None] | None = None) -> ImageSet:
    """What a caller may pass as a set: a data name, an `ImageSet`, or a `datasets.Dataset`. Raises DataError."""
    if isinstance(data, ImageSet):
        return data
    return load(os.fspath(data), progress=progress) if isinstance(data, (str, os.PathLike)) else from_dataset(data)


def load(
    spec: str,
    classes_file: Path | None = None,
    need: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> ImageSet:
    """The images that a data name stands for.

    `samples=N` draws N images without replacement (`seed`), or the first N of scenes, whose `seed` draws other images;
    `split` is a scenes split, a value of the column `split` or of a shard's name, or a sub-folder; `where` names a bool
    column; `image`, `label` and `captions` name the columns of a Parquet file, `counts` a file of what people chose
    (`counts.py`). `classes_file` holds one class name per line: classes of the set that have a name get the line of
    that name, else line N names label N, and `label_notes` say so. `among=own` measures a set among the classes that it
    has images of, as ImageNet-A and -R are. `progress` is called as (what, done, in all) while
    files are listed and read.

    Raises DataError for a name that is unknown, missing data, classes that do not fit, or fewer than `need` images.
    """
    found = parse(spec)
    classes = None if classes_file is None else class_names.read_lines(classes_file, "classes")
    both = None if classes is None else class_names.wordnet_ids(classes)
    if found.kind == "scenes":
        if found.path and found.split:
            raise DataError(f"{spec!r}: a split is given twice; write scenes:{found.split}.")
        split = found.path or found.split or "test"
        side = scenes.SIDE if found.side is None else found.side
        data = scenes.load_scenes(split, found.samples, found.seed, side)
        data.spec = spec
    elif not found.path:
        raise DataError(f"{spec!r}: no path; write {found.kind}:PATH.")
    elif found.kind == "parquet":
        path = _existing(found.path, spec, ending=".parquet")
        data = load_parquet(path, spec, found.split, found.columns, progress)
    elif found.kind == "tar":
        data = load_tars(_existing(found.path, spec, ending=".tar"), spec, found.split, progress)
    elif found.kind == "list":
        data = load_list(_existing(found.path, spec, ending=".txt"), spec, found.root)
    else:
        path = _existing(found.path, spec, want_folder=True)
        if found.kind == "waterbirds":
            data = load_waterbirds(path, spec, found.split)
        elif found.kind == "hf":
            data = load_saved(path, spec, found.split, found.columns)
        elif found.kind == "torchvision":
            data = load_torchvision(path, spec, found.set, found.split)
        elif found.kind == "celeba":
            data = load_celeba(path, spec, found.split)
        elif found.kind == "counteranimal":
            data = load_counteranimal(path, spec, classes)
        else:
            data = load_folder(path, spec, classes, found.split, progress)
    named = data.classes is not None  # counts are found by the names that the set has
    if found.counts is not None and named:
        add_counts(data, found.counts)
    if classes is not None and found.kind not in ("folder", "counteranimal"):
        data.name_classes(classes)
    if both is not None and data.classes == classes:
        data.classes = both[1]
    data.own_classes = found.among == "own"
    if found.counts is not None and not named:
        add_counts(data, found.counts)
    if data.labels is not None and data.classes is not None and found.kind != "scenes":
        data.label_notes += class_names.remarks(data.classes, spec)
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


def _path_and_query(rest: str) -> tuple[str, str]:
    """A path that exists as it is written, else what stands before the first question mark, as in a URL."""
    cuts = [k for k, c in enumerate(rest) if c == "?"]
    for cut in (len(rest), *reversed(cuts)):
        if os.path.lexists(_home(rest[:cut])):
            return rest[:cut], rest[cut + 1 :]
    path, _, query = rest.partition("?")
    return os.fsdecode(unquote_to_bytes(path)), query


def _home(path: str) -> str:
    return os.path.expanduser(path).replace("\0", "\ufffd")  # no path holds NUL, and none is looked up


def _whole(spec: str, key: str, options: dict[str, str]) -> int | None:
    if key not in options:
        return None
    if not (options[key].isascii() and options[key].isdecimal()):
        raise DataError(f"{spec!r}: {key}={options[key]} is not a whole number.")
    if len(options[key]) > _DIGITS:
        raise DataError(f"{spec!r}: {key} has {len(options[key])} digits; take a smaller number.")
    return int(options[key])


def _existing(name: str, spec: str, want_folder: bool = False, ending: str = "") -> Path:
    """Raises DataError where there is no such folder, or no such file, folder of them or, of Parquet files, pattern.
    ending: that of the files of this kind."""
    path = Path(_home(name))
    if want_folder and os.path.lexists(path) and not os.path.isdir(path):
        raise DataError(f"{shown(path)} is a file; a folder of images is needed (parquet:PATH reads a Parquet file).")
    if os.path.lexists(path) or (ending == ".parquet" and any(c in name for c in "*[")):
        return path
    beside = sorted(os.listdir(path.parent)) if os.path.isdir(path.parent) and os.access(path.parent, os.R_OK) else []
    beside = [n for n in beside if n.endswith(ending)]
    raise DataError(f"{shown(path)} does not exist; " + (nearest(path.name, beside) if beside else "check the path."))


def _guess(spec: str) -> str | None:
    """What somebody meant who wrote a bare path or a bare split."""
    path = spec.partition("?")[0]
    if path.endswith(".parquet"):
        return f"did you mean 'parquet:{spec}'?"
    if path.endswith(".tar"):
        return f"did you mean 'tar:{spec}'?"
    if os.path.isdir(path):
        return f"did you mean 'folder:{spec}'?"
    if path in scenes.SIZES:
        return f"did you mean 'scenes:{spec}'?"
    return None
