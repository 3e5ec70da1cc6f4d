"""One site at a time, at several widths, in an otherwise float model: what that does to embeddings and predictions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import calibration, data, models, rewrite
from ..errors import InputError, RecipeError
from ..machine import environment
from ..metrics.calibration import calibration_error
from ..progress import Progress
from ..recipes import Recipe, Treatment
from ..results import Results
from ..store import Entry, Store, key_of
from .budget import Whole
from .groups import Group, groups
from .probe import Outcome, Probe, labelled

BITS = (2, 3, 4, 5, 6, 8)
SAMPLES = 128
REPLICATES = 500
VERSION = 1  # of what is measured, for the store


def sensitivity(
    model: nn.Module,
    samples: object,
    bits: Sequence[int] = BITS,
    activation_bits: int = 8,
    *,
    count: int = SAMPLES,
    seed: int = 0,
    strict: bool = False,
    cache: bool | str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """What quantizing each site alone, and each tower alone, does to a float model.

    samples: images as for `quantize`; captions of theirs, or built-in ones, are what the text tower sees. With labels
    and class names, accuracy and calibration are told as well. count: images and captions. Sites that read one input
    (q, k and v) are quantized together, as `wXaY` does it: round to nearest.

    Rows have `role` "site" or "tower", `set` the site or tower, `subset` what is quantized together, `axis` "bits" and
    `at` the width; the metrics are "sensitivity" (1 - mean cosine of the tower's embeddings), and with labels
    "sensitivity_kl" (nats, of zero-shot probabilities), "sensitivity_top1" and "sensitivity_ece" (differences to
    float). Intervals are 95 %, from the spread over samples. What is measured is kept in `cache`, group by group.
    Raises InputError, DataError.
    """
    recipes = {b: _recipe(b, activation_bits) for b in dict.fromkeys(bits)}
    if not recipes:
        raise InputError("no width to measure; give some of 2 to 8 bits")
    probe = probe_of(model, samples, count, seed, strict)
    store = Store.of(cache, "sensitivities")
    results = Results(meta=environment(seed=seed, command="qclip.sensitivity"))
    source = rewrite.weight_hash(probe.model)
    results.meta["sensitivity"] = {
        "source_sha256": source,
        "samples": probe.samples.description,
        "activation_bits": activation_bits,
    }
    found = groups(probe.towers, next(iter(recipes.values())))
    units: list[tuple[str, str, str, list[Group]]] = [("site", g.name, g.tower, [g]) for g in found]
    units += [("tower", name, name, [g for g in found if g.tower == name]) for name in probe.towers]
    plain = probe.plain()
    for done, (role, name, tower, members) in enumerate(units):
        if progress is not None:
            progress("sensitivity", done, len(units))
        for width, recipe in recipes.items():
            key = key_of(
                "sensitivity",
                VERSION,
                weights=source,
                samples=probe.samples.description["sha256"],
                classes=list(probe.classes),
                prompts=None if probe.prompts is None else probe.prompts.tolist(),
                labels=None if probe.labels is None else probe.labels.tolist(),
                sites=[site.name for group in members for site in group.sites],
                recipe=recipe.hash,
            )
            compute = functools.partial(_measured, probe, tower, members, recipe)
            outcome = Outcome(**store.fill(key, compute, lambda entry: _wrong(entry, len(plain.right))).arrays)
            sites = [site.name for group in members for site in group.sites] if role == "site" else [name]
            for site in sites:
                _rows(results, outcome, plain, role=role, set=site, subset=name, axis="bits", at=width, recipe=recipe)
    if progress is not None:
        progress("sensitivity", len(units), len(units))
    return results


def probe_of(model: nn.Module, samples: object, count: int = SAMPLES, seed: int = 0, strict: bool = False) -> Probe:
    """A copy of a float model with `count` images and captions; the arguments are those of `sensitivity`."""
    labels, classes = None, ()
    if isinstance(samples, str | Path):
        samples = data.load(str(samples))
    if isinstance(samples, data.ImageSet):
        samples = samples.sample(min(count, len(samples)), seed)
    with models.evaluating(model):
        seen = calibration.samples(samples, models.encoders(model), images=count, seed=seed, strict=strict)
        if isinstance(samples, data.ImageSet) and seen.rows is not None:
            labels, classes = labelled(samples, seen.rows)
        if seen.tokens is not None:
            seen.tokens = seen.tokens[:count]
        return Probe(model, seen, labels, classes, getattr(samples, "prompts", None) or ())


def together(probe: Probe, activation_bits: int = 8) -> Whole:
    """A function: widths by group -> 1 - mean cosine with all of them at once, summed over the towers."""

    def error(widths: dict[str, int]) -> float:
        wanted = {name: _recipe(width, activation_bits) for name, width in widths.items()}
        found = groups(probe.towers, next(iter(wanted.values())))
        members = {name: [g for g in found if g.tower == name] for name in probe.towers}
        return sum(float(probe.outcome(name, wanted, each).error.mean()) for name, each in members.items())

    return error


def _recipe(bits: int, activation_bits: int) -> Recipe:
    name = f"w{bits}a{activation_bits}"
    try:
        return Recipe(name, Treatment.named(name))
    except RecipeError as why:
        raise InputError(f"sensitivities at {name} cannot be measured: {why}") from None


def _measured(probe: Probe, tower: str, members: list[Group], recipe: Recipe) -> Entry:
    return Entry(vars(probe.outcome(tower, {group.name: recipe for group in members}, members)))


def _rows(results: Results, outcome: Outcome, plain: Outcome, *, recipe: Recipe, **where: Any) -> None:
    common = {
        **where,
        "recipe": recipe.name,
        "bits": recipe.bits,
        "recipe_hash": recipe.hash,
        "model": "float",
    }
    _add(results, "sensitivity", outcome.error.mean(), lambda draw: _means(outcome.error, draw), outcome.error, common)
    if not len(plain.right):
        return
    change = outcome.right - plain.right
    _add(results, "sensitivity_kl", outcome.kl.mean(), lambda draw: _means(outcome.kl, draw), outcome.kl, common)
    _add(results, "sensitivity_top1", change.mean(), lambda draw: _means(change, draw), change, common)
    now, before = (calibration_error(each.confidence, each.right) for each in (outcome, plain))
    worse = now.plain() - before.plain()
    _add(results, "sensitivity_ece", worse, lambda draw: now.on(draw) - before.on(draw), change, common)


def _add(results: Results, metric: str, value: Any, of: Any, samples: np.ndarray, common: dict[str, Any]) -> None:
    """With the interval of a paired bootstrap over samples."""
    n = len(samples)
    draw = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), REPLICATES).T.astype(np.float64)
    low, high = np.percentile(of(draw), (2.5, 97.5))
    results.add(metric=metric, value=value, low=low, high=high, n=n, **common)


def _means(values: np.ndarray, draw: np.ndarray) -> np.ndarray:
    return values @ draw / len(values)


def _wrong(entry: Entry, labelled: int) -> str:
    """What is wrong with a stored outcome, "" where nothing is."""
    if set(entry.arrays) != {"error", "kl", "right", "confidence"}:
        return "it holds other arrays"
    for name, array in entry.arrays.items():
        if array.ndim != 1 or not np.isfinite(array).all() or (name != "error" and len(array) != labelled):
            return f"{name!r} is not of this many finite numbers"
    return ""
