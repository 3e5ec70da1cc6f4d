"""What the float model says of the pairs, embedded once."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import alterations
from .embedder import Embedder, parts
from .inputs import Inputs
from .objectives import Basis
from .pairs import Pairs
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Unit embeddings, float32: `images` `[n, E]` of the pairs and `texts` `[m, E]` of all captions; what terms ask for
    besides, None where they do not. `scale` []: the factor on cosines."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    classes: Tensor | None = None  # [K, E]
    negatives: Tensor | None = None  # [M, E]
    consensus: Tensor | None = None  # [n, E]
    basis: Basis | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: nn.Module,
        pairs: Pairs,
        needs: frozenset[str] = frozenset(),
        classes: Tensor | None = None,
        inputs: Inputs | None = None,
    ) -> Teacher:
        """`model`: float, in eval mode. `classes`: tokens `[K, context]`. `inputs`: those whose negatives to embed."""
        embedder = Embedder(model, Settings())
        images, texts = embedder.all(pairs)
        drawn = inputs.sample() if inputs is not None and "negatives" in needs else None
        return cls(
            images,
            texts,
            model.logit_scale.detach().float().exp().reshape(()),  # type: ignore[union-attr, operator]
            None if classes is None else embedder.texts(classes),
            None if drawn is None else torch.cat([embedder.images(drawn[part]) for part in parts(len(drawn))]),
            _consensus(embedder, pairs) if "consensus" in needs else None,
            _basis(images) if "basis" in needs else None,
        )


def _consensus(embedder: Embedder, pairs: Pairs) -> Tensor:
    found = []
    for part in parts(len(pairs)):
        each = torch.stack([embedder.images(look) for look in alterations.looks(pairs.pixels(part))])
        found.append(F.normalize(each.mean(0), dim=-1))
    return torch.cat(found)


def _basis(images: Tensor) -> Basis:
    mean = images.double().mean(0)
    off = images.double() - mean
    _, vectors = torch.linalg.eigh(off.T @ off)  # by rising variance
    return Basis(mean.float(), vectors.flip(1).float())
