"""Class names: read from a file, matched with those of a set, and what is odd about them."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qclip.data.files import shown, some
from qclip.errors import DataError
from qclip.files import open_regular

LARGEST_TEXT = 64 * 2**20  # bytes of a text file

_WNID = re.compile(r"n\d{8}\b")


def read_lines(path: str | os.PathLike[str], what: str) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, stripped; with or without a byte order mark, and with the
    line ends of any system. `what` names it in messages ("classes").

    Raises DataError naming the file where it is missing, no regular file, no such text, or empty.
    """
    where = f"{what} file {shown(path)!r}"
    if not os.path.lexists(path):
        raise DataError(f"{where} does not exist; check the path.")
    try:
        with open_regular(path) as stream:
            content = stream.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise DataError(f"{where} {error.strerror}; give a file of UTF-8 text, one entry per line.") from None
    if len(content) > LARGEST_TEXT:
        raise DataError(f"{where} has more than {LARGEST_TEXT} bytes; give UTF-8 text, one entry per line.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None
    if "\0" in text:
        raise DataError(f"{where} is not UTF-8 text (it holds NUL, as UTF-16 does); save it as UTF-8.")
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{where} is empty; write one entry per line.")
    return lines


def wordnet_ids(lines: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """WordNet ids and names of a classes file that has both in every line (`n01440764 tench, Tinca tinca`): the name is
    the first of its synonyms. None of any other file."""
    found = [re.fullmatch(r"(n\d{8})[\s,]+([^,]*[^,\s])\s*(,.*)?", line) for line in lines]
    if not all(found):
        return None
    return [m[1] for m in found if m], [m[2] for m in found if m]


def folded(name: str) -> str:
    """What two spellings of one name share: case, underscores, hyphens, spaces and Unicode forms do not count."""
    plain = unicodedata.normalize("NFC", name.casefold())
    return re.sub(r"[\s_\-]+", " ", plain).strip() or plain


def positions(names: Sequence[str], among: Sequence[str], where: str, what: str) -> NDArray[np.int64] | None:
    """Position in `among` of each of `names`, int64 `[len(names)]`, as `folded` compares them; None where none of them
    is there. `where` and `what` say in messages whose names these are.

    Raises DataError where some of the names are there and some are not, or where a name could be two of `among`.
    """
    if list(names) == list(among):
        return np.arange(len(names))
    index = {folded(name): k for k, name in enumerate(among)}
    odd = [name for name in names if folded(name) not in index]
    if len(odd) == len(names):
        return None
    if odd:
        free = {folded(name): name for name in among}
        for name in names:
            free.pop(folded(name), None)  # what is taken is not what was meant
        raise DataError(
            f"{where}: class {some(list(map(repr, odd)))} is not a class of {what}, though {len(names) - len(odd)} of "
            f"its {len(names)} classes are; {_nearest(odd[:5], free)}give every class the same name in both."
        )
    refuse_twins(names, where)
    refuse_twins(among, what)
    return np.array([index[folded(name)] for name in names], np.int64)


def refuse_twins(names: Sequence[str], where: str) -> None:
    """Raises DataError where two names differ in nothing that counts."""
    counts = Counter(folded(name) for name in names)
    twins = [name for name in names if counts[folded(name)] > 1]
    if twins:
        same = [name for name in twins if folded(name) == folded(twins[0])]
        raise DataError(
            f"{where}: {' and '.join(map(repr, same[:3]))} are the same class name, so that a label by name could be "
            "either; rename one or merge them."
        )


def renamed(names: Sequence[str], file: Sequence[str], where: str) -> tuple[NDArray[np.int64], list[str]]:
    """Positions in the classes file of a set's classes `names`, and notes: by name where the names are the same, else
    by position, which a note then says. Raises DataError where only some names are the same, where counts differ, or
    where a line looks like the name of another class than that of its position."""
    if both := wordnet_ids(file):
        file = both[0] if set(map(folded, names)) & set(both[0]) else both[1]
    found = positions(names, file, where, "the classes file")
    if found is not None:
        if others := [repr(file[k]) for k in sorted(set(range(len(file))) - set(found.tolist()))]:
            return found, [
                f"{where}: {len(others)} of {len(file)} lines of the classes file name none of its classes: "
                f"{some(others)}; they can only be wrong answers"
            ]
        return found, []
    if len(names) != len(file):
        raise DataError(
            f"{where}: {len(names)} classes ({some(list(names), 3)}), but the classes file names {len(file)} "
            f"({some(list(file), 3)}), and none of them by the same name; it needs one line for each class, in the "
            "order of the labels."
        )
    _refuse_near_names(names, file, where)
    pairs = [f"{name!r} is {line!r}" for name, line in zip(names, file, strict=True)]
    note = (
        f"{where}: none of its classes is named in the classes file, so the lines of the file name them by position: "
        f"{some(pairs, 3)}"
    )
    return np.arange(len(names)), [note]


def _refuse_near_names(names: Sequence[str], file: Sequence[str], where: str) -> None:
    """Raises DataError where a line holds the name of a class, but for quotes, numbers before it, a plural and the like
    (`"dog"`, `3: dog`, `dogs,`), and its position is that of another class: it is no list by position."""
    index = {_core(_words(name)): k for k, name in enumerate(names) if any(map(str.isalpha, name))}
    for k, line in enumerate(file):
        words = _words(line)[:50]
        held = {_core(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)} & index.keys() - {
            ""
        }
        if held and _core(_words(names[k])) not in held:
            meant = names[index[max(held, key=len)]]
            raise DataError(
                f"{where}: none of its classes is named in the classes file, but line {k + 1}, {line!r}, looks like "
                f"class {meant!r}, and by its position would name class {names[k]!r}; write one name per line, as the "
                "classes are called, and nothing else."
            )


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", name.casefold()))


def _core(words: Sequence[str]) -> str:
    return "".join(words).removesuffix("s")


def remarks(classes: Sequence[str], where: str) -> list[str]:
    """Notes on class names that are odd in a prompt."""
    notes = []
    counts = Counter(folded(name) for name in classes)
    kinds = (
        ("stand more than once, so that these classes have the same prompts", lambda n: counts[folded(n)] > 1),
        ("look like WordNet ids, which no text tower knows", _WNID.match),
        ("are numbers", str.isdecimal),
        ("hold underscores, which prompts then hold too", lambda n: "_" in n),
    )
    for why, is_odd in kinds:
        if odd := list(dict.fromkeys(name for name in classes if is_odd(name))):
            notes.append(
                f"{where}: {len(odd)} of {len(classes)} class names {why}: {some(list(map(repr, odd)))}; "
                "a classes file (--classes FILE) gives other names"
            )
    return notes


def _nearest(odd: list[str], free: dict[str, str]) -> str:
    found = [(name, difflib.get_close_matches(folded(name), free, n=1, cutoff=0.5)) for name in odd]
    meant = [f"{free[close[0]]!r} for {name!r}" for name, close in found if close]
    return f"did you mean {', '.join(meant)}? else " if meant else ""
