"""A vision tower, opened: its penultimate features and patch tokens while it embeds, and what it makes of features."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qclip import models as qmodels
from qclip.errors import InputError, NonFiniteError
from qclip.models.tower import Tower

TINY = 1e-6  # added to amplitudes before the logarithm (Park & Kim 2202.06709)


@dataclasses.dataclass(frozen=True)
class Seen:
    """features: what goes into the projection (the embedding itself where there is none), float64 `[n, d]`.
    embeddings: unit length, float64 `[n, E]`. amplitudes: by block, the mean over channels of the log amplitudes of the
    patch tokens' 2D Fourier transform, frequency 0 at `[h // 2, w // 2]`: float64 `[n, h, w]`."""

    features: np.ndarray
    embeddings: np.ndarray
    amplitudes: dict[str, np.ndarray]


class Vision:
    """The vision tower of a model that is in explicit form and evaluates."""

    def __init__(self, model: nn.Module, tower: Tower, label: str = "model") -> None:
        self.encoders, self.tower, self.label = qmodels.encoders(model), tower, label
        self.projections = [site for site in tower if site.kind == "projection"]

    def see(self, batches: Sequence[Tensor], fourier: bool = False) -> Seen:
        """Embed preprocessed images `[b, 3, H, W]`. Raises InputError where the tower has no single penultimate vector
        per image, NonFiniteError where a feature is NaN or Inf."""
        inputs: list[Tensor] = []
        found: dict[str, list[np.ndarray]] = {}
        embeddings: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            if self.projections:
                hook = self.projections[0].module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
                hooks.callback(hook.remove)
            for block in self.tower.blocks if fourier else []:
                maps = found.setdefault(block.name, [])
                hook = block.module.register_forward_hook(
                    lambda _, __, out, maps=maps: maps.append(self._amplitudes(out))
                )
                hooks.callback(hook.remove)
            for images in batches:
                embeddings.append(self.encoders.encode_image(images).double().cpu())
        features = self._vectors(inputs if self.projections else embeddings, sum(map(len, batches)))
        amplitudes = {name: np.concatenate(maps) for name, maps in found.items() if maps and len(maps[0])}
        return Seen(features, unit(torch.cat(embeddings)).numpy(), amplitudes)

    @contextlib.contextmanager
    def watching(self, batches: Sequence[Tensor]) -> Iterator[Callable[[], np.ndarray]]:
        """While the block runs, somebody else may embed these images; what is given tells their features `[n, d]`
        afterwards, as `see` does, with a pass of its own only over batches that nobody embedded in this order."""
        inputs: list[Tensor] = []
        known = False

        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal known
            known = len(inputs) < len(batches) and args[0].shape == batches[len(inputs)].shape
            known = known and torch.equal(args[0], batches[len(inputs)].to(args[0]))

        def leave(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal known
            if known:
                inputs.append(args[0].double().cpu())
            known = False

        def features() -> np.ndarray:
            left = batches[len(inputs) :]
            if not inputs:
                return self.see(left).features
            n = sum(map(len, batches[: len(inputs)]))
            parts = [self._vectors(inputs, n), *([self.see(left).features] if left else [])]
            return np.concatenate(parts)

        patches = [site for site in self.tower if site.kind == "patch"]
        with contextlib.ExitStack() as hooks:
            if self.projections and patches:
                for site, hook in ((patches[0], enter), (self.projections[0], leave)):
                    hooks.callback(site.module.register_forward_pre_hook(hook).remove)
            yield features

    def _vectors(self, parts: Sequence[Tensor], n: int) -> np.ndarray:
        """Features of n images, float64 `[n, d]`."""
        features = torch.cat([each.double().cpu() for each in parts])
        features = features.squeeze(1) if features.dim() == 3 and features.shape[1] == 1 else features
        if features.dim() != 2 or len(features) != n:
            raise InputError(
                f"{self.label}: what goes into its projection is {list(features.shape)} for {n} images, not one vector "
                "each; features of this tower cannot be told"
            )
        if not bool(torch.isfinite(features).all()):
            raise NonFiniteError(f"{self.label}: its features hold NaN or Inf; check its weights")
        return features.numpy()

    def project(self, features: np.ndarray) -> np.ndarray | None:
        """The unit embeddings `[n, E]` of penultimate features `[n, d]`; None where several layers come after them."""
        if len(self.projections) > 1:
            return None
        found = torch.from_numpy(features)
        if self.projections:
            encoders = self.encoders
            found = self.projections[0].module(found.to(encoders.device, encoders.dtype)).double().cpu()
        return unit(found).numpy()

    def _amplitudes(self, out: Any) -> np.ndarray:
        """Float64 `[b, h, w]` of tokens `[b, L, D]` or of feature maps `[b, D, h, w]`; empty where the patches make no
        square and nothing else tells their places."""
        tokens = out[0] if isinstance(out, tuple | list) else out
        if tokens.dim() == 3:
            patches = next((site.rows for site in self.tower if site.kind == "patch"), 0)
            side = math.isqrt(patches)
            if not patches or side * side != patches or tokens.shape[1] < patches:
                return np.empty((0, 0, 0))
            tokens = tokens[:, -patches:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # CLS and registers come first
        elif tokens.dim() != 4:
            return np.empty((0, 0, 0))
        amplitude = torch.fft.fft2(tokens.float()).abs()
        return torch.fft.fftshift((amplitude + TINY).log().mean(1), dim=(-2, -1)).double().cpu().numpy()


@contextlib.contextmanager
def opened(model: nn.Module, label: str = "model") -> Iterator[Vision]:
    """The vision tower of `model` while the block runs; then the model is what it was. Raises ModelError."""
    with qmodels.explicit_form(model) as towers, qmodels.evaluating(model):
        yield Vision(model, towers["vision"], label)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)
