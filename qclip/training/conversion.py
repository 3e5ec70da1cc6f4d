"""A trained model becomes a quantized one, which is held to the outputs of its fake-quantized self."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models, ptq, rewrite, seeds
from ..calibration.captions import CAPTIONS
from ..errors import NonFiniteError, QclipError
from ..ptq.base import SiteState
from ..ptq.blocks import first
from ..recipes import QUANTIZERS
from .preparation import PREPARED, facts_of, trained_sites
from .site import TrainedSite

LEAST_COSINE = 0.99999
NUDGE = 1e-6  # a relative change of what blocks begin with, as another order of sums makes
FACTOR = 4.0  # how much farther than that change the deployed embeddings may lie
SAMPLES = 8  # images, and texts, of the check
NUDGES = 4  # draws of such changes: whether a code hops is chance
CALLS = 4  # from the third on a tower runs from a recorded program


class ConversionError(QclipError):
    """The deployed model does not give what the trained one gave."""


def convert(
    model: nn.Module, images: Tensor | None = None, tokens: Tensor | None = None, notes: dict | None = None
) -> nn.Module:
    """The quantized model of a prepared and trained one: the same object, with the layers inside that `qclip.quantize`
    makes, ready to run, save and measure; of a quantizer that rounds nothing (`continued`, `noise`) a float model.
    `notes` go into its provenance.

    On `images` (preprocessed `[n, 3, H, W]`; None: noise) and `tokens` (None: some sentences) each of its layers, and
    what each of its blocks adds, must be the trained one's for the same input: cosine at least 0.99999. From block to
    block a difference in the last digit of a float becomes one of a code, and grows; so the embeddings may lie 4 times
    as far away as the trained model's own do, in the farthest of some draws, when what its first block gets changes by
    a millionth, or 1 - cosine 0.00001.
    Raises ConversionError otherwise, NonFiniteError for weights that hold NaN or Inf; the model is then as before.
    """
    facts = facts_of(model)
    rounds = QUANTIZERS.get(facts["recipe"].trained[0]).rounds
    images, tokens = _samples(model, images, tokens)
    structure = models.Structure(model)
    with structure.kept_on_error(), models.evaluating(model):
        found = list(trained_sites(model))
        built = {site.name: _layer(site, module, rounds) for site, module in found}
        for _, module in found:
            module.rounds = True
        with _watched(model, built) as blocks:
            wanted = _embeddings(model, images, tokens)
        near = []
        for draw in range(NUDGES):
            with _nudged(model, draw):
                near.append(_embeddings(model, images, tokens))
        _write(model, built, rounds)
        source = str(getattr(model, "qclip_source", type(model).__name__))
        provenance = {**facts["provenance"], **(notes or {})}
        rewrite.mark(model, facts["recipe"], facts["plans"], provenance, source)
        del model.__dict__[PREPARED]
        _check_blocks(model, blocks)
        for _ in range(CALLS):
            deployed = _embeddings(model, images, tokens)
        provenance["deployed"] = _check(wanted, deployed, near)
    return model


def _write(model: nn.Module, built: dict[str, nn.Module], rounds: bool) -> None:
    towers = models.towers(model)
    if rounds:
        rewrite.write(towers, built, trained=True)
        return
    for tower in towers.values():
        for site in tower:
            if site.name in built:
                tower.write(site, built[site.name].train(site.module.training))


def _layer(site: models.Site, module: TrainedSite, rounds: bool) -> nn.Module:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"{site.name} holds NaN or Inf in {name!r}; go back to a checkpoint before that")
    source: nn.Module = site.module.dequantized()  # type: ignore[operator]
    if not rounds:
        return source
    state = SiteState(site, source, module.plan, list(module.transforms))
    module.decide(state)
    layer = ptq.build(state)
    rewrite.pack(layer)
    return layer


Inputs = tuple[Tensor | None, Tensor | None]  # images and tokens; None: the model has no such tower


def _samples(model: nn.Module, images: Tensor | None, tokens: Tensor | None) -> Inputs:
    encoders = models.encoders(model)
    if "vision" not in encoders.towers:
        images = None
    elif images is None:
        side = encoders.image_size
        images = torch.randn(SAMPLES, 3, side, side, generator=_generator())
    if "text" not in encoders.towers:
        tokens = None
    elif tokens is None and encoders.tokenizer is not None:
        tokens = encoders.tokenizer(CAPTIONS[:: len(CAPTIONS) // SAMPLES][:SAMPLES])
    return None if images is None else images[:SAMPLES], None if tokens is None else tokens[:SAMPLES]


def _generator(draw: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(int(seeds.generator(draw, "conversion").integers(1 << 62)))


@contextlib.contextmanager
def _nudged(model: nn.Module, draw: int) -> Iterator[None]:
    """While the block runs, each tower's first block gets a little less or more than it is given."""

    def nudge(_: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        return x * (1 + NUDGE * torch.randn(x.shape, generator=_generator(draw)).to(x.device)), *rest

    blocks = [tower.blocks[0].module for tower in models.towers(model).values() if tower.blocks]
    handles = [block.register_forward_pre_hook(nudge) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _embeddings(model: nn.Module, images: Tensor | None, tokens: Tensor | None) -> dict[str, Tensor]:
    encoders = models.encoders(model)
    found = {}
    if images is not None:
        found["image"] = encoders.encode_image(images)
    if tokens is not None:
        found["text"] = encoders.encode_text(tokens)
    return {name: F.normalize(x.double(), dim=-1) for name, x in found.items()}


Seen = tuple[tuple, dict[str, Any], Tensor]


@contextlib.contextmanager
def _watched(model: nn.Module, built: dict[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    """While the block runs, each layer of `built` is held to the trained site on its input. -> of each block: what it
    was called with, and what it gave"""
    blocks: dict[str, Seen] = {}
    handles = []

    def compare(name: str, _: nn.Module, args: tuple, wanted: Tensor) -> None:
        _hold(f"the layer {name} differs from the trained one", built[name](args[0]), wanted)

    def keep(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any], given: Any) -> None:
        blocks[name] = args, kwargs, first(given)

    for tower in models.towers(model).values():
        for site in tower:
            if site.name in built:
                handles.append(site.module.register_forward_hook(functools.partial(compare, site.name)))
        for block in tower.blocks:
            handles.append(block.module.register_forward_hook(functools.partial(keep, block.name), with_kwargs=True))
    try:
        yield blocks
    finally:
        for handle in handles:
            handle.remove()


def _check_blocks(model: nn.Module, blocks: dict[str, Seen]) -> None:
    for tower in models.towers(model).values():
        for block in tower.blocks:
            if block.name not in blocks:
                continue
            args, kwargs, wanted = blocks.pop(block.name)
            found = first(block.module(*args, **kwargs))
            x = args[0] if args else None
            residual = x if isinstance(x, Tensor) and x.shape == wanted.shape else torch.zeros_like(wanted)
            _hold(f"what {block.name} adds differs from the trained one", found - residual, wanted - residual)


def _hold(what: str, found: Tensor, wanted: Tensor) -> None:
    cosine = float(F.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0))
    nothing = not wanted.any() and not found.any()
    if not cosine >= LEAST_COSINE and not nothing:
        raise ConversionError(f"{what}: cosine {cosine:.6f}, below {LEAST_COSINE}; the trained model is as it was")


def _check(wanted: dict[str, Tensor], found: dict[str, Tensor], near: list[dict[str, Tensor]]) -> dict[str, float]:
    """-> 1 - mean cosine of the deployed embeddings to the trained ones, by kind"""
    off = {}
    for name, x in wanted.items():
        own = max(1 - float((x * each[name]).sum(-1).mean()) for each in near)
        most = max(1 - LEAST_COSINE, FACTOR * own)
        off[name] = far = 1 - float((x * found[name]).sum(-1).mean())
        if not far <= most:
            raise ConversionError(
                f"the deployed model's {name} embeddings lie 1 - cosine = {far:.2g} from the trained ones, more than "
                f"the {most:.2g} that last digits of floats explain; the trained model is as it was"
            )
    return off
