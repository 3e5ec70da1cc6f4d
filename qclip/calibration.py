"""Streams samples through the float towers in explicit form and keeps, for every site, what methods need to know."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import qkernels

from .data import batches, load
from .errors import DataError, NonFiniteError
from .models import Encoders
from .models.tower import Site, Tower

Progress = Callable[[str, int, int], None]  # (what, done, in all)

IMAGES = 128  # enough for maxima and histograms; more changes little (methods 2.1)

_SUBJECTS = (
    "dog",
    "cat",
    "bird",
    "child",
    "woman",
    "man",
    "car",
    "truck",
    "boat",
    "airplane",
    "horse",
    "flower",
    "house",
    "street",
    "mountain",
    "river",
    "red star",
    "blue circle",
    "bowl of fruit",
    "train",
)
_FORMS = (
    "a photo of a {}.",
    "a {}",
    "a black and white picture of the {} in the distance.",
    "two people look at a {} on a sunny afternoon while others walk past.",
    "a small {} on grass",
    "the {} stands next to a wooden fence, partly hidden.",
    "a close-up of a {} with a blurred background.",
    "a drawing of a {}.",
)
CAPTIONS = [form.format(subject) for form in _FORMS for subject in _SUBJECTS]


@dataclasses.dataclass
class Samples:
    """What calibration runs on. `images` float `[n, 3, H, W]`, preprocessed; `tokens` int64 `[m, context]`."""

    images: Tensor
    tokens: Tensor | None
    description: dict  # source, counts, hash: goes into the provenance

    def image_batches(self, size: int = 32) -> Iterator[Tensor]:
        yield from self.images.split(size)

    def token_batches(self) -> Iterator[Tensor]:
        """Captions of equal length together: the tower stops at the last EOT of a batch, so that no position behind a
        caption's own EOT enters a statistic. (For a tower that does not stop there, see `Encoders.text_positions`.)"""
        if self.tokens is None:
            return
        lengths = self.tokens.argmax(-1)
        for length in lengths.unique().tolist():
            yield from self.tokens[lengths == length].split(32)


def samples(
    calibration: object, encoders: Encoders, images: int = IMAGES, seed: int = 0, strict: bool = False
) -> Samples:
    """From what a user may give: a data name, an `ImageSet`, a loader of image tensors (or tuples that begin with
    one), or a tensor of preprocessed images `[n, 3, H, W]`. Captions are the set's own, else a built-in list.

    An unreadable image is left out with a warning; with `strict` it raises. Raises DataError when nothing is there, a
    value is not finite, or the model does not take images of this shape.
    """
    captions, origin = CAPTIONS, "built-in captions"
    source = type(calibration).__name__
    unreadable: list[str] = []
    if isinstance(calibration, str | Path):
        calibration = load(str(calibration))
    if isinstance(calibration, Tensor):
        stack = calibration[:images]
    elif hasattr(calibration, "image") and hasattr(calibration, "sample"):
        data = calibration
        source = data.spec  # type: ignore[attr-defined]
        data = data.sample(min(images, len(data)), seed)  # type: ignore[attr-defined, arg-type]
        if data.captions is not None:
            captions, origin = [c for group in data.captions for c in group[:1]], "the set's captions"
        if encoders.preprocess is None:
            raise DataError(
                "the model has no preprocess, so images cannot be calibrated on; "
                "pass a tensor of preprocessed images, or set model.preprocess"
            )
        stack = torch.cat([batch for _, batch in batches(data, encoders.preprocess, strict=strict)])
        for note in data.notes:
            warnings.warn(note, stacklevel=2)
        if unreadable := [why for _, why in data.unreadable]:
            shown = "; ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
            warnings.warn(
                f"{source}: {len(unreadable)} of {len(data)} calibration images cannot be read and are left "
                f"out: {shown}",
                stacklevel=2,
            )
    elif isinstance(calibration, Iterable):
        parts, have = [], 0
        for batch in calibration:
            part = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(part, Tensor):
                raise DataError(
                    f"the calibration loader gives {type(part).__name__}; it must give tensors of images, "
                    "or tuples that begin with one"
                )
            parts.append(part)
            have += len(part)
            if have >= images:
                break
        if not parts:
            raise DataError("the calibration loader gave no batch; pass one with images")
        first, *others = dict.fromkeys(tuple(part.shape[1:]) for part in parts)
        if others:
            raise DataError(
                f"the calibration loader gives images of shape {first} and of shape {others[0]}; run all "
                "of them through model.preprocess"
            )
        stack = torch.cat(parts)[:images]
    else:
        raise DataError(f"calibration is a data name, a loader or a tensor of images, not {type(calibration).__name__}")
    if stack.ndim != 4 or len(stack) == 0:
        raise DataError(f"calibration images must be a non-empty [n, 3, H, W] tensor, got {tuple(stack.shape)}")
    if not stack.is_floating_point():
        raise DataError(
            f"calibration images must be preprocessed, floating point, got {stack.dtype}; "
            "run them through model.preprocess"
        )
    if not stack.isfinite().all():
        bad = int((~stack.flatten(1).isfinite().all(1)).nonzero()[0])
        raise DataError(f"calibration image {bad} holds NaN or Inf; remove it or check the preprocessing")
    _check_shape(stack, encoders)
    tokens = encoders.tokenizer(captions[:256]) if encoders.tokenizer is not None else None
    digest = hashlib.sha256(np.ascontiguousarray(stack.float().cpu().numpy()).tobytes())
    if tokens is not None:
        digest.update(tokens.cpu().numpy().tobytes())
    stack = stack.to(encoders.device, encoders.dtype)
    description = {
        "source": source,
        "images": len(stack),
        "captions": 0 if tokens is None else len(tokens),
        "captions_from": origin,
        "seed": seed,
        "unreadable": len(unreadable),
        "sha256": digest.hexdigest(),
    }
    return Samples(stack, tokens, description)


@torch.no_grad()
def _check_shape(stack: Tensor, encoders: Encoders) -> None:
    """Raises DataError where the model cannot take images of this shape (some take other sizes than their own)."""
    side = encoders.image_size
    if tuple(stack.shape[1:]) == (3, side, side):
        return
    try:
        encoders.encode_image(stack[:1])
    except (RuntimeError, ValueError, AssertionError):
        raise DataError(
            f"calibration images are {tuple(stack.shape[1:])}, but the model takes {(3, side, side)}; run "
            "them through model.preprocess"
        ) from None


class AbsMax:
    """Largest |x| of every input channel: float32 `[K]`."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if self.value is None:
            self.value = torch.zeros(x.shape[-1], device=x.device)
        qkernels.channel_absmax(x.detach(), running=self.value)


class Histogram:
    """|x| of a tensor in 2,048 bins; the range doubles by merging bins, so batches do not matter."""

    BINS = 2048

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)
        self.top = 0.0
        self.finite = True

    def update(self, x: Tensor) -> None:
        x = x.detach().float().abs().flatten().cpu()
        peak = float(x.max()) if x.numel() else 0.0
        if not np.isfinite(peak):
            self.finite = False
            return
        if peak == 0.0:
            self.counts[0] += x.numel()
            return
        if self.top == 0.0:  # a power of two, so that ranges found in any order are multiples of each other
            self.top = 2.0 ** np.ceil(np.log2(peak))
        while peak > self.top:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.top *= 2
        self.counts += torch.histc(x, self.BINS, 0.0, self.top).double()

    def scale(self, bits: int = 8, steps: int = 100) -> float:
        """The symmetric scale with the least squared error, searched over `steps` clipping points."""
        if self.top == 0.0:
            return 1.0
        qmax = 2 ** (bits - 1) - 1
        width = self.top / self.BINS
        centres = (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * width
        used = int(self.counts.nonzero().max()) + 1
        best, best_error = self.top / qmax, float("inf")
        for i in range(steps):
            scale = used * width * (1 - i / (steps * 1.25)) / qmax
            error = centres - torch.round(centres / scale).clamp(max=qmax) * scale
            total = float((self.counts * error * error).sum())
            if total < best_error:
                best, best_error = scale, total
        return best


class Hooks:
    """Forward pre-hooks that are gone when the block ends. They see what reaches an embedding: of inputs `[B, S, K]`
    the positions `reaching` (bool `[B, S]`), all where it is None."""

    def __init__(self) -> None:
        self.handles: list = []
        self.reaching: Tensor | None = None

    def add(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda _, args: see(reaching(args[0], self.reaching))))

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def reaching(x: Tensor, positions: Tensor | None) -> Tensor:
    """The rows of x `[B, S, ...]` at `positions` bool `[B, S]`, `[n, ...]`; x itself where it has no such positions."""
    return x if positions is None or x.ndim < 3 or x.shape[:2] != positions.shape else x[positions]


@torch.no_grad()
def run(
    encoders: Encoders,
    data: Samples,
    towers: Iterable[str],
    hooks: Hooks | None = None,
    progress: Progress | None = None,
) -> None:
    """One pass over all samples through the named towers."""
    images = data.images if "vision" in towers else data.images[:0]
    captions = 0 if data.tokens is None or "text" not in towers else len(data.tokens)
    done, total = 0, len(images) + captions

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("calibration", done, total)

    report(0)
    if "vision" in towers:
        for batch in data.image_batches():
            encoders.encode_image(batch)
            report(len(batch))
    if "text" in towers:
        for tokens in data.token_batches():
            if hooks is not None:
                hooks.reaching = encoders.text_positions(tokens)
            encoders.encode_text(tokens)
            report(len(tokens))
    if hooks is not None:
        hooks.reaching = None


def channel_maxima(
    encoders: Encoders, towers: dict[str, Tower], data: Samples, sites: list[Site], progress: Progress | None = None
) -> dict[str, Tensor]:
    """Largest |input| per channel for every group of sites that share an input, keyed by `site.shared`.

    Raises NonFiniteError naming the site whose input is not finite.
    """
    observers: dict[str, AbsMax] = {}
    with Hooks() as hooks:
        for site in sites:
            if site.kind != "embedding" and site.shared not in observers:
                observers[site.shared] = AbsMax()
                hooks.add(site.module, observers[site.shared].update)
        run(encoders, data, towers, hooks, progress)
    out = {}
    for site in sites:
        if site.shared in observers and (value := observers[site.shared].value) is not None:
            if not value.isfinite().all():
                raise _not_finite(site)
            out[site.shared] = value
    return out


def _not_finite(site: Site) -> NonFiniteError:
    return NonFiniteError(
        f"the input of {site.name} is NaN or Inf during calibration; check the weights before it and "
        "the calibration images"
    )


def static_scales(
    encoders: Encoders,
    towers: dict[str, Tower],
    data: Samples,
    sites: list[Site],
    smooth: dict[str, Tensor],
    bits: Callable[[Site], int],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The static activation scale of every shared input, float32 `[]`, of the smoothed input where `smooth` has one.

    Raises NonFiniteError naming the site whose input is not finite, DataError naming one that no sample reached.
    """
    observers: dict[str, Histogram] = {}
    width: dict[str, int] = {}
    with Hooks() as hooks:
        for site in sites:
            if site.shared in observers:
                continue
            observer = observers[site.shared] = Histogram()
            width[site.shared] = bits(site)
            factor = smooth.get(site.shared)
            see = observer.update if factor is None else (lambda x, o=observer, f=factor: o.update(x * f))
            hooks.add(site.module, see)
        run(encoders, data, towers, hooks, progress)
    for site in sites:
        if not observers[site.shared].finite:
            raise _not_finite(site)
        if not observers[site.shared].counts.any():
            hint = "the model has no tokenizer, set model.tokenizer" if data.tokens is None else "leave it float"
            raise DataError(f"{site.name} saw nothing during calibration, so it has no static scale; {hint}")
    return {key: torch.tensor(observer.scale(width[key]), dtype=torch.float32) for key, observer in observers.items()}
