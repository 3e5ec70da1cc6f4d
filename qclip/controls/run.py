"""Trains a recipe and its controls, each once per seed, and evaluates them together. What is finished is kept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import artifact, models, recipes, rewrite
from ..errors import InputError, NonFiniteError
from ..progress import Progress
from ..recipes import Recipe
from ..reliability import check, evaluate
from ..results import Results
from ..training import ConversionError, Pairs, Settings, TrainingError, train
from ..training.checkpoint import check_same, forget
from .arms import Arm, arms

FLOAT = "float"
MEASUREMENTS = ("clean", "groups", "ood", "corrupted", "agreement")


def controlled(
    model: nn.Module,
    recipe: str | Path | dict | Recipe,
    pairs: object,
    /,
    output: str | Path,
    *,
    data: Any,
    dev: Any,
    ood: Any = (),
    seeds: int = 3,
    seed: int = 0,
    controls: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    strict: bool = False,
    evaluation: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Results:
    """Train a recipe and its controls (`arms.CONTROLS`), each with `seeds` seeds from `seed` on, and say what differs.

    `output`: a folder; every finished run of an arm is an artifact in it, `FOLDER-seedN`, and is not trained again.
    `pairs`, `classes` and `settings`: as for `train`. `data`, `dev`, `ood`: as for `evaluate`; `dev` is where the
    temperature of every arm is fitted, and a gain in calibration that is gone then was one. `evaluation`: more
    arguments of it.

    Results hold every run, compared with the float model, and for each arm the mean over its runs, under its name;
    the recipe is compared with every control, run by run of the same seed. Intervals hold images and seeds
    (`reliability.runs`), and `difference_holm_p` is corrected over the whole table.
    Raises as `train` and `evaluate`, InputError where `output` holds something else.
    """
    recipe = recipes.get(recipe)
    wanted = arms(recipe, controls, **settings)
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, not {seeds}")
    if dev is None:
        raise InputError("the temperature of every arm is fitted on a labelled set that is not the test; name dev")
    if any(dev is each or _named(dev) == _named(each) for each in (data if isinstance(data, list | tuple) else [data])):
        raise InputError(
            f"{_named(dev)!r} is the test and dev: a temperature fitted on the test is none; name another dev"
        )
    measured = {"measurements": MEASUREMENTS, "scores": ["mcm"]} | (evaluation or {})
    check(data=data, ood=ood, dev=dev, **measured)
    if rewrite.is_quantized(model):
        raise InputError("the model is quantized; a recipe is trained from a float one")
    with models.explicit_form(model):
        source = rewrite.weight_hash(model)
    output, encoders = Path(output), models.encoders(model)
    if len(encoders.towers) < 2:
        train(model, recipe, pairs)  # which says why not
    runs: dict[str, list[str]] = {arm.name: [] for arm in wanted}
    trained: dict[str, nn.Module] = {}
    total = seeds * len(wanted)
    for number in range(seed, seed + seeds):
        drawn = Pairs.of(pairs, encoders, wanted[0].settings["pairs"], number, strict)
        for arm in wanted:
            label = f"{arm.name} seed {number}"
            told = None if progress is None else functools.partial(_told, progress, label, len(trained), total)
            try:
                trained[label] = _trained(model, arm, number, drawn, output, source, classes, told)
            except (TrainingError, NonFiniteError, ConversionError) as why:
                raise type(why)(f"{label}: {why}") from None
            runs[arm.name].append(label)
    results = evaluate(
        {FLOAT: model, **trained},
        data,
        ood,
        dev=dev,
        seed=seed,
        runs=runs,
        strict=strict,
        progress=progress,
        **measured,
    )
    for arm in wanted:
        results.note(f"{arm.name}: {arm.about}")
    results.note(
        f"{len(wanted)} arms, {seeds} seed{'s' * (seeds > 1)} each, {wanted[0].settings['steps']} steps; choices were "
        "made before, and not by these sets"
    )
    return results


def _named(data: Any) -> Any:
    """A set's data name, where it has one."""
    return getattr(data, "spec", data)


def _told(progress: Progress, label: str, before: int, total: int, what: str, done: int, steps: int) -> None:
    progress(f"{label} ({before + 1} of {total}): {what}", done, steps)


def _trained(
    model: nn.Module,
    arm: Arm,
    seed: int,
    pairs: Pairs,
    output: Path,
    source: str,
    classes: Sequence[str] | None,
    progress: Progress | None,
) -> nn.Module:
    """One run of an arm: loaded where it is finished, else trained, from the last checkpoint where there is one."""
    folder, device = output / f"{arm.folder}-seed{seed}", models.encoders(model).device
    training = folder.with_name(f"{folder.name}.training")
    chosen = arm.settings | {"seed": seed}
    if artifact.is_artifact(folder):
        _check(folder, arm, source, pairs, dataclasses.asdict(Settings(**chosen)), classes)
    else:
        done = train(model, arm.recipe, pairs, training, classes=classes, progress=progress, **chosen)
        artifact.save(done, folder)
    forget(training)  # of a run that was killed right behind its artifact, too
    return artifact.load(folder, device)


def _check(
    folder: Path, arm: Arm, source: str, pairs: Pairs, settings: dict[str, Any], classes: Sequence[str] | None
) -> None:
    """Raises CheckpointError where a finished run was made of something else."""
    content = artifact.read_description(folder)
    held, notes = content["provenance"], content["provenance"].get("training", {})
    before = {
        "recipe": Recipe.from_dict(content["recipe"]).hash,
        "model": held.get("source_sha256"),
        "data": notes.get("pairs", {}).get("sha256"),
        "classes": notes.get("classes"),
        **dataclasses.asdict(Settings()),  # what an earlier version did not write was as it is by default
        **notes.get("settings", {}),
    }
    now = {
        "recipe": arm.recipe.hash,
        "model": source,
        **settings,
        "data": pairs.description["sha256"],
        "classes": None if classes is None else list(classes),
    }
    check_same(folder, before, now)
