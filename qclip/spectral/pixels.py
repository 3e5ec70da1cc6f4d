"""Images of a set as the tensors that models take, decoded once and held."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qclip import data as qdata
from qclip import models as qmodels
from qclip.errors import InputError
from qclip.models.class_names import TEMPLATES
from qclip.results import Results

from .opened import unit


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Preprocessed images in batches float32 `[b, 3, H, W]`: 600 MB for 1,000 of 224 pixels. labels: int64 `[n]`, None
    where the set has none. classifier: unit class embeddings of the float model, float64 `[K, E]`. notes: what was left
    out of the set, and other remarks on it."""

    name: str
    batches: list[Tensor]
    labels: np.ndarray | None = None
    classifier: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def take(self, n: int) -> Pixels:
        """The first n images, in batches of the same size."""
        if n >= len(self):
            return self
        size = len(self.batches[0])
        batches = list(torch.cat(self.batches[: -(-n // size)])[:n].split(size))
        return dataclasses.replace(self, batches=batches, labels=None if self.labels is None else self.labels[:n])

    def right(self, embeddings: np.ndarray) -> np.ndarray | None:
        """Whether the nearest class of each unit embedding `[n, E]` is its label, float64 `[n]`; None without any."""
        if self.labels is None or self.classifier is None:
            return None
        return ((embeddings @ self.classifier.T).argmax(1) == self.labels).astype(np.float64)

    @classmethod
    def read(cls, models: Mapping[str, nn.Module], data: qdata.ImageSet | str, images: int, batch: int = 64) -> Pixels:
        """The first `images` of a set as the models take them, and the class embeddings of the first model; an
        unreadable image is left out, which `notes` say. Raises InputError where the models preprocess images
        differently or the first has no preprocessing, DataError where nothing can be read."""
        data = qdata.load(data) if isinstance(data, str) else data
        model = _same_input(models)
        encoders = qmodels.encoders(model)
        if encoders.preprocess is None:
            raise InputError("the float model has no preprocess; set it as model.preprocess (`qclip.load_model` does)")
        part = data.select(np.arange(min(images, len(data))))
        found = list(qdata.batches(part, encoders.preprocess, size=batch))
        labels, classifier, notes = None, None, [*data.notes]
        if bad := part.unreadable:
            shown = "; ".join(why for _, why in bad[:5]) + (" ..." if len(bad) > 5 else "")
            notes.append(f"{data.name}: {len(bad)} of {len(part)} images cannot be read and are left out: {shown}")
        if part.labels is not None and part.classes:
            every, classes = part.labelled()
            notes += data.label_notes
            labels = every[np.concatenate([positions for positions, _ in found])]
            templates = TEMPLATES["simple"] if part.prompts is None else part.prompts
            templates = TEMPLATES.get(templates, [templates]) if isinstance(templates, str) else templates
            classifier = _classifier(encoders, model, classes, templates)
        return cls(data.name, [pixels for _, pixels in found], labels, classifier, tuple(notes))

    def tell(self, results: Results) -> None:
        """Put the notes into `results`."""
        for note in self.notes:
            results.note(note)


def _same_input(models: Mapping[str, nn.Module]) -> nn.Module:
    """The first model. Raises InputError where another takes other pixels: one tensor serves all."""
    (first, model), *others = models.items()
    config = qmodels.preprocess_config(model)
    for label, other in others:
        if qmodels.preprocess_config(other) != config:
            raise InputError(f"{label!r} and {first!r} preprocess images differently; compare models of one origin")
    return model


def _classifier(
    encoders: qmodels.Encoders, model: nn.Module, classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """For each class the renormalised mean of its unit prompt embeddings, `[K, E]`."""
    if encoders.tokenizer is None:
        raise InputError("the float model has no tokenizer; set it as model.tokenizer (`qclip.load_model` does)")
    tokens = encoders.tokenizer([template.replace("{}", name) for name in classes for template in templates])
    with qmodels.evaluating(model):
        found = torch.cat([encoders.encode_text(part).double().cpu() for part in tokens.split(256)])
    return unit(unit(found).unflatten(0, (len(classes), len(templates))).mean(1)).numpy()
