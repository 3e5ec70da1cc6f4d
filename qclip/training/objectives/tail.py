"""How much of the image embeddings' variance lies in directions that the float model hardly uses. Emptying them tests
the paper's account (arXiv 2509.21173) from the other side; fine classes and groups are what may be lost by it."""

from __future__ import annotations

from torch import Tensor

from . import Features
from .spectral import held


class Tail:
    """Share of `|f - mean|^2` of images beyond the float model's first 64 principal directions"""

    name = "tail"
    needs = frozenset({"basis"})

    def __call__(self, features: Features) -> Tensor:
        assert features.basis is not None
        energy = ((features.image - features.basis.mean) @ features.basis.vectors).square().mean(0)
        return energy[held(len(energy)) :].sum() / energy.sum()
