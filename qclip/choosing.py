"""The recipe for a model, this machine and some images: measured, and said why."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
NEARER = {"w4a8": "w4a8-gptq"}  # as fast and nearer to float, but slow to make: tried where it would be the fastest
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
    trial = _Trial(model, seen, judged, seed, strict, progress)
    found = trial.tried([recipes.get(each) for each in candidates])
    if all(each.refused for each in found):
        raise RecipeError(f"none of the candidates fits this model: {found[0].refused}")
    fastest = min((each for each in found if not each.refused), key=lambda each: each.ms)
    if fastest.recipe.name in NEARER and not fastest.fits(error, agreement):
        (nearer,) = trial.tried([recipes.get(NEARER[fastest.recipe.name])], {NEARER[fastest.recipe.name]: fastest.ms})
        found.append(nearer)
    fitting = [each for each in found if each.fits(error, agreement)]
    if fitting:
        least = min(each.ms for each in fitting)
        best = min((each for each in fitting if each.ms <= EQUAL * least), key=lambda each: each.error[0])
    else:
        best = min((each for each in found if not each.refused), key=lambda each: each.error[0])
    bounds = f"1 - cosine at most {error:g}" + (f", same prediction for {100 * agreement:g} %" if trial.named else "")
    reasons = _reasons(best, found, bool(fitting), bounds, len(judged), trial.float_ms)
    return Choice(best.recipe, reasons, found, trial.float_ms)


class _Trial:
    """What recipes do to a model: calibrated on `seen`, judged on `judged`. float_ms: of one image, once tried."""

    def __init__(
        self,
        model: nn.Module,
        seen: ImageSet,
        judged: ImageSet,
        seed: int,
        strict: bool,
        progress: Progress | None,
    ) -> None:
        self.model, self.seen, self.judged, self.seed, self.strict = model, seen, judged, seed, strict
        self.progress, self.float_ms = progress, float("nan")
        self.named = judged.labels is not None and bool(judged.classes)

    def tried(self, wanted: Sequence[Recipe], times: dict[str, float] | None = None) -> list[Candidate]:
        """times: milliseconds by name, where they are known."""
        made: dict[str, nn.Module] = {}
        refused: dict[str, str] = {}
        common: dict[str, Any] = {"seed": self.seed, "strict": self.strict, "progress": self.progress}
        for recipe in wanted:
            try:
                made[recipe.name] = ptq.quantize(self.model, recipe, self.seen, **common)
            except RecipeError as why:
                refused[recipe.name] = str(why)
        if not made:
            return [Candidate(recipe, refused=refused[recipe.name]) for recipe in wanted]
        results = evaluate(
            {"float": self.model, **made},
            self.judged if self.named else (),
            images=() if self.named else self.judged,
            corruptions=(),
            measurements=["agreement"],
            cache=False,
            **common,
        )
        if times is None:
            times = _times({"float": self.model, **made})
            self.float_ms = times["float"]

        def candidate(recipe: Recipe) -> Candidate:
            if recipe.name in refused:
                return Candidate(recipe, refused=refused[recipe.name])
            cosine, same = (
                results.row(model=recipe.name, metric=metric, reference="float", set=self.judged.name)
                for metric in ("cosine_mean", "agreement")
            )
            assert cosine is not None
            told = None if same is None else (same["value"], same["low"])
            return Candidate(recipe, (1 - cosine["value"], 1 - cosine["low"]), told, times[recipe.name])

        return [candidate(recipe) for recipe in wanted]


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
