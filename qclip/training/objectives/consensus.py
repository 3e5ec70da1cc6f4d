"""Distance of the embeddings to what the float model says of an image on average, however it is flipped or shifted: a
small ensemble of it (test-time augmentation; Krizhevsky et al. 2012), which is mostly right where one look errs."""

from __future__ import annotations

from torch import Tensor

from . import Features


class Consensus:
    """As `mse`, of images to the mean embedding of the float model over flips and shifts"""

    name = "consensus"
    needs = frozenset({"consensus"})

    def __call__(self, features: Features) -> Tensor:
        assert features.consensus is not None
        image = (features.image - features.consensus).square().sum(-1).mean()
        text = (features.text - features.teacher_text).square().sum(-1).mean()
        return (image + text) / 2
