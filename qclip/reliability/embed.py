"""Images and class names to embeddings: every model sees the same pixels, each picture is decoded once for all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qclip import data as qdata
from qclip import models as qmodels
from qclip.data.corruptions import CORRUPTIONS
from qclip.errors import DataError, InputError
from qclip.progress import Progress
from qclip.store import Entry, Store, key_of

from .kept import Embedded, Stage, readable_now, unfit_vectors, unsound_images
from .keys import STAGES, model_fingerprint, preprocess_fingerprint, runtime
from .local import unsound
from .sample import unit

SHARD = 512  # images in one file of the cache: what a killed run loses at most, for each model, and a worker waits for
TEXTS = 256  # prompts in one forward


@dataclasses.dataclass
class View:
    """A model as the engine sees it: its encode functions, and what feeds them."""

    label: str
    model: nn.Module
    encoders: qmodels.Encoders
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    fingerprint: str
    pixels: str  # fingerprint of its preprocessing: models of equal pixels share decoded batches


class Embedder:
    """Embeds stages and class names with all models, through the cache."""

    def __init__(
        self,
        models: dict[str, nn.Module],
        store: Store,
        batch: int = 64,
        strict: bool = False,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: Progress | None = None,
        jpeg85: bool = False,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch={batch} images cannot be embedded at once; use 1 or more")
        self.store, self.batch, self.strict, self.seed, self.progress = store, batch, strict, seed, progress
        self.jpeg85 = jpeg85
        self.views: dict[str, View] = {}
        for label, model in models.items():
            if device is not None:
                model.to(device)
            encoders = qmodels.encoders(model)
            if missing := [tower for tower in ("vision", "text") if tower not in encoders.towers]:
                raise InputError(f"model {label!r} has no {missing[0]} tower, and images are compared with texts")
            preprocess, tokenizer = encoders.preprocess, encoders.tokenizer
            if preprocess is None or tokenizer is None:
                part = "preprocess" if preprocess is None else "tokenizer"
                raise InputError(f"model {label!r} has no {part}; set it as model.{part} (`qclip.load_model` does)")
            fingerprint, pixels = model_fingerprint(model), preprocess_fingerprint(preprocess)
            self.views[label] = View(label, model, encoders, preprocess, tokenizer, fingerprint, pixels)
        self._crops: dict[str, qdata.Crops] = {}  # by fingerprint of the preprocessing
        self._expected: list[Stage] = []  # what will be asked for, and was not yet
        self._counted: set[tuple[str, str]] = set()  # label and key of what was counted, and will be asked for again
        self.done = self.total = 0

    def _key(self, stage: str, view: View, **parts: Any) -> str:
        where = runtime(torch.device(view.encoders.device)) | {"dtype": str(view.encoders.dtype)}
        return key_of(stage, STAGES[stage], model=view.fingerprint, runtime=where, **parts)

    def _advance(self, name: str, steps: int) -> None:
        self.done += steps
        self._say(name, self.done, self.total)

    def _say(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def expect(self, stages: Iterable[Stage]) -> None:
        """Say what will be asked for: progress has an end then, and who must wait for another process does some of
        it meanwhile."""
        self._expected = list(stages)
        self.total += sum(len(stage.data) for stage in self._expected) * len(self.views)

    def images(self, stage: Stage) -> dict[str, Embedded]:
        """One `Embedded` for each model. What another process is embedding comes last. Raises DataError where no image
        can be read."""
        self._expected = [other for other in self._expected if other.key != stage.key]
        shards = dict(self._shards(stage))
        found = {start: self._shard(shard, wait=False) for start, shard in shards.items()}
        if None in found.values():
            self._meanwhile()
            self._say("waiting for what another process embeds", self.done, self.total)
        parts: dict[str, list[Embedded]] = {label: [] for label in self.views}
        for start, shard in shards.items():
            whole = found[start] or self._shard(shard)
            assert whole is not None  # it was waited for
            for label, part in whole.items():
                part.indices = part.indices + start
                part.unreadable = [(i + start, why) for i, why in part.unreadable]
                parts[label].append(part)
        out = {}
        for label, found in parts.items():
            indices = np.concatenate([p.indices for p in found])
            unreadable = [bad for p in found for bad in p.unreadable]
            if not len(indices):
                reason = f" (first: {unreadable[0][1]})" if unreadable else ""
                raise DataError(
                    f"{stage.data.spec}: none of {len(stage.data)} images can be read{reason}; check the files"
                )
            readable = [p for p in found if len(p.indices)]
            vectors = np.concatenate([p.vectors for p in readable])
            local = {name: np.concatenate([p.local[name] for p in readable]) for name in readable[0].local}
            out[label] = Embedded(indices, vectors, sum(p.seconds for p in found), unreadable, local)
        return out

    def share(self, stages: Iterable[Stage], part: int, parts: int) -> None:
        """Put every `parts`-th shard, from number `part` on, into the store: the others are of other processes."""
        shards = (shard for stage in stages for _, shard in self._shards(stage))
        mine = [shard for number, shard in enumerate(shards) if number % parts == part]
        self.total = sum(len(shard.data) for shard in mine) * len(self.views)
        for shard in mine:
            self._shard(shard)

    def _meanwhile(self) -> None:
        """Embed what will be asked for and nobody else is embedding."""
        for stage in self._expected:
            for _, shard in self._shards(stage):
                if self.store.keeps:  # else it would be computed again
                    self._shard(shard, wait=False, again=True)
        self._expected = []

    def _shards(self, stage: Stage) -> Iterator[tuple[int, Stage]]:
        """Parts of a stage that fill a file of the store each, with the position of their first image."""
        size = max(1, SHARD // self.batch) * self.batch
        for start in range(0, len(stage.data), size):
            positions = np.arange(start, min(start + size, len(stage.data)))
            yield start, dataclasses.replace(stage, data=stage.data.select(positions))

    def _shard(self, stage: Stage, wait: bool = True, again: bool = False) -> dict[str, Embedded] | None:
        """Of each model, from the store or computed; None, without `wait`, where another process is at some of it.
        again: it will be asked for once more."""
        about = {
            "data": stage.data.digest,
            "corruption": stage.corruption,
            "version": CORRUPTIONS.get(stage.corruption).version if stage.corruption else 0,
            "severity": stage.severity,
            "seed": self.seed if stage.corruption else 0,
            "batch": self.batch,
        } | ({"jpeg85": True} if self.jpeg85 and stage.corruption else {})
        keys = {label: self._key("images", view, pixels=view.pixels, **about) for label, view in self.views.items()}
        local = {
            label: self._key(
                "patches", view, pixels=view.pixels, read=each.key, scale=view.encoders.logit_scale, **about
            )
            for label, view, each in ((label, self.views[label], each) for label, each in stage.local.items())
        }

        def stored(labels: Iterable[str]) -> dict[str, Embedded]:
            kept = ((label, self._stored(stage, label, keys[label], local.get(label, ""))) for label in labels)
            return {label: each for label, each in kept if each is not None}

        out = stored(self.views)
        missing = {keys[label]: label for label in self.views if label not in out}
        with self.store.claimed(missing, wait) as mine:
            out |= stored(missing[key] for key in mine)  # by a process that was at it until now
            wanting: dict[str, list[View]] = {}
            for label, view in self.views.items():
                if label not in out and keys[label] in mine:
                    wanting.setdefault(view.pixels, []).append(view)
            for views in wanting.values():
                for label, part in self._compute(stage, views).items():
                    facts = {"seconds": part.seconds, "unreadable": part.unreadable}
                    self.store.write(keys[label], Entry({"indices": part.indices, "vectors": part.vectors}, facts))
                    if part.local:
                        self.store.write(local[label], Entry(part.local))
                    out[label] = part
        whole = len(out) == len(self.views)
        if again or not whole:
            self._counted.update((label, keys[label]) for label in out)
        return out if whole else None

    def _stored(self, stage: Stage, label: str, key: str, local: str) -> Embedded | None:
        """What the store has of one model; None where something is missing, or could not be read and can be now."""
        stored = self.store.open(key, lambda entry: unsound_images(entry, len(stage.data)))
        if stored is None or (kept := self._kept(stage, label, local, len(stored.arrays["indices"]))) is None:
            return None
        unreadable = [(i, why) for i, why in stored.facts["unreadable"]]
        # strict: let the reader raise what it raises
        if unreadable and (self.strict or readable_now(stage.data, unreadable)):
            return None
        self._advance(f"{label}: {stage.name}", 0 if (label, key) in self._counted else len(stage.data))
        self._counted.discard((label, key))
        return Embedded(stored.arrays["indices"], stored.arrays["vectors"], stored.facts["seconds"], unreadable, kept)

    def _kept(self, stage: Stage, label: str, key: str, images: int) -> dict[str, np.ndarray] | None:
        """What the store has of patches; None where something is wanted and not there."""
        if label not in stage.local:
            return {}
        names = list(stage.local[label].scores)
        stored = self.store.open(key, lambda entry: unsound(entry, names, images))
        return None if stored is None else {name: stored.arrays[name] for name in names}

    def _compute(self, stage: Stage, views: list[View]) -> dict[str, Embedded]:
        indices: list[np.ndarray] = []
        vectors: dict[str, list[np.ndarray]] = {view.label: [] for view in views}
        local: dict[str, list[dict[str, np.ndarray]]] = {view.label: [] for view in views}
        seconds = dict.fromkeys(vectors, 0.0)
        stream = qdata.batches(
            stage.data,
            views[0].preprocess,
            size=self.batch,
            strict=self.strict,
            corruption=stage.corruption or None,
            severity=stage.severity,
            seed=self.seed,
            crops=self._crops.setdefault(views[0].pixels, qdata.Crops()),
            jpeg85=self.jpeg85,
        )
        with contextlib.ExitStack() as stack:
            for view in views:
                stack.enter_context(qmodels.evaluating(view.model))
            for positions, pixels in _readable(stream, stage.data):
                indices.append(np.asarray(positions, np.int64))
                for view in views:
                    began = time.perf_counter()
                    embedded = view.encoders.encode_image(pixels)
                    vectors[view.label].append(embedded.float().cpu().numpy())
                    seconds[view.label] += time.perf_counter() - began
                    if view.label in stage.local:
                        read = stage.local[view.label](view.encoders.encode_image, pixels, vectors[view.label][-1])
                        local[view.label].append(read)
                    self._advance(f"{view.label}: {stage.name}", len(positions))
        unreadable = [(int(i), str(why)) for i, why in stage.data.unreadable]
        for view in views:
            self._advance(f"{view.label}: {stage.name}", len(unreadable))
        kept = np.concatenate(indices) if indices else np.empty(0, np.int64)
        none = np.empty((0, 1), np.float32)
        return {
            label: Embedded(
                kept, np.concatenate(parts) if parts else none, seconds[label], unreadable, _joined(local[label])
            )
            for label, parts in vectors.items()
        }

    def texts(self, view: View, prompts: list[str]) -> np.ndarray:
        """Unit text embeddings float64 `[len(prompts), E]`."""
        what = f"{view.label}: class names"
        self._say(what, 0, len(prompts))
        tokens = view.tokenizer(prompts)
        if not isinstance(tokens, Tensor):
            raise InputError(
                f"the tokenizer of {view.label!r} gives {type(tokens).__name__}; it must give a tensor of token ids"
            )

        def compute() -> Entry:
            found = []
            with qmodels.evaluating(view.model):
                for part in tokens.split(TEXTS):
                    found.append(view.encoders.encode_text(part).float().cpu().numpy())
                    self._say(what, min(TEXTS * len(found), len(prompts)), len(prompts))
            return Entry({"vectors": np.concatenate(found)})

        ids = hashlib.sha256(f"{tokens.dtype} {tokens.tolist()}".encode()).hexdigest()
        key = self._key("texts", view, tokens=ids, batch=TEXTS)
        stored = self.store.fill(key, compute, lambda entry: unfit_vectors(entry, len(prompts)))
        return unit(stored.arrays["vectors"], f"text embeddings of {view.label!r}")

    def classifier(self, view: View, classes: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """The zero-shot classifier: for each class the renormalised mean of its unit prompt embeddings, `[K, E]`."""
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        each = self.texts(view, prompts).reshape(len(classes), len(templates), -1)
        return unit(each.mean(1), f"class embeddings of {view.label!r}")


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _readable(stream: Iterator[Any], data: qdata.ImageSet) -> Iterator[Any]:
    """`batches`, except that a part of a set may hold unreadable images only."""
    try:
        yield from stream
    except DataError:
        if len(data.unreadable) < len(data):
            raise
