"""Runs samples through the float towers in explicit form and keeps, of every site's input, what methods need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from qclip.progress import Progress

from ..errors import DataError, NonFiniteError
from ..models import Encoders
from ..models.tower import Site, Tower
from ..recipes import Treatment
from .gather import Pixels, Samples, loaded
from .observers import OBSERVERS, AbsMax, Moments, Observer, Quantizer

See = Callable[[Tensor], None]  # called with an input
Inputs = dict[str, Callable[[Tensor], Tensor]]  # by `site.shared`: what is done to an input before it is quantized


@dataclasses.dataclass
class Batch:
    """Samples that go through a tower together; `positions` bool `[B, S]` is what reaches an embedding (None: all)."""

    encode: Callable[[Tensor], Tensor]
    samples: Pixels  # or tokens
    positions: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        return loaded(self.samples)

    def run(self) -> None:
        self.encode(self.inputs)

    def one(self) -> Batch:
        """The first sample alone."""
        return next(self.parts(1))

    def parts(self, size: int) -> Iterator[Batch]:
        """The same samples, so many at a time."""
        for at in range(0, len(self), size):
            rows = slice(at, at + size)
            yield Batch(self.encode, self.samples[rows], None if self.positions is None else self.positions[rows])

    def __len__(self) -> int:
        return len(self.samples)


def batches(encoders: Encoders, data: Samples, tower: str) -> Iterator[Batch]:
    """The samples as one tower takes them."""
    if tower == "vision":
        yield from (Batch(encoders.encode_image, images) for images in data.image_batches())
    if tower == "text":
        for tokens in data.token_batches(encoders):
            yield Batch(encoders.encode_text, tokens, encoders.text_positions(tokens))


class Hooks:
    """Forward pre-hooks that are removed when the `with` block ends. Of inputs `[B, S, K]` they see only the positions
    that reach an embedding: `reaching`, bool `[B, S]` (None: all)."""

    def __init__(self) -> None:
        self.handles: list = []
        self.reaching: Tensor | None = None

    def add(self, module: nn.Module, see: See) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda _, args: see(reaching(args[0], self.reaching))))

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def reaching(x: Tensor, positions: Tensor | None) -> Tensor:
    """x `[B, S, ...]` at `positions` (bool `[B, S]`): `[n, ...]`. x itself where it has no such axes."""
    return x if positions is None or x.ndim < 3 or x.shape[:2] != positions.shape else x[positions]


@torch.no_grad()
def run(
    encoders: Encoders,
    data: Samples,
    towers: Collection[str],
    hooks: Hooks | None = None,
    progress: Progress | None = None,
) -> None:
    """One pass over all samples through the named towers."""
    found = [batch for name in ("vision", "text") if name in towers for batch in batches(encoders, data, name)]
    done, total = 0, sum(map(len, found))
    for batch in (None, *found):
        if batch is not None:
            if hooks is not None:
                hooks.reaching = batch.positions
            batch.run()
            done += len(batch)
        if progress is not None:
            progress("calibration", done, total)
    if hooks is not None:
        hooks.reaching = None


def channel_maxima(
    encoders: Encoders,
    towers: dict[str, Tower],
    data: Samples,
    sites: list[Site],
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Largest |input| per channel for every group of sites that share an input, keyed by `site.shared`; of the input
    behind `inputs`, where there is one for the group.

    Raises NonFiniteError naming the site whose input is not finite.
    """
    kept = _watch(AbsMax, encoders, towers, data, sites, inputs, progress)
    maxima = {key: observer.value for key, observer in kept.items() if observer.value is not None}
    _check_finite(maxima, sites)
    return maxima


def channel_moments(
    encoders: Encoders,
    towers: dict[str, Tower],
    data: Samples,
    sites: list[Site],
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """As `channel_maxima`: mean and standard deviation per channel."""
    kept = _watch(Moments, encoders, towers, data, sites, inputs, progress)
    moments = {key: observer for key, observer in kept.items() if observer.rows}
    _check_finite({key: observer.squares for key, observer in moments.items()}, sites)
    return moments


C = TypeVar("C", AbsMax, Moments)


def _watch(
    kind: type[C],
    encoders: Encoders,
    towers: dict[str, Tower],
    data: Samples,
    sites: list[Site],
    inputs: Inputs | None,
    progress: Progress | None,
) -> dict[str, C]:
    """One pass over all samples with an observer of every input, by `site.shared`."""
    observers: dict[str, C] = {}
    with Hooks() as hooks:
        for site in sites:
            if site.kind != "embedding" and site.shared not in observers:
                observers[site.shared] = kind()
                hooks.add(site.module, _behind(inputs, site, observers[site.shared].update))
        run(encoders, data, towers, hooks, progress)
    return observers


def _check_finite(found: dict[str, Tensor], sites: list[Site]) -> None:
    """Raises NonFiniteError naming the first site whose input has given NaN or Inf."""
    for site in sites:
        if site.shared in found and not found[site.shared].isfinite().all():
            raise _not_finite(site)


def static_quantizers(
    encoders: Encoders,
    towers: dict[str, Tower],
    data: Samples,
    sites: list[Site],
    plans: dict[str, Treatment],
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> dict[str, Quantizer]:
    """By site name: the static scale, and zero point, of the input behind `inputs` that its plan asks for; `plans` by
    site name.

    Raises NonFiniteError naming the site whose input is not finite, DataError naming one that no sample reached.
    """
    observers: dict[tuple[str, type[Observer]], Observer] = {}
    kept: dict[str, Observer] = {}
    with Hooks() as hooks:
        for site in sites:
            kind = OBSERVERS[plans[site.name].activation_observer]
            if (site.shared, kind) not in observers:
                observers[site.shared, kind] = kind()
                hooks.add(site.module, _behind(inputs, site, observers[site.shared, kind].update))
            kept[site.name] = observers[site.shared, kind]
        run(encoders, data, towers, hooks, progress)
    for site in sites:
        if not kept[site.name].finite:
            raise _not_finite(site)
        if not kept[site.name].seen:
            hint = "the model has no tokenizer, set model.tokenizer" if data.tokens is None else "leave it float"
            raise DataError(f"{site.name} saw nothing during calibration, so it has no static scale; {hint}")
    return {name: observer.quantizer(plans[name]) for name, observer in kept.items()}


def _behind(inputs: Inputs | None, site: Site, see: See) -> See:
    change = None if inputs is None else inputs.get(site.shared)
    return see if change is None else lambda x: see(change(x))


def _not_finite(site: Site) -> NonFiniteError:
    return NonFiniteError(
        f"the input of {site.name} is NaN or Inf during calibration; check the weights before it and "
        "the calibration images"
    )
