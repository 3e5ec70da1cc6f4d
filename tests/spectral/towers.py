"""Weights with a known spectrum, and models that hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from qclip.models.tower import Site, Tower


def power_law(n: int = 96, k: int = 128, seed: int = 0) -> torch.Tensor:
    """A weight whose singular values fall like 1 / rank^0.7."""
    rng = np.random.default_rng(seed)
    r = min(n, k)
    u, v = (np.linalg.qr(rng.normal(size=(m, r)))[0] for m in (n, k))
    return torch.from_numpy(u * np.arange(1, r + 1) ** -0.7 @ v.T)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(weight / step) * step


def white(weight: torch.Tensor, size: float = 0.02) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng(int(1e6 * weight[0, 0].abs())).normal(size=weight.shape))
    return weight + size * weight.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)


def truncated(weight: torch.Tensor, start: int = 64, kept: float = 0.0) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    s[start:] *= kept
    return u * s @ vt


class Quantized(nn.Module):
    """As a quantized site: `weight` is no matrix, the effective weight comes from a method."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.effective = torch.empty(0), weight

    def dequantized_weight(self) -> torch.Tensor:
        return self.effective

    def from_steps(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda units: 0.01 * units


class Model(nn.Module):
    """Sites vision.blocks.B.mlp.fc1 (and a text embedding), float or "quantized"."""

    def __init__(self, matrices: list[torch.Tensor], quantized: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for matrix in matrices:
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=torch.float64)
            linear.weight = nn.Parameter(matrix.clone())
            self.layers.append(Quantized(matrix.clone()) if quantized else linear)
        self.embedding = nn.Embedding(20, 8)

    def towers(self) -> dict[str, Tower]:
        sites = {}
        for index in range(len(self.layers)):
            name = f"vision.blocks.{index}.mlp.fc1"
            sites[name] = Site(name, "fc1", "norm", name, self.layers, str(index))
        words = Site("text.embedding", "embedding", "raw", "text.embedding", self, "embedding")
        return {"vision": Tower("vision", self, [], sites, 1), "text": Tower("text", self, [], {words.name: words}, 1)}


def apart(embeddings: np.ndarray) -> np.ndarray:
    """Unit class embeddings `[4, E]` among which these embeddings, all near their mean, are told apart: both ways along
    the two directions in which they differ most."""
    mean = embeddings.mean(0)
    found = np.linalg.svd(embeddings - mean)[2][:2]
    found = found - np.outer(found @ mean, mean) / (mean @ mean)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return np.concatenate([found, -found])
