"""Distance to the float model's image embeddings, told apart by its principal directions: the first are held, the
others less, to which the paper that this project follows ascribes what quantization takes away (arXiv 2509.21173).

It frees the tail and does not empty it: `tail` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Features

HELD = 64  # directions that are held whole; of embeddings with fewer than 128 half of them
LEAST = 0.3  # weight of the others


def held(width: int) -> int:
    return min(HELD, width // 2)


class Spectral:
    """`sum_k w_k <v_k, f - f_float>^2` of images, w = 1 in the first 64 principal directions and 0.3 beyond; texts as
    `mse`"""

    name = "spectral"
    needs = frozenset({"basis"})

    def __call__(self, features: Features) -> Tensor:
        assert features.basis is not None
        off = ((features.image - features.teacher_image) @ features.basis.vectors).square()
        weight = torch.full_like(off[0], LEAST)
        weight[: held(len(weight))] = 1.0
        text = (features.text - features.teacher_text).square().sum(-1).mean()
        return ((off * weight).sum(-1).mean() + text) / 2
