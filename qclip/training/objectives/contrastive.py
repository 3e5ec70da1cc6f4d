"""CLIP's own loss (Radford et al. 2021, arXiv 2103.00020): of a batch, each image finds its caption and each caption
its image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Features


class Contrastive:
    """`(CE of rows + CE of columns) / 2` of `scale * image textT`; a caption is no negative of itself"""

    name = "contrastive"
    needs = frozenset({"pairs"})

    def __call__(self, features: Features) -> Tensor:
        logits = features.scale * features.image @ features.text.T
        same = features.captions[:, None] == features.captions[None, :]
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(same & ~own, -math.inf)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
