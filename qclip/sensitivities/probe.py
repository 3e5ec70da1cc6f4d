"""A float model in which some sites can be quantized for a moment, and what that does to its embeddings."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .. import calibration, models, rewrite
from ..data import ImageSet
from ..errors import InputError, NonFiniteError
from ..metrics import divergence, softmax
from ..models.class_names import TEMPLATES
from ..ptq.base import build
from ..ptq.driver import states
from ..recipes import Recipe
from .groups import Group

MOST_TEMPLATES = 2  # all prompts are embedded again for every site of a text tower


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Per sample of a tower, float64 `[n]`: error is 1 - cosine to the float embedding. Of labelled images also kl
    (nats), right (0 or 1) and confidence of the zero-shot prediction; empty without labels."""

    error: np.ndarray
    kl: np.ndarray
    right: np.ndarray
    confidence: np.ndarray


class Probe:
    """samples: images and captions. labels, classes, templates: of the images, where they have some."""

    def __init__(
        self,
        model: nn.Module,
        samples: calibration.Samples,
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        templates: str | Sequence[str] = (),
    ) -> None:
        if rewrite.is_quantized(model):
            raise InputError("the model is quantized already; sensitivities are those of a float model")
        self.model = copy.deepcopy(model).eval()
        self.encoders = models.encoders(self.model)
        self.towers = models.towers(self.model)
        if samples.tokens is None:  # no tokenizer: nothing reaches it
            self.towers.pop("text", None)
        self.samples, self.labels, self.classes = samples, labels, tuple(classes)
        self.prompts: Tensor | None = None
        if labels is not None and classes and self.encoders.tokenizer is not None:
            templates = TEMPLATES.get(templates or "simple", [templates]) if isinstance(templates, str) else templates
            wordings = (templates or TEMPLATES["simple"])[:MOST_TEMPLATES]
            self.prompts = self.encoders.tokenizer([each.format(name) for name in classes for each in wordings])
        self._float = {name: self._embedded(name) for name in self.towers}
        self._classes = self._prompted()
        self._plain = self._logits(self._float.get("vision"), self._classes)

    def outcome(self, tower: str, wanted: dict[str, Recipe], groups: Sequence[Group]) -> Outcome:
        """With `groups`, all of one tower, treated as the recipe that `wanted` has under each one's name."""
        with torch.inference_mode(), self._treated(wanted, groups):
            vectors = self._embedded(tower)
            error = 1 - (vectors * self._float[tower]).sum(1)
            if self._plain is None:
                return Outcome(error, *(np.empty(0) for _ in range(3)))
            images = vectors if tower == "vision" else self._float["vision"]
            logits = self._logits(images, self._prompted() if tower == "text" else self._classes)
        assert logits is not None and self.labels is not None
        probs = softmax(logits)
        right = (logits.argmax(1) == self.labels).astype(np.float64)
        return Outcome(error, divergence(self._plain, logits), right, probs.max(1))

    def plain(self) -> Outcome:
        """Of the float model."""
        if self._plain is None or self.labels is None:
            return Outcome(*(np.empty(0) for _ in range(4)))
        right = (self._plain.argmax(1) == self.labels).astype(np.float64)
        return Outcome(np.empty(0), np.zeros(len(right)), right, softmax(self._plain).max(1))

    def _treated(self, wanted: dict[str, Recipe], groups: Sequence[Group]) -> _Treated:
        layers: dict[str, nn.Module] = {}
        for group in groups:
            ready = states(wanted[group.name], {group.tower: self.towers[group.tower]})
            layers |= {site.name: build(ready[site.name]) for site in group.sites}
        return _Treated(self, layers)

    @torch.inference_mode()
    def _embedded(self, tower: str) -> np.ndarray:
        """Unit embeddings of the samples, float64 `[n, E]`."""
        found = calibration.batches(self.encoders, self.samples, tower)
        vectors = _unit(torch.cat([batch.encode(batch.inputs).float() for batch in found]))
        if not np.isfinite(vectors).all():
            raise NonFiniteError(
                f"embeddings of the {tower} tower are NaN or Inf, or 0; check the weights and the samples"
            )
        return vectors

    @torch.inference_mode()
    def _prompted(self) -> np.ndarray | None:
        if self.prompts is None:
            return None
        prompts = _unit(torch.cat([self.encoders.encode_text(part).float() for part in self.prompts.split(64)]))
        classes = prompts.reshape(len(self.classes), -1, prompts.shape[1]).mean(1)
        return classes / np.linalg.norm(classes, axis=1, keepdims=True)

    def _logits(self, images: np.ndarray | None, classes: np.ndarray | None) -> np.ndarray | None:
        return None if images is None or classes is None else self.encoders.logit_scale * images @ classes.T


class _Treated:
    """Inside, these layers stand in the probe's towers."""

    def __init__(self, probe: Probe, layers: dict[str, nn.Module]) -> None:
        self.towers, self.layers = probe.towers, layers
        self.before: dict[str, nn.Module] = {}

    def __enter__(self) -> None:
        for tower in self.towers.values():
            for site in tower:
                if site.name in self.layers:
                    self.before[site.name] = site.module
                    rewrite.pack(self.layers[site.name])
                    tower.write(site, self.layers[site.name])

    def __exit__(self, *_: object) -> None:
        for tower in self.towers.values():
            for site in tower:
                if site.name in self.before:
                    tower.write(site, self.before[site.name])


def _unit(vectors: Tensor) -> np.ndarray:
    found = vectors.double().cpu().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def labelled(data: ImageSet, rows: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels of the images at these rows of the set's source, and class names; (None, ()) of a set without either."""
    if data.labels is None or not data.classes:
        return None, ()
    position = {row: i for i, row in enumerate(data.rows.tolist())}
    return np.asarray(data.labels)[[position[row] for row in rows.tolist()]], tuple(data.classes)
