"""What a worker holds in memory from one task to the next: sets, the float model, and the variants of the last task."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from qclip import artifact, ptq, zoo
from qclip import data as qdata
from qclip.data import ImageSet
from qclip.errors import InputError, ModelError
from qclip.progress import Progress

from .facts import model_key, set_key
from .store import StudyStore
from .tasks import Task
from .variants import Variant


class Resident:
    """Each is read when it is asked for first, and refused where it is not what the plan was expanded with."""

    def __init__(self, store: StudyStore, runtime: str, device: str, progress: Progress | None) -> None:
        self.store, self.runtime, self.device, self.progress = store, runtime, device, progress
        self._sets: dict[str, ImageSet] = {}
        self._models: dict[str, nn.Module] = {}  # float, the last one alone
        self._variants: dict[tuple[str, str], nn.Module] = {}  # by model and key

    def set(self, task: Task, name: str) -> ImageSet:
        """Raises InputError."""
        if name not in self._sets:
            data = qdata.load(name)
            if set_key(data) != task.facts[f"set {name}"]:
                raise InputError(f"{name!r} has changed since the plan was expanded; run it again")
            self._sets[name] = data
        return self._sets[name]

    def model(self, task: Task) -> nn.Module:
        """The float model. Raises ModelError."""
        if task.model not in self._models:
            self._models.clear()
            self._variants.clear()
            self._say(f"loading {task.model}")
            model = zoo.load_model(task.model, self.device)
            if model_key(model) != task.facts[f"model {task.model}"]:
                raise ModelError(f"{task.model!r} has changed since the plan was expanded; run it again")
            self._models[task.model] = model
        return self._models[task.model]

    def release(self, model: str, but: Collection[str]) -> None:
        """All variants but those of this model that have these keys."""
        kept = {(model, key) for key in but}
        self._variants = {name: each for name, each in self._variants.items() if name in kept}

    def variant(self, task: Task, variant: Variant, key: str, wait: bool) -> nn.Module | None:
        """The quantized model of that key; None where another worker is making it, and this one is not to wait. Raises
        OutputError where the store cannot be written, and whatever quantizing does."""
        name = task.model, key
        if name not in self._variants and (found := self._made(task, variant, key, wait)) is not None:
            self._variants[name] = found
        return self._variants.get(name)

    def _made(self, task: Task, variant: Variant, key: str, wait: bool) -> nn.Module | None:
        if variant.artifact is not None:
            if artifact.description_hash(artifact.read_description(variant.artifact)) != key:
                raise ModelError(f"{variant.artifact!r} has changed since the plan was expanded; run it again")
            return artifact.load(variant.artifact, self.device)

        def make(folder: Path) -> None:
            assert variant.recipe is not None
            self._say(f"quantizing {task.model} with {variant.label}")
            small = ptq.quantize(
                self.model(task),
                variant.recipe,
                None if variant.calibration is None else self.set(task, variant.calibration),
                variant.seed,
                strict=task.measured.strict,
                progress=self.progress,
                resume=self.store.folder / "methods",
            )
            artifact.save(small, folder)

        # Whoever quantized it loads it, too: all measure the same, what was read from the file.
        folder = self.store.quantized(f"{key}-{self.runtime}", make, wait)
        return None if folder is None else artifact.load(folder, self.device)

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, 0, 0)
