"""Unit embeddings of a model, as training wants them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .. import models
from ..models import Encoders
from .pairs import Pairs, Rows
from .settings import Settings

AT_ONCE = 64  # images, or texts, where no gradient is wanted


class Embedder:
    """Unit embeddings of a model's towers, float32, as training wants them."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.encoders: Encoders = models.encoders(model)
        self.precision = settings.precision
        towers = models.towers(model).values() if settings.checkpointing else ()
        self.blocks = [block.module for tower in towers for block in tower.blocks]

    def images(self, pixels: Tensor) -> Tensor:
        with self._run():
            return F.normalize(self.encoders.encode_image(pixels).float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        with self._run():
            return F.normalize(self.encoders.encode_text(tokens).float(), dim=-1)

    @torch.no_grad()
    def all(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Of every image, and of every caption."""
        images = torch.cat([self.images(pairs.pixels(part)) for part in parts(len(pairs))])
        return images, torch.cat([self.texts(tokens) for tokens in pairs.tokens.split(AT_ONCE)])

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        device = self.encoders.device.type
        half = torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")
        with _plain(device), half, _recomputed(self.blocks if torch.is_grad_enabled() else (), device):
            yield


def parts(count: int) -> list[Rows]:
    """Rows of as many images as are embedded at once."""
    return np.array_split(np.arange(count), -(-count // AT_ONCE))


def _plain(device: str) -> contextlib.AbstractContextManager[None]:
    """The fused attention's backward is slow on a CPU at the lengths of images."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def _recomputed(blocks: Iterable[nn.Module], device: str) -> Iterator[None]:
    """Blocks keep their inputs alone, and run again in backward."""
    blocks = list(blocks)

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with _plain(device):  # in backward, too
            return forward(*args, **kwargs)

    for block in blocks:
        block.__dict__["forward"] = functools.partial(checkpoint, run, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]
