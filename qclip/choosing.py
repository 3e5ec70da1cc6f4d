"""The recipe for a model, this machine and some images: measured, and said why."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import data, models, ptq, recipes
from .bench.worker import timed
from .data import ImageSet
from .errors import DataError, RecipeError
from .machine import environment
from .progress import Progress
from .recipes import Recipe
from .reliability import evaluate

CANDIDATES = ("w8a8", "w6a8", "w4a8", "w8a8-smoothquant")
ERROR, AGREEMENT = 0.002, 0.97  # at the bad ends of their intervals
JUDGED = 512  # images
BATCH, ROUNDS = 16, 7
EQUAL = 1.03  # times that differ by less are equally fast


@dataclasses.dataclass(frozen=True)
class Candidate:
    """error: 1 - mean cosine of image embeddings to float's, and the upper end of its 95 % interval; agreement: share
    of equal predictions and its lower end, None without class names; ms: of one image; refused: why not tried."""

    recipe: Recipe
    error: tuple[float, float] = (float("nan"), float("nan"))
    agreement: tuple[float, float] | None = None
    ms: float = float("nan")
    refused: str = ""

    def fits(self, error: float, agreement: float) -> bool:
        told = self.agreement is None or self.agreement[1] >= agreement
        return not self.refused and self.error[1] <= error and told


@dataclasses.dataclass(frozen=True)
class Choice:
    recipe: Recipe
    reasons: list[str]  # five lines
    candidates: list[Candidate]
    float_ms: float


def choose(
    model: nn.Module,
    calibration: str | Path | ImageSet,
    candidates: Sequence[str | Recipe] = CANDIDATES,
    *,
    error: float = ERROR,
    agreement: float = AGREEMENT,
    seed: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> Choice:
    """The fastest of `candidates` on this machine whose embedding error and agreement with float stay within bounds.

    calibration: images; half of them calibrate, the others, at most 512, judge. error: largest 1 - mean cosine of image
    embeddings; agreement: least share of equal zero-shot predictions, where the images have class names; both are held
    to the bad ends of 95 % intervals. Of recipes that are equally fast (3 %) the one of least error is taken; where
    none stays within the bounds, the one of least error, and the reasons say that it does not. Times are medians of
    image batches of 16, in turns. Raises DataError where there are fewer than two images, RecipeError where no
    candidate can be made.
    """
    images = data.load(str(calibration)) if isinstance(calibration, str | Path) else calibration
    if len(images) < 2:
        raise DataError(f"{images.spec} has {len(images)} images; two and more are needed, to calibrate and to judge")
    order = np.random.default_rng(seed).permutation(len(images))
    half = len(images) // 2
    seen, judged = (images.select(np.sort(part)) for part in (order[:half], order[half:][:JUDGED]))
    made: dict[str, nn.Module] = {}
    found: list[Candidate] = []
    for recipe in map(recipes.get, candidates):
        try:
            made[recipe.name] = ptq.quantize(model, recipe, seen, seed, strict=strict, progress=progress)
            found.append(Candidate(recipe))
        except RecipeError as why:
            found.append(Candidate(recipe, refused=str(why)))
    if not made:
        raise RecipeError(f"none of the candidates fits this model: {found[0].refused}")
    named = judged.labels is not None and bool(judged.classes)
    results = evaluate(
        {"float": model, **made},
        judged if named else (),
        images=() if named else judged,
        corruptions=(),
        measurements=["agreement"],
        cache=False,
        strict=strict,
        seed=seed,
        progress=progress,
    )
    times = _times({"float": model, **made})

    def measured(each: Candidate) -> Candidate:
        if each.refused:
            return each
        cosine, same = (
            results.row(model=each.recipe.name, metric=metric, reference="float", set=judged.name)
            for metric in ("cosine_mean", "agreement")
        )
        assert cosine is not None
        told = None if same is None else (same["value"], same["low"])
        return dataclasses.replace(
            each, error=(1 - cosine["value"], 1 - cosine["low"]), agreement=told, ms=times[each.recipe.name]
        )

    found = [measured(each) for each in found]
    fitting = [each for each in found if each.fits(error, agreement)]
    if fitting:
        fastest = min(each.ms for each in fitting)
        best = min((each for each in fitting if each.ms <= EQUAL * fastest), key=lambda each: each.error[0])
    else:
        best = min((each for each in found if not each.refused), key=lambda each: each.error[0])
    bounds = f"1 - cosine at most {error:g}" + (f", same prediction for {100 * agreement:g} %" if named else "")
    return Choice(
        best.recipe, _reasons(best, found, bool(fitting), bounds, len(judged), times["float"]), found, times["float"]
    )


@torch.inference_mode()
def _times(contenders: dict[str, nn.Module]) -> dict[str, float]:
    """Milliseconds an image by label: medians of batches, in turns."""
    calls = {}
    for label, model in contenders.items():
        encoders = models.encoders(model)
        side = encoders.image_size
        x = torch.zeros(BATCH, 3, side, side)
        calls[label] = lambda encode=encoders.encode_image, x=x: encode(x)
        for _ in range(3):  # what is recorded is recorded here
            calls[label]()
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(ROUNDS):
        for label, call in calls.items():
            seconds[label].append(timed(call, 1))
    return {label: 1e3 * statistics.median(each) / BATCH for label, each in seconds.items()}


def _reasons(
    best: Candidate, found: list[Candidate], fits: bool, bounds: str, judged: int, float_ms: float
) -> list[str]:
    outside = [each.recipe.name for each in found if not each.refused and each is not best]
    agreed = "" if best.agreement is None else f"; same prediction for {100 * best.agreement[0]:.1f} %"
    if best.agreement is None:
        agreed = "; the images have no class names, so predictions were not compared"
    return [
        f"{best.recipe.name}: "
        + ("the fastest within the bounds" if fits else "NOT within the bounds, but the nearest"),
        f"bounds, at the bad ends of 95 % intervals: {bounds}",
        f"on {judged} images that did not calibrate it: 1 - cosine {best.error[0]:.5f}, at most {best.error[1]:.5f}"
        + agreed,
        f"{best.ms:.2f} ms an image, float {float_ms:.2f} ms ({float_ms / best.ms:.2f} times as fast) on "
        f"{environment()['cpu']}, {torch.get_num_threads()} threads, batches of {BATCH}",
        "beside it: "
        + "; ".join(
            f"{each.recipe.name} {each.ms:.2f} ms, {each.error[0]:.5f}"
            if not each.refused
            else f"{each.recipe.name} does not fit"
            for each in found
            if each is not best
        )
        if outside or len(found) > 1
        else "there was no other candidate",
    ]
