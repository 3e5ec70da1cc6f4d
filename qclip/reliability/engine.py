"""`evaluate`: models and data sets in, one table out. Embeds once, measures many; differences are paired."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qclip import data as qdata
from qclip.data.corruptions import expand
from qclip.errors import InputError
from qclip.machine import environment
from qclip.metrics.predictions import LABELLED
from qclip.results import Results
from qclip.store import Store

from .about import about_model
from .embed import Embedder, Progress
from .embedded import Embeddings
from .measurements import MEASUREMENTS
from .request import NEIGHBOURS, Condition, EvalSet, Request, prompt_templates
from .samples import write as write_samples
from .scores import NEEDS, SCORES, Score
from .writer import REPLICATES, Writer

DEFAULT_CORRUPTIONS = ("gaussian_noise",)


def evaluate(
    models: Mapping[str, nn.Module] | nn.Module,
    data: Any = (),
    ood: Any = (),
    shift: Any = (),
    dev: Any = None,
    templates: str | Sequence[str] | None = None,
    full: bool = False,
    seed: int = 0,
    *,
    images: Any = (),
    texts: Sequence[str] = (),
    neighbours: Sequence[int] = NEIGHBOURS,
    proxy: Any = None,
    train: Any = None,
    scores: Sequence[str] | None = None,
    corruptions: Sequence[str] | None = None,
    measurements: Sequence[str] | None = None,
    batch: int = 64,
    strict: bool = False,
    cache: bool | str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    samples: str | os.PathLike[str] | None = None,
    share: tuple[int, int] | None = None,
) -> Results:
    """How reliable the models are, and what differs from the first of them.

    models: label -> model with an adapter (open_clip, timm, Hugging Face; float or quantized), or one model. The first
        is the reference of every paired difference.
    data: ID sets, one or a list of names (`KIND:PATH...`) or `ImageSet`s, labelled, with class names.
    images: sets whose labels are not read: the models' embeddings of them are compared, nothing else. Without `data`
        only these are evaluated.
    texts: what a set without captions is searched by; default: the prompts of its classes, if it has any.
    neighbours: how many nearest neighbours of an image or text are compared.
    ood: OOD sets; their labels are not read. A mapping {"near": ..., "far": ...} or a name that starts with `near=` /
        `far=` says which kind a set is; else a name that contains the word does.
    shift: labelled sets of other origin whose classes are among those of the first ID set. A `group` column in any
        labelled set gives the worst group's accuracy and the group gap, a bool column a subset of its true rows.
    dev: labelled set on which each model's temperature is fitted, and the reference's thresholds; without one `ece_ts`
        is None.
    proxy: images with captions, on which each model's logit scale is tuned by the contrastive loss; never a set that is
        evaluated. It gives `ece_proxy` and `nll_proxy`.
    train: set for OOD scores that learn from training images; some of them need its labels.
    templates: prompts with a `{}`, or the name of a list in `qclip.models.class_names.TEMPLATES`; default: what the set
        brings along, else "simple".
    full: corruptions on every image instead of a fixed seeded sample of 1,000.
    scores, corruptions, measurements: names (`SCORES`, `CORRUPTIONS` or groups of them, `MEASUREMENTS`). Default: every
        score that has what it needs, Gaussian noise, every measurement.
    strict: an unreadable image stops the run; else it is left out, counted and named in `notes`.
    cache: where embeddings are kept: None = the user's cache folder, a path, or False.
    device: the models are moved there; default: where they are.
    progress: called as (what, images done, images in all) while images are embedded.
    samples: a Parquet file that gets a row per model, condition and image: prediction, rank of the label, confidence,
        scores (`samples.table` lists the columns).
    share: (i, n): only embed the i-th of n parts (from 1) of the images into the cache, and measure nothing. n
        processes or machines that share the cache do this at once; the same call without `share` then finds everything
        there, if it runs on the same kind of device with as many threads.

    Intervals are 95 %, from 1,000 paired bootstrap replicates (BCa for ECE); ID and OOD sets are drawn separately.
    Where a model gives NaN or Inf, all its numbers are undefined, and a note says where; of the reference it raises
    NonFiniteError. Raises InputError / DataError on unusable input.
    """
    models = {"model": models} if isinstance(models, nn.Module) else dict(models)
    if not models:
        raise InputError("no model to evaluate; pass a model or a dict {label: model}")
    chosen = [MEASUREMENTS.made(name) for name in (MEASUREMENTS.names() if measurements is None else measurements)]
    named = expand(DEFAULT_CORRUPTIONS if corruptions is None else corruptions)
    results = Results(meta=environment(seed=seed, batch=batch, replicates=REPLICATES, command="qclip.evaluate"))
    sets = tuple(_sets(results, data, images, ood, shift, dev, proxy, train, templates, progress))
    request = Request(
        tuple(models),
        sets,
        _scores(results, scores, _given(sets)),
        named,
        full,
        seed,
        scores is not None,
        tuple(texts),
        _counts(neighbours),
    )
    store = Store.of(cache, "embeddings")
    embedder = Embedder(models, store, batch, strict, seed, device, progress)
    for label, view in embedder.views.items():
        about_model(results, label, view.model)
    embedded = Embeddings(embedder, request, results)
    wanted = [Condition(each) for each in request.of("proxy")] + ([request.dev] if request.dev else [])
    if any("train" in score.needs for score in request.scores.values()):
        wanted += [Condition(each) for each in request.of("train")]
    wanted += [condition for each in chosen for condition in each.wants(request)]
    if share is not None:
        part, parts = _part(share, store)
        embedded.share(wanted, part - 1, parts)
        results.note(f"part {part} of {parts} of the images is embedded; run again without share= when all parts are")
        return results
    embedded.prepare(wanted)
    request = _without(request, embedded.failed, results)
    writer = Writer(results, request.models, seed, REPLICATES, store)
    for each in chosen:
        each.rows(request, embedded, writer)
    if samples is not None:
        write_samples(request, embedded, samples)
    return results


def _without(request: Request, failed: Mapping[str, str], results: Results) -> Request:
    """The request without models whose embeddings are not finite: their numbers are undefined, and a note says why."""
    reference = request.models[0]
    for label, why in failed.items():
        results.note(f"{label}: {why}; all its numbers are undefined")
        described = results.meta["models"][label]
        for each in request.of("id", "shift"):
            for name in LABELLED:
                common = {"model": label, "metric": name, "set": each.name, "role": each.role, "seed": request.seed}
                results.add(**described, **common)
                results.add(**described, **common, reference=reference)
    return dataclasses.replace(request, models=tuple(label for label in request.models if label not in failed))


def _sets(
    results: Results,
    data: Any,
    images: Any,
    ood: Any,
    shift: Any,
    dev: Any,
    proxy: Any,
    train: Any,
    templates: str | Sequence[str] | None,
    progress: Progress | None,
) -> list[EvalSet]:
    """Every set with its role and its classes. Shift, dev and train sets have those of the first ID set."""
    id_sets, shift_sets, plain = ([_load(d, progress) for d in _listed(given)] for given in (data, shift, images))
    if not id_sets and not plain:
        raise InputError("no data to evaluate on; pass the name of at least one labelled set")
    ood_sets = [(kind, _load(d, progress)) for kind, d in _kinds(ood)]
    fitted = {role: _load(d, progress) for role, d in (("dev", dev), ("train", train)) if d is not None}
    _name_apart([*id_sets, *shift_sets, *plain, *(found for _, found in ood_sets)])
    others = [*(("shift", each) for each in shift_sets), *fitted.items()]
    for labelled in (*id_sets, *(each for _, each in others)):
        if labelled is not fitted.get("train") or labelled.labels is not None:
            labelled.labelled()
        for note in (*labelled.notes, *labelled.label_notes):
            results.note(note)
    for _, each in ood_sets:
        for note in each.notes:
            results.note(note)
    out = []
    for each in id_sets:
        prompts = tuple(prompt_templates(templates if templates is not None else each.prompts))
        out.append(EvalSet(each, "id", tuple(each.classes or ()), prompts, each.labels))
    for each in plain:
        for note in each.notes:
            results.note(note)
        out.append(EvalSet(each, "images", (), ()))
    if not id_sets:
        if others or ood_sets:
            raise InputError("sets of other origin or other classes were given, but no labelled set beside them")
        return out
    if proxy is not None:
        out.append(EvalSet(_captioned(_load(proxy, progress), [*id_sets, *shift_sets]), "proxy", (), ()))
    first = out[0]
    for role, each in others:
        bare = role == "train" and each.labels is None  # some scores learn from images alone
        labels = None if bare else each.labels_in(first.data)
        out.append(dataclasses.replace(first, data=each, role=role, labels=labels))
    for kind, each in ood_sets:
        out.append(dataclasses.replace(first, data=each, role=f"ood-{kind}" if kind else "ood", labels=None))
    return out


def _captioned(proxy: qdata.ImageSet, evaluated: Sequence[qdata.ImageSet]) -> qdata.ImageSet:
    if proxy.captions is None:
        raise InputError(f"{proxy.spec} has no captions; the logit scale is tuned on images with captions (proxy)")
    if any(proxy.digest == each.digest for each in evaluated):
        raise InputError(f"{proxy.spec} is evaluated, too: the logit scale must be tuned on other images (proxy)")
    return proxy


def _part(share: tuple[int, int], store: Store) -> tuple[int, int]:
    part, parts = share
    if not 1 <= part <= parts:
        raise InputError(f"share={share!r} is no part; give (i, n) with 1 <= i <= n")
    if store.folder is None:
        raise InputError("a part of the images was asked for, but nothing is kept: name a cache that all parts share")
    return part, parts


def _counts(neighbours: Sequence[int]) -> tuple[int, ...]:
    for k in neighbours:
        if type(k) is not int or k < 1:
            raise InputError(f"neighbours={k!r} is no number of neighbours; give whole numbers of 1 or more")
    return tuple(dict.fromkeys(neighbours))


def _given(sets: Iterable[EvalSet]) -> set[str]:
    """What these sets give a score."""
    train = [each for each in sets if each.role == "train"]
    labelled = any(each.labels is not None for each in train)
    return ({"train"} if train else set()) | ({"labels"} if labelled else set())


def _scores(results: Results, names: Iterable[str] | None, given: set[str]) -> dict[str, Score]:
    """The scores that were named, or all that have what they need; `given`: what there is of `NEEDS`."""
    out: dict[str, Score] = {}
    left_out: dict[str, list[str]] = {}
    for name in SCORES.names() if names is None else names:
        score = SCORES.made(name)
        if unknown := sorted(set(score.needs) - set(NEEDS)):
            raise InputError(f"score {name!r} needs {unknown[0]!r}; evaluate gives {', '.join(sorted(NEEDS))}")
        if lacking := next((need for need in NEEDS if need in score.needs - given), None):
            if names is not None:
                raise InputError(f"score {name!r} {NEEDS[lacking]}")
            left_out.setdefault(lacking, []).append(name)
            continue
        out[name] = score
    for need, without in left_out.items():
        results.note(f"scores left out: {', '.join(without)} (each {NEEDS[need]})")
    return out


def _listed(data: Any) -> list[Any]:
    return [data] if isinstance(data, (str, os.PathLike, qdata.ImageSet)) else list(data or ())


def _kinds(ood: Any) -> list[tuple[str, Any]]:
    """(kind, set) pairs; kind is "near", "far" or ""."""
    if isinstance(ood, Mapping):
        for kind in ood:
            if kind not in ("near", "far", ""):
                raise InputError(f"an OOD set is 'near' or 'far', not {kind!r}; use these keys")
        return [(kind, data) for kind, listed in ood.items() for data in _listed(listed)]
    out = []
    for data in _listed(ood):
        kind = ""
        if isinstance(data, str) and data.startswith(("near=", "far=")):
            kind, data = data.split("=", 1)
        name = data.name if isinstance(data, qdata.ImageSet) else os.path.basename(str(data).split("?")[0])
        out.append((kind or next((k for k in ("near", "far") if k in name.lower()), ""), data))
    return out


def _load(data: Any, progress: Progress | None) -> qdata.ImageSet:
    if isinstance(data, qdata.ImageSet):
        return dataclasses.replace(data)
    return qdata.load(os.fspath(data), progress=progress)


def _name_apart(sets: list[qdata.ImageSet]) -> None:
    """Rows are found by the name of their set: a second set of a name gets a number."""
    taken: set[str] = set()
    for found in sets:
        name, count = found.name, 1
        while found.name in taken:
            count += 1
            found.name = f"{name} ({count})"
        taken.add(found.name)
