"""The sets of an evaluation: loaded, named apart, with their roles and the classes among which they are told apart."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qclip import data as qdata
from qclip.errors import InputError
from qclip.progress import Progress
from qclip.results import Results

from .request import EvalSet, prompt_templates


def evaluated_sets(
    results: Results,
    data: Any,
    images: Any,
    ood: Any,
    shift: Any,
    dev: Any,
    proxy: Any,
    train: Any,
    captions: Any,
    templates: str | Sequence[str] | None,
    progress: Progress | None,
) -> list[EvalSet]:
    """Every set with its role and its classes. Shift, dev and train sets have those of the first ID set."""
    id_sets = [_load(d, progress).narrowed() for d in _listed(data)]
    shift_sets, plain, captioned = ([_load(d, progress) for d in _listed(given)] for given in (shift, images, captions))
    if not id_sets and not plain and not captioned:
        raise InputError("no data to evaluate on; pass the name of at least one labelled set")
    ood_sets = [(kind, _load(d, progress)) for kind, listed in kinds(ood).items() for d in listed]
    fitted = {role: _load(d, progress) for role, d in (("dev", dev), ("train", train)) if d is not None}
    _name_apart([*id_sets, *shift_sets, *plain, *(found for _, found in ood_sets), *captioned])
    others = [*(("shift", each) for each in shift_sets), *fitted.items()]
    for labelled in (*id_sets, *(each for _, each in others)):
        if labelled is not fitted.get("train") or labelled.labels is not None:
            labelled.labelled()
        for note in (*labelled.notes, *labelled.label_notes):
            results.note(note)
    for each in (*(found for _, found in ood_sets), *plain, *captioned):
        for note in each.notes:
            results.note(note)
    out = []
    for each in id_sets:
        prompts = tuple(prompt_templates(templates if templates is not None else each.prompts))
        out.append(EvalSet(each, "id", tuple(each.classes or ()), prompts, each.labels, each.counts))
    for each in plain:
        out.append(EvalSet(each, "images", (), ()))
    for each in captioned:
        if not any(each.captions or []):
            raise InputError(f"{each.spec} has no captions, so that nothing can be retrieved; name a set that has some")
        out.append(EvalSet(each, "captions", (), ()))
    if not id_sets:
        if others or ood_sets:
            raise InputError("sets of other origin or other classes were given, but no labelled set beside them")
        return out
    if proxy is not None:
        out.append(EvalSet(_captioned(_load(proxy, progress), [*id_sets, *shift_sets]), "proxy", (), ()))
    first = out[0]
    for role, each in others:
        bare = role == "train" and each.labels is None  # some scores learn from images alone
        labels, counts = (None, None) if bare else (each.labels_in(first.data), each.counts_in(first.data))
        found = dataclasses.replace(first, data=each, role=role, labels=labels, counts=counts)
        there = len(first.classes) if labels is None else len(np.unique(labels))
        if role == "shift" and not each.own_classes and there < len(first.classes):
            results.note(
                f"{each.name} has images of {there} of the {len(first.classes)} classes and is measured among all of "
                "them; with ?among=own it is measured among its own, as ImageNet-A and -R are"
            )
        out.append(_among_its_own(found) if role == "shift" else found)
    for kind, each in ood_sets:
        out.append(
            dataclasses.replace(first, data=each, role=f"ood-{kind}" if kind else "ood", labels=None, counts=None)
        )
    return out


def _captioned(proxy: qdata.ImageSet, evaluated: Sequence[qdata.ImageSet]) -> qdata.ImageSet:
    if proxy.captions is None:
        raise InputError(f"{proxy.spec} has no captions; the logit scale is tuned on images with captions (proxy)")
    if any(proxy.digest == each.digest for each in evaluated):
        raise InputError(f"{proxy.spec} is evaluated, too: the logit scale must be tuned on other images (proxy)")
    return proxy


def _among_its_own(of: EvalSet) -> EvalSet:
    """With the classes that it has images of alone, where a shift set says so; its labels are those of the first ID set
    already. Raises InputError where that is one."""
    if not of.data.own_classes or of.labels is None:
        return of
    present, labels = np.unique(of.labels, return_inverse=True)
    if len(present) < 2:
        raise InputError(f"{of.data.spec} has images of {len(present)} class; among=own needs two or more")
    counts = None if of.counts is None else of.counts[:, present]
    return dataclasses.replace(of, classes=tuple(of.classes[k] for k in present), labels=labels, counts=counts)


def _listed(data: Any) -> list[Any]:
    return [data] if qdata.is_set(data) else list(data or ())


def kinds(ood: Any) -> dict[str, list[Any]]:
    """Sets of other classes by kind: "near", "far" or ""."""
    if isinstance(ood, Mapping):
        for kind in ood:
            if kind not in ("near", "far", ""):
                raise InputError(f"an OOD set is 'near' or 'far', not {kind!r}; use these keys")
        return {kind: _listed(listed) for kind, listed in ood.items()}
    out: dict[str, list[Any]] = {}
    for data in _listed(ood):
        kind = ""
        if isinstance(data, str) and data.startswith(("near=", "far=")):
            kind, data = data.split("=", 1)
        if not isinstance(data, (str, os.PathLike)):
            data = qdata.as_set(data)
        name = data.name if isinstance(data, qdata.ImageSet) else os.path.basename(str(data).split("?")[0])
        kind = kind or next((k for k in ("near", "far") if k in name.lower()), "")
        out.setdefault(kind, []).append(data)
    return out


def _load(data: Any, progress: Progress | None) -> qdata.ImageSet:
    return dataclasses.replace(qdata.as_set(data, progress))  # its name may be changed


def _name_apart(sets: list[qdata.ImageSet]) -> None:
    """Rows are found by the name of their set: a second set of a name gets a number."""
    taken: set[str] = set()
    for found in sets:
        name, count = found.name, 1
        while found.name in taken:
            count += 1
            found.name = f"{name} ({count})"
        taken.add(found.name)
