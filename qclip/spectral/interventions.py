"""Does reliability follow? Controls and interventions run through the whole model, measured by whoever is passed in.

This package knows no metric of reliability: `evaluate` takes models by label, the first the reference of paired
differences, and gives `Results`. `functools.partial(qclip.evaluate, data=...)` is one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qclip.errors import InputError
from qclip.progress import Progress
from qclip.results import Results, Row
from qclip.rewrite import dequantize_

from .bands import bands
from .controls import CONTROLS, MIN_SEEDS, Control
from .features import Features
from .intervals import one_more
from .opened import opened
from .pixels import Pixels
from .replaced import Replaced

Evaluate = Callable[[Mapping[str, nn.Module]], Results]
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
BYTES = 1 << 30  # of models that are evaluated together
TRIES = 6  # of the search for a temperature
#: Columns that tell one measurement of a model from another.
MEASURED = ("set", "role", "subset", "axis", "at", "corruption", "severity", "score", "metric")


def through_model(
    float_model: nn.Module,
    quantized_models: Mapping[str, nn.Module],
    evaluate: Evaluate,
    *,
    controls: Sequence[str] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    seeds: int = MIN_SEEDS,
    seed: int = 0,
    label: str = "float",
    pixels: Pixels | None = None,
    interventions: bool = True,
    progress: Progress | None = None,
) -> Results:
    """What `evaluate` measures of controls and interventions in the place of each quantized model.

    Every row is one of the quantized model, with a column more that says what took its place:

    - `axis` "control", the control's name in `at`: float arithmetic, W + its residual in every changed weight. The
      value is the mean over `seeds` draws, the interval where one more draw would fall on the same images, n the draws.
      Rows with `reference` the control's name are the quantized model minus it (of a control that is not random the
      paired difference, resampled over images).
    - `axis` "intervention": "weights" (the quantized weights in float arithmetic), "level undone" (those, each output
      channel times <W, W^> / <W^, W^>), "temperature" (the float model with its logit scale changed until the mean
      confidence on the first ID set is the quantized model's; the factor is the row `logit_factor`). Rows with
      `reference` `label` are paired differences to the float model.
    - `axis` "filter", the strength in `at`: the float model with sigma_i -> (1 - strength) sigma_i in the last band of
      every changed weight.

    pixels: images whose features are told, too, by the rows of `feature_spectrum` with these controls. Where `evaluate`
    embeds the same images in the same batches, a copy embeds them once for both. interventions: whether there are any.

    Models are held as many at once as 1 GiB has room for, one at least. Raises InputError on fewer than 8 seeds, an
    unknown control, a strength outside 0..1, or as `feature_spectrum` does.
    """
    if seeds < MIN_SEEDS:
        raise InputError(f"{seeds} seeds are too few for the controls; use {MIN_SEEDS} or more")
    for strength in strengths:
        if not 0 <= strength <= 1:
            raise InputError(f"a filter of strength {strength} is impossible; give strengths from 0 to 1")
    chosen = {name: CONTROLS.made(name) for name in (CONTROLS.names() if controls is None else controls)}
    results, features = Results(), None
    if pixels is not None:
        features = Features(results, float_model, quantized_models, pixels, seed, label, progress)
    for name, quantized in quantized_models.items():
        with Replaced(float_model, quantized, name) as work:
            run = _Run(float_model, quantized, name, label, evaluate, work, results, features, progress)
            own = run.measured({label: float_model, name: quantized})
            for control in chosen.values():
                run.control(control, own, seeds if control.random else 1, seed)
            if interventions:
                run.interventions(strengths)
                run.temperature(own)
    return results


@dataclasses.dataclass
class _Run:
    """The runs of one quantized model."""

    float_model: nn.Module
    quantized: nn.Module
    name: str
    label: str
    evaluate: Evaluate
    work: Replaced
    results: Results
    features: Features | None
    progress: Progress | None
    done: int = 0

    def measured(self, models: Mapping[str, nn.Module]) -> list[Row]:
        """The rows of these models that say something of images."""
        if self.progress is not None:
            self.progress(f"{self.name}: {', '.join(models)}", self.done, 0)
        self.done += len(models)
        rows = self.evaluate(models).rows
        return [row for row in rows if row["set"] and row["role"] not in ("site", "tower", "model") and not row["axis"]]

    def _copies(self, control: Control, seeds: int, seed: int) -> Iterator[dict[str, nn.Module]]:
        """Float copies with draws of a control, as many at once as `BYTES` has room for."""
        size = sum(p.numel() * p.element_size() for p in self.float_model.parameters())
        held = max(1, BYTES // max(size, 1))
        for start in range(0, seeds, held):
            found: dict[str, nn.Module] = {}
            for k in range(start, min(start + held, seeds)):
                self.work.put(control, seed, k)
                found[f"{control.name} {k}"] = copy.deepcopy(self.work.model)
            yield found

    @contextlib.contextmanager
    def _watched(self, models: Mapping[str, nn.Module], seen: list[np.ndarray]) -> Iterator[None]:
        """Append to `seen` the features of each of these models, from the passes that the block makes."""
        if self.features is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            batches = self.features.pixels.batches
            visions = [stack.enter_context(opened(model, name)) for name, model in models.items()]
            told = [stack.enter_context(vision.watching(batches)) for vision in visions]
            yield
            seen.extend(features() for features in told)

    def control(self, control: Control, own: list[Row], seeds: int, seed: int) -> None:
        draws: dict[tuple[Any, ...], list[float]] = {}
        where: dict[tuple[Any, ...], Row] = {}
        seen: list[np.ndarray] = []
        for models in self._copies(control, seeds, seed):
            paired = {} if control.random else {self.name: self.quantized}
            with self._watched(models, seen):
                rows = self.measured(models | paired)
            for row in rows:
                if row["model"] in models and not row["reference"] and row["value"] is not None:
                    draws.setdefault(_key(row), []).append(row["value"])
                    where[_key(row)] = row
                elif row["model"] == self.name and row["reference"] in models:
                    self._add(row, reference=control.name)
        if self.features is not None:
            self.features.control(self.name, control, seen)
        quantized = {_key(row): row["value"] for row in own if row["model"] == self.name and not row["reference"]}
        for key, values in draws.items():
            if len(values) < seeds:
                continue
            estimate = one_more(np.array(values))
            shown = estimate.columns if control.random else {c: where[key][c] for c in ("value", "low", "high")}
            self._add(where[key] | shown, axis="control", at=control.name, n=seeds)
            value = quantized.get(key)
            if control.random and value is not None and estimate.low is not None and estimate.high is not None:
                gap = {"value": value - estimate.value, "low": value - estimate.high, "high": value - estimate.low}
                self._add(where[key] | gap, reference=control.name, n=seeds)

    def interventions(self, strengths: Sequence[float]) -> None:
        for row in self.measured({self.label: self.float_model, "weights": dequantize_(copy.deepcopy(self.quantized))}):
            if row["model"] == "weights":
                self._add(row, axis="intervention", at="weights")
        for name, change in self.work.changes.items():
            other = change.weight + change.residual
            factor = (change.weight * other).sum(1, keepdim=True) / (other**2).sum(1, keepdim=True).clamp(min=1e-30)
            self.work.write(name, other * factor)
        self._against_float("level undone", axis="intervention", at="level undone")
        for strength in strengths:
            for name, change in self.work.changes.items():
                tail = [*bands(len(change.basis.s)).values()][-1]
                u, s, v = (t[..., tail] for t in (change.basis.u, change.basis.s, change.basis.v))
                self.work.write(name, change.weight - strength * (u * s) @ v.mT)
            self._against_float(f"filter {strength:g}", axis="filter", at=strength)

    def _against_float(self, name: str, **place: Any) -> list[Row]:
        rows = self.measured({self.label: self.float_model, name: self.work.model})
        for row in rows:
            if row["model"] == name:
                self._add(row, **place)
        return rows

    def temperature(self, own: list[Row]) -> None:
        """The float model at the logit scale that gives the quantized model's mean confidence: by regula falsi in the
        log of the factor."""
        wanted, base = (_confidence(own, model) for model in (self.name, self.label))
        if wanted is None or base is None:
            self.results.note(f"{self.name}: nothing tells a mean confidence, so there is no temperature control")
            return
        scaled = copy.deepcopy(self.float_model)
        start = scaled.logit_scale.detach().clone()  # type: ignore[operator, union-attr]
        low, high = (0.0, base), None
        step = 0.1 if wanted > base else -0.1
        tried = at = step
        rows: list[Row] = []
        for _ in range(TRIES):
            tried = at
            with torch.no_grad():
                scaled.logit_scale.copy_(start + tried)  # type: ignore[operator, union-attr]
            rows = self.measured({self.label: self.float_model, "temperature": scaled})
            found = _confidence(rows, "temperature")
            assert found is not None
            low, high = (low if high is None else high), (tried, found)
            if abs(found - wanted) < 1e-5 or high[1] == low[1]:
                break
            at = high[0] + (wanted - high[1]) * (high[0] - low[0]) / (high[1] - low[1])
        for row in rows:
            if row["model"] == "temperature":
                self._add(row, axis="intervention", at="temperature")
        self.results.add(
            model=self.name, metric="logit_factor", value=math.exp(tried), axis="intervention", at="temperature"
        )

    def _add(self, row: Row, **place: Any) -> None:
        columns = {column: row[column] for column in (*MEASURED, "value", "low", "high", "n", "seed", "reference")}
        self.results.add(**columns | {"model": self.name} | place)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[column] for column in MEASURED)


def _confidence(rows: list[Row], model: str) -> float | None:
    """Mean confidence of a model on the first ID set, clean."""
    for row in rows:
        named = row["model"] == model and row["metric"] == "mean_confidence" and row["role"] == "id"
        if named and row["subset"] == "all" and not row["corruption"] and not row["reference"]:
            return row["value"]  # type: ignore[no-any-return]
    return None
