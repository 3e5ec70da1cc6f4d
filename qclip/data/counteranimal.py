"""CounterAnimal (Wang et al. 2403.11497): animals before common and before unusual backgrounds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from qclip.data.classes import renamed
from qclip.data.files import shown, some
from qclip.data.folders import Files
from qclip.data.imageset import ImageSet
from qclip.data.listing import LeftOut, entries, images_below, is_folder, is_leftover, unreadable_folder
from qclip.errors import DataError

SIDES = ("common", "counter")


def load_counteranimal(root: Path, spec: str, classes: list[str] | None = None) -> ImageSet:
    """A folder per class, in each of them folders whose names begin with `common` and with `counter`; these are the
    groups. `classes`: lines of a classes file. Raises DataError where the layout is another one."""
    left_out = LeftOut(os.fspath(root))
    files: list[str] = []
    counts: list[tuple[int, str, int]] = []
    names: list[str] = []
    try:
        folders = [e for e in entries(os.fspath(root)) if is_folder(e, links=True) and not is_leftover(e.name)]
        for folder in folders:
            sides = [e for e in entries(folder.path) if is_folder(e, links=True) and not is_leftover(e.name)]
            odd = [e.name for e in sides if not e.name.lower().startswith(SIDES)]
            if odd or not sides:
                found = f"has the folder {shown(odd[0])!r}" if odd else "has no folders"
                raise DataError(
                    f"{shown(folder.path)} {found}; a class of CounterAnimal has folders whose names begin with common "
                    "or counter."
                )
            for side in sides:
                inside = list(images_below(side.path, left_out))
                files += inside
                counts.append((len(names), next(s for s in SIDES if side.name.lower().startswith(s)), len(inside)))
            names.append(shown(folder.name))
    except OSError as error:
        raise unreadable_folder(os.fspath(root), error) from None
    if not files:
        raise DataError(f"{shown(root)}: no images in folders of the kind CLASS/common-* and CLASS/counter-*.")
    labels = np.repeat([k for k, _, _ in counts], [n for _, _, n in counts]).astype(np.int64)
    groups = np.repeat([side for _, side, _ in counts], [n for _, _, n in counts])
    one_sided = [name for k, name in enumerate(names) if len(set(groups[labels == k])) < 2]
    notes = left_out.notes(spec)
    if one_sided:
        notes.append(
            f"{spec}: {len(one_sided)} of {len(names)} classes have images on one side only: {some(one_sided)}"
        )
    label_notes: list[str] = []
    if classes is not None:
        places, label_notes = renamed(names, classes, shown(root))
        labels = places[labels]
    return ImageSet(
        name="counteranimal",
        spec=spec,
        classes=classes or names,
        labels=labels,
        captions=None,
        groups={"group": groups},
        prompts=None,
        source=Files(os.fspath(root), files),
        rows=np.arange(len(files), dtype=np.int64),
        notes=notes,
        label_notes=label_notes,
    )
