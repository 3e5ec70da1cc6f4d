"""`train`: a float model and pairs in, a quantized model out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, recipes
from ..errors import DataError, InputError, ModelError
from ..files import check_folder
from ..models import Encoders
from ..progress import Progress
from ..recipes import Recipe
from .conversion import SAMPLES, convert
from .objectives import Objective
from .outcome import Judge
from .pairs import PROMPT, Pairs
from .preparation import facts_of, prepare
from .processes import Processes
from .settings import Settings
from .step import Gradient
from .trainer import Trainer

LEAST_APART = 3  # pairs of which calibration says something


def train(
    model: nn.Module,
    recipe: str | Path | dict | Recipe,
    pairs: object,
    /,
    output: str | os.PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> nn.Module:
    """Train a copy of a float model with rounded weights and inputs, and return the quantized model that it becomes.

    `recipe`: as for `prepare`. `pairs`: images with captions, as `Pairs.of` takes them. `output`: a folder for
    checkpoints and `log.csv`; the same call goes on from what a killed one left there, to the bit, on as many threads.
    `classes`: names for objectives that ask for a list of them. `settings`: fields of `Settings`; the others are those
    of the recipe's quantizer. Started by `torchrun`, the processes share every batch, and all of them return the model.

    Raises InputError, DataError, RecipeError and ModelError for what cannot be used, TrainingError and NonFiniteError
    where training cannot go on or has destroyed the model, ConversionError where the deployed model differs from the
    trained one, OutputError where a checkpoint cannot be written. `model` is never changed.
    """
    recipe = recipes.get(recipe)
    if recipe.trained is None:
        return prepare(model, recipe)  # which says why not
    chosen = Settings.of(recipe, **settings)
    _check_start(chosen, recipe)
    objective, processes = Objective(chosen.objective), Processes.of_environment()
    if output is not None and processes.first:
        check_folder(output, (), force=True)
    encoders = models.encoders(model)
    if len(encoders.towers) < 2:
        raise ModelError(
            f"the model has the {encoders.towers[0]} tower alone, and pairs train two; use qclip.prepare, a loop of "
            "your own, and qclip.convert"
        )
    data = Pairs.of(pairs, encoders, chosen.pairs, chosen.seed, strict)
    learned, held = data.split(chosen.held_out, chosen.seed)
    learned, apart = _apart(learned, objective, chosen)
    tokens = _class_tokens(objective, classes, encoders)
    _check_batch(chosen, objective, learned, processes)
    student = prepare(model, recipe, learned.samples(), chosen.seed, progress=progress)
    student.eval()
    if chosen.logit_scale == "learned":
        student.logit_scale.requires_grad_()  # type: ignore[operator, union-attr]
    with models.evaluating(model):
        gradient = Gradient(student, model, learned, objective, chosen, processes, tokens, apart)
    judge = Judge(gradient, model, learned, held)
    provenance = facts_of(student)["provenance"]
    made_of = {
        "recipe": f"{recipe.name} {recipe.hash}",
        "model": provenance["source_sha256"],
        **dataclasses.asdict(chosen),
        "data": learned.description["sha256"],
        "classes": None if classes is None else list(classes),
        "processes": processes.size,
        "threads": torch.get_num_threads(),
        "qclip": provenance["qclip"],
        "torch": provenance["torch"],
    }
    run = Trainer(student, gradient, chosen, processes, None if output is None else Path(output), made_of)
    run.run(progress)
    notes: dict[str, Any] = {
        "settings": dataclasses.asdict(chosen),
        "pairs": learned.description,
        "learned": len(learned),
        **({} if apart is None else {"apart": len(apart)}),
        **({} if classes is None else {"classes": list(classes)}),
    }
    notes |= judge.finish(run)
    rows, captions = (each[:SAMPLES] for each in learned.firsts())
    return convert(student, learned.pixels(rows), learned.tokens[captions], {"training": notes})


def _class_tokens(objective: Objective, classes: Sequence[str] | None, encoders: Encoders) -> Tensor | None:
    if "classes" not in objective.needs:
        return None
    if not classes:
        raise InputError(f"objective {objective.name!r} asks for a list of class names; give classes (--classes FILE)")
    assert encoders.tokenizer is not None
    return encoders.tokenizer([PROMPT.format(name) for name in classes])


def _check_start(settings: Settings, recipe: Recipe) -> None:
    codes = [method for method, _ in recipe.steps if "weight" in recipe.decides(method)]
    if codes and settings.first_rounded:
        raise InputError(
            f"rounding that begins late finds its scales then, and the codes of {codes[0]!r} would be lost; set start "
            "to 0"
        )


def _apart(pairs: Pairs, objective: Objective, settings: Settings) -> tuple[Pairs, Pairs | None]:
    """Pairs to learn from, and those that only terms which ask for such see; None where none does."""
    if "apart" not in objective.needs:
        return pairs, None
    if round(settings.batch * settings.beside) < LEAST_APART:
        raise InputError(
            f"objective {objective.name!r} judges pairs apart, and a share of {settings.beside:g} of a batch of "
            f"{settings.batch} is fewer than {LEAST_APART}; set batch or beside higher"
        )
    learned, apart = pairs.split(settings.apart, settings.seed, "pairs apart")
    if apart is None or len(apart) < LEAST_APART:
        raise InputError(
            f"objective {objective.name!r} asks for pairs apart, and a share of {settings.apart:g} of {len(pairs)} is "
            f"fewer than {LEAST_APART}; set apart higher, or give more pairs"
        )
    return learned, apart


def _check_batch(settings: Settings, objective: Objective, pairs: Pairs, processes: Processes) -> None:
    if settings.batch > len(pairs):
        raise DataError(
            f"a batch of {settings.batch} was asked for, and {len(pairs)} pairs are there to learn from; make batch "
            "smaller, or give more pairs"
        )
    if settings.batch % processes.size:
        raise InputError(f"a batch of {settings.batch} cannot be shared by {processes.size} processes; give a multiple")
    if settings.batch < 2 and "pairs" in objective.needs:
        raise InputError(
            f"a batch of one says nothing to objective {objective.name!r}, which tells a pair from others; set batch "
            "to 2 or more"
        )
    if "pairs" in objective.needs and len({each for own in pairs.captions for each in own}) < 2:
        raise DataError(
            f"all {len(pairs)} images have one caption, and objective {objective.name!r} tells a pair from others; "
            "give each image its own"
        )
