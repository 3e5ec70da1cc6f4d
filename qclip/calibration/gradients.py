"""What the outputs of sites mean to the embeddings: gradients at the float model.

A loss that compares the model with its own float output has none there. So each sample's unit embedding is multiplied
by a random vector r ~ N(0, I) of its own. J being the embedding's Jacobian, the mean of (J^T r)^2 over r is the
diagonal of J^T J, the Hessian of half the squared distance of embeddings; products of different samples are 0 on
average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qclip.progress import Progress

from .. import seeds
from ..errors import NonFiniteError
from ..models import Encoders
from ..models.tower import Site
from .gather import Samples
from .stream import Batch, batches

AT_ONCE = 4  # samples of which a tower's activations are held for their gradients
#: A site, its input `[B, ..., K]`, the gradient of its output `[B, ..., N]`, and the samples they are of.
SeeGradient = Callable[[Site, Tensor, Tensor, Batch], None]


def gradients(
    encoders: Encoders,
    data: Samples,
    tower: str,
    sites: list[Site],
    see: SeeGradient,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Show each site of the tower, batch by batch, its input and J^T r at its output: 0 where nothing of it is read.

    Parameters get no gradients. Raises NonFiniteError naming the site whose gradient is NaN or Inf.
    """
    random = torch.Generator().manual_seed(int(seeds.generator(seed, f"gradients of {tower}").integers(1 << 62)))
    found = [part for batch in batches(encoders, data, tower) for part in batch.parts(AT_ONCE)]
    done, total = 0, sum(map(len, found))
    for batch in found:
        calls: list[tuple[Site, Tensor, Tensor]] = []  # site, input, and a zero that was added to the output
        with torch.inference_mode(False), torch.enable_grad():
            handles = [site.module.register_forward_hook(functools.partial(_watch, calls, site)) for site in sites]
            try:
                embeddings = F.normalize(batch.encode(batch.inputs).float(), dim=-1)
            finally:
                for handle in handles:
                    handle.remove()
            r = torch.randn(embeddings.shape, generator=random).to(embeddings.device)
            found_there = torch.autograd.grad((embeddings * r).sum(), [zero for _, _, zero in calls], allow_unused=True)
        for (site, x, zero), gradient in zip(calls, found_there, strict=True):
            gradient = torch.zeros_like(zero) if gradient is None else gradient
            if not gradient.isfinite().all():
                raise NonFiniteError(f"the gradient of the embeddings at {site.name} is NaN or Inf; check the weights")
            see(site, x, gradient.float(), batch)
        done += len(batch)
        if progress is not None:
            progress(f"gradients of the {tower} tower", done, total)


def _watch(calls: list, site: Site, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
    zero = torch.zeros_like(output, requires_grad=True)
    calls.append((site, args[0].detach().float(), zero))
    return output + zero
