"""Images made of images: altered ones that still show what they showed, and ones that show nothing.

`VIEWS` are what a model learns to see through. Pixel noise, blur, weather and what else `qclip.data.corruptions` has is
not among them, so that robustness to those is never robustness to what was trained on.
`NEGATIVES` keep the colours or the spectrum of photographs and lose their objects. A `mixture` is another image,
of which the float model says what it shows.

Each function takes one image `[3, H, W]` within `bounds` and a generator, its only source of chance; numbers are
in units of the bounds' range.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Bounds = tuple[Tensor, Tensor]  # least and largest value of each channel, [3, 1, 1]
Chance = np.random.Generator
Alteration = Callable[[Tensor, Bounds, Chance], Tensor]


def bounds_of(images: Tensor) -> Bounds:
    """Of images `[n, 3, H, W]`, each channel's."""
    return images.amin((0, 2, 3))[:, None, None], images.amax((0, 2, 3))[:, None, None]


def _drawn(chance: Chance, x: Tensor, *shape: int) -> Tensor:
    """Standard normal numbers, on the image's device."""
    return torch.from_numpy(chance.standard_normal(shape)).to(x.device, x.dtype)


# -- views -------------------------------------------------------------------------------------------------------------


def waves(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """One to four plane waves, of any direction, frequency and colour (after Vaish et al. 2024, arXiv 2403.01944)."""
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in x.shape[1:])
    added = torch.zeros_like(x)
    for _ in range(chance.integers(1, 5)):
        direction = chance.uniform(0, math.pi)
        cycles = chance.uniform(0.5 / x.shape[1], 0.5)  # a pixel: up to Nyquist's
        along = rows[:, None] * math.sin(direction) + columns * math.cos(direction)
        phase = torch.from_numpy(chance.uniform(0, 2 * math.pi, 3)).to(x.device, x.dtype)
        added += _drawn(chance, x, 3, 1, 1) * torch.sin(2 * math.pi * cycles * along + phase[:, None, None])
    strength = chance.uniform(0.02, 0.2) / added.square().mean().sqrt().clamp(min=1e-6)
    return x + strength * added * (bounds[1] - bounds[0])


def spectrum(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """Every amplitude of the Fourier spectrum by a factor of its own, phases as they are (after Chen et al. 2021, arXiv
    2108.08487: phases carry what is seen)."""
    found = torch.fft.rfft2(x)
    factor = torch.exp(chance.uniform(0.3, 1.0) * _drawn(chance, x, *found.shape))
    factor[:, 0, 0] = 1.0
    return torch.fft.irfft2(found * factor, s=x.shape[1:])


def levels(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """Three to eight brightnesses of each channel (posterize, one of AugMix's own operations, arXiv 1912.02781)."""
    low, range_ = bounds[0], (bounds[1] - bounds[0]).clamp(min=1e-6)
    steps = int(chance.integers(2, 8))
    return low + torch.round((x - low) / range_ * steps) / steps * range_


VIEWS: tuple[Alteration, ...] = (waves, spectrum, levels)


# -- negatives ---------------------------------------------------------------------------------------------------------


def shuffled(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """Its patches, a quarter or an eighth of the side each, in random order."""
    size = max(1, x.shape[1] // int(chance.choice((4, 8))))
    whole = x[:, : x.shape[1] // size * size, : x.shape[2] // size * size]
    patches = whole.unfold(1, size, size).unfold(2, size, size)  # [3, a, b, size, size]
    a, b = patches.shape[1:3]
    order = torch.from_numpy(chance.permutation(a * b)).to(x.device)
    mixed = patches.reshape(3, a * b, size, size)[:, order].reshape(3, a, b, size, size)
    out = x.clone()
    out[:, : a * size, : b * size] = mixed.permute(0, 1, 3, 2, 4).reshape(3, a * size, b * size)
    return out


def scrambled(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """Its Fourier amplitudes with the phases of noise, the same in all channels."""
    phases = torch.fft.rfft2(_drawn(chance, x, *x.shape[1:])).angle()
    phases[0, 0] = 0.0
    return torch.fft.irfft2(torch.fft.rfft2(x) * torch.exp(1j * phases), s=x.shape[1:])


def texture(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """A random field whose amplitudes fall as a power of the frequency, of one colour, with its mean and contrast."""
    height, width = x.shape[1:]
    rows, columns = torch.fft.fftfreq(height, device=x.device), torch.fft.rfftfreq(width, device=x.device)
    frequency = (rows[:, None].square() + columns.square()).sqrt().clamp(min=1 / max(height, width))
    field = torch.fft.irfft2(
        torch.fft.rfft2(_drawn(chance, x, height, width)) * frequency ** -chance.uniform(0, 2), s=(height, width)
    )
    field = (field - field.mean()) / field.std().clamp(min=1e-6)
    colour = _drawn(chance, x, 3, 1, 1)
    colour = colour / colour.norm().clamp(min=1e-6) * math.sqrt(3)
    return x.mean((1, 2), keepdim=True) + x.std((1, 2), keepdim=True) * colour * field


def gratings(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """Stripes or a chequered plane of two colours, at any angle."""
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in x.shape[1:])
    angle, period, square = chance.uniform(0, math.pi), chance.uniform(3, x.shape[1] / 2), chance.random() < 0.5
    one = torch.sin(2 * math.pi / period * (rows[:, None] * math.sin(angle) + columns * math.cos(angle)))
    other = torch.sin(2 * math.pi / period * (rows[:, None] * math.cos(angle) - columns * math.sin(angle)))
    share = (one * other if square else one).sign() / 2 + 0.5
    colours = torch.from_numpy(chance.uniform(0, 1, (2, 3, 1, 1))).to(x.device, x.dtype)
    return bounds[0] + (bounds[1] - bounds[0]) * (colours[0] * share + colours[1] * (1 - share))


NEGATIVES: tuple[Alteration, ...] = (shuffled, scrambled, texture, gratings)


def cut(x: Tensor, other: Tensor, chance: Chance) -> Tensor:
    """One image with a half of another in it (CutMix, Yun et al. 2019, arXiv 1905.04899): neither is seen whole."""
    height, width = x.shape[1:]
    tall = round(height * math.sqrt(chance.uniform(0.4, 0.6)))
    wide = min(width, round(height * width / 2 / tall))
    top, left = chance.integers(0, height - tall + 1), chance.integers(0, width - wide + 1)
    out = x.clone()
    out[:, top : top + tall, left : left + wide] = other[:, top : top + tall, left : left + wide]
    return out


def crop(x: Tensor, chance: Chance) -> Tensor:
    """A rectangle of a quarter of the image to all of it, sides up to 4 : 3, at its size again, flipped or not."""
    height, width = x.shape[1:]
    area, aspect = chance.uniform(0.25, 1.0), math.exp(chance.uniform(-1, 1) * math.log(4 / 3) / 2)
    tall = min(height, max(1, round(height * math.sqrt(area) / aspect)))
    wide = min(width, max(1, round(width * math.sqrt(area) * aspect)))
    top, left = chance.integers(0, height - tall + 1), chance.integers(0, width - wide + 1)
    part = x[None, :, top : top + tall, left : left + wide]
    found = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    return found.flip(-1) if chance.random() < 0.5 else found


# -- what is drawn -----------------------------------------------------------------------------------------------------


def view(x: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """One of `VIEWS`, within the bounds."""
    return _within(VIEWS[chance.integers(len(VIEWS))](x, bounds, chance), bounds)


def mixture(x: Tensor, other: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """A crop of one image; in one of three, of another one besides, blended (mixup, Zhang et al. 2018, arXiv
    1710.09412) or cut in."""
    one, kind = crop(x, chance), chance.integers(6)
    if kind == 0:
        one = torch.lerp(one, crop(other, chance), float(chance.uniform(0.1, 0.5)))
    elif kind == 1:
        one = cut(one, crop(other, chance), chance)
    return _within(one, bounds)


def negative(x: Tensor, other: Tensor, bounds: Bounds, chance: Chance) -> Tensor:
    """One of `NEGATIVES`, or `cut`, within the bounds."""
    kind = int(chance.integers(len(NEGATIVES) + 1))
    return _within(cut(x, other, chance) if kind == len(NEGATIVES) else NEGATIVES[kind](x, bounds, chance), bounds)


def _within(x: Tensor, bounds: Bounds) -> Tensor:
    return torch.minimum(torch.maximum(x, bounds[0]), bounds[1])


def looks(images: Tensor) -> list[Tensor]:
    """Images `[n, 3, H, W]` as they are, flipped, and both shifted by a sixteenth of the side to two corners."""
    by = max(1, images.shape[-1] // 16)
    flips = [images, images.flip(-1)]
    wide = [F.pad(each, (by,) * 4, mode="replicate") for each in flips]
    height, width = images.shape[-2:]
    corners = [each[..., y : y + height, x : x + width] for each in wide for y, x in ((0, 0), (2 * by, 2 * by))]
    return flips + corners
