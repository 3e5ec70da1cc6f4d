"""`evaluate`: models and data sets in, one table out. Embeds once, measures many; differences are paired."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qclip.data.corruptions import SEVERITIES, expand
from qclip.errors import InputError, option
from qclip.machine import environment
from qclip.metrics.predictions import LABELLED
from qclip.results import Results
from qclip.store import Store

from .about import about_model
from .embed import Embedder, Progress
from .embedded import Embeddings
from .measurements import MEASUREMENTS
from .request import NEIGHBOURS, Condition, EvalSet, Request
from .runs import Runs, checked_runs, correct
from .samples import write as write_samples
from .sets import evaluated_sets
from .wanted_scores import enough_to_learn_from, negative_words, wanted_scores, what_is_given
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
    captions: Any = (),
    negatives: str | os.PathLike[str] | Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    jpeg85: bool = False,
    measurements: Sequence[str] | None = None,
    batch: int = 64,
    strict: bool = False,
    cache: Store | bool | str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    samples: str | os.PathLike[str] | None = None,
    share: tuple[int, int] | None = None,
    replicates: int | None = None,
    runs: Runs | None = None,
) -> Results:
    """How reliable the models are, and what differs from the first of them.

    models: label -> model with an adapter (open_clip, timm, Hugging Face; float or quantized), or one model. The first
        is the reference of every paired difference.
    data: ID sets, one or a list of names (`KIND:PATH...`), `ImageSet`s or `datasets.Dataset`s, labelled, with class
        names.
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
    train: set for OOD scores that learn from training images, and for the linear probe; some need its labels.
    captions: sets whose images have captions, for retrieval; they need no labels.
    negatives: words that are no class, for scores that compare with some: a file with one per line, or the words.
    templates: prompts with a `{}`, or the name of a list in `qclip.models.class_names.TEMPLATES`; default: what the set
        brings along, else "simple".
    full: corruptions on every image instead of a fixed seeded sample of 1,000.
    scores, corruptions, measurements: names (`SCORES`, `CORRUPTIONS` or groups of them, `MEASUREMENTS`). Default: every
        score that has what it needs, Gaussian noise, every measurement.
    severities: of the corruptions, of 1 to 5; means over severities are over these.
    jpeg85: what is corrupted goes through JPEG of quality 85, as the published ImageNet-C did.
    strict: an unreadable image stops the run; else it is left out, counted and named in `notes`.
    cache: where embeddings are kept: None = the user's cache folder, a path, a `qclip.store.Store`, or False.
    device: the models are moved there; default: where they are.
    progress: called as (what, images done, images in all) while images are embedded.
    samples: a Parquet file that gets a row per model, condition and image: prediction, rank of the label, confidence,
        scores (`samples.table` lists the columns).
    share: (i, n): only embed the i-th of n parts (from 1) of the images into the cache, and measure nothing. n
        processes or machines that share the cache do this at once; the same call without `share` then finds everything
        there, if it runs on the same kind of device with as many threads.
    runs: name -> labels of models that are runs of one thing, as {"w4a8-lsq": ["seed 0", "seed 1", "seed 2"]}, in the
        same order of seeds for all. Their means get rows under that name, with paired differences to the reference,
        and of the first of these names to each other one; the intervals hold images and runs (`runs.over_runs`), and
        `difference_p` is the p of each, `difference_holm_p` that corrected by Holm (`runs.correct`).

    replicates: of the bootstrap; None: 1,000.

    Intervals are 95 %, from so many paired bootstrap replicates (BCa for ECE); ID and OOD sets are drawn separately.
    Where a model gives NaN or Inf, all its numbers are undefined, and a note says where; of the reference it raises
    NonFiniteError. Raises InputError / DataError on unusable input.
    """
    models = {"model": models} if isinstance(models, nn.Module) else dict(models)
    if not models:
        raise InputError("no model to evaluate; pass a model or a dict {label: model}")
    chosen = [MEASUREMENTS.made(name) for name in (MEASUREMENTS.names() if measurements is None else measurements)]
    named = expand(DEFAULT_CORRUPTIONS if corruptions is None else corruptions)
    nearest = _counts(neighbours)
    graded = _severities(severities)
    replicates = REPLICATES if replicates is None else replicates
    if type(replicates) is not int or replicates < 1:
        raise InputError(f"replicates={replicates!r} is no number of resamples; give a whole number of 1 or more")
    results = Results(meta=environment(seed=seed, batch=batch, replicates=replicates, command="qclip.evaluate"))
    sets = tuple(evaluated_sets(results, data, images, ood, shift, dev, proxy, train, captions, templates, progress))
    store = Store.of(cache, "embeddings")
    several = checked_runs(runs, models)
    embedder = Embedder(models, store, batch, strict, seed, device, progress, jpeg85)
    if jpeg85 and named:
        results.note("corrupted images went through JPEG of quality 85, as those of ImageNet-C did")
    biases = {label: view.encoders.logit_bias for label, view in embedder.views.items()}
    request = dataclasses.replace(
        _request(results, models, sets, scores, negatives, models if ood else {}),
        corruptions=named,
        severities=graded,
        full=full,
        seed=seed,
        biased={label: bias for label, bias in biases.items() if bias is not None},
        texts=tuple(texts),
        neighbours=nearest,
    )
    for label, view in embedder.views.items():
        about_model(results, label, view.model)
    described = results.meta["models"]
    described |= {what: described[labels[0]] for what, labels in several.items()}
    embedded = Embeddings(embedder, request, results)
    wanted = [Condition(each) for each in request.of("proxy")] + ([request.dev] if request.dev else [])
    if any("train" in score.needs for score in request.scores.values()):
        wanted += [Condition(each) for each in request.of("train")]
    wants = {each.name: each.wants(request) for each in chosen}
    wanted += [condition for conditions in wants.values() for condition in conditions]
    if measurements is not None and (idle := [name for name, conditions in wants.items() if not conditions]):
        results.note(f"nothing that was given is measured by {', '.join(idle)}")
    if share is not None:
        part, parts = _part(share, store)
        embedded.share(wanted, part - 1, parts)
        again = f"run again without {option('share')} when all parts are"
        results.note(f"part {part} of {parts} of the images is embedded; {again}")
        store.tell_of_the_others()
        return results
    embedded.prepare(wanted)
    request = _without(request, embedded.failed, results)
    left = {what: labels for what, labels in several.items() if not set(labels) - set(request.models)}
    writer = Writer(results, request.models, seed, replicates, store, left)
    for each in chosen:
        each.rows(request, embedded, writer)
    correct(results)
    if samples is not None:
        write_samples(request, embedded, samples)
    store.tell_of_the_others()
    return results


def check(
    models: Sequence[str] = ("reference", "model"),
    data: Any = (),
    ood: Any = (),
    shift: Any = (),
    dev: Any = None,
    templates: str | Sequence[str] | None = None,
    *,
    images: Any = (),
    proxy: Any = None,
    train: Any = None,
    captions: Any = (),
    negatives: str | os.PathLike[str] | Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    measurements: Sequence[str] | None = None,
    **_: Any,
) -> None:
    """What `evaluate` would refuse of these settings whatever the models are: before any model is loaded."""
    results = Results()
    sets = tuple(evaluated_sets(results, data, images, ood, shift, dev, proxy, train, captions, templates, None))
    request = _request(results, models, sets, scores, negatives, {})
    for name in MEASUREMENTS.names() if measurements is None else measurements:
        MEASUREMENTS.made(name).wants(request)


def _request(
    results: Results,
    labels: Iterable[str],
    sets: tuple[EvalSet, ...],
    scores: Sequence[str] | None,
    negatives: str | os.PathLike[str] | Sequence[str] | None,
    models: Mapping[str, nn.Module],
) -> Request:
    """What is asked of these sets, with the scores that have what they need; `models`: see `wanted_scores`."""
    words = negative_words(negatives, sets)
    given = what_is_given(sets) | ({"negatives"} if words else set())
    wanted = wanted_scores(results, scores, given, models)
    if scores is not None:
        enough_to_learn_from(wanted, sets)
    return Request(tuple(labels), sets, wanted, (), negatives=words, scores_named=scores is not None)


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


def _part(share: tuple[int, int], store: Store) -> tuple[int, int]:
    two = isinstance(share, (tuple, list)) and len(share) == 2 and all(type(each) is int for each in share)
    part, parts = share if two else (0, 0)
    if not 1 <= part <= parts:
        raise InputError(f"{option('share')} {share!r} is no part; give (i, n) with 1 <= i <= n")
    if store.folder is None:
        raise InputError("a part of the images was asked for, but nothing is kept: name a cache that all parts share")
    return part, parts


def _counts(neighbours: Sequence[int]) -> tuple[int, ...]:
    for k in neighbours:
        if type(k) is not int or k < 1:
            raise InputError(f"neighbours={k!r} is no number of neighbours; give whole numbers of 1 or more")
    return tuple(dict.fromkeys(neighbours))


def _severities(severities: Sequence[int]) -> tuple[int, ...]:
    for severity in severities:
        if type(severity) is not int or severity not in SEVERITIES:
            raise InputError(f"{option('severity')} {severity!r} is none of a corruption's; give some of 1 to 5")
    if not severities:
        raise InputError("no severity of the corruptions is left; give some of 1 to 5")
    return tuple(sorted(set(severities)))
