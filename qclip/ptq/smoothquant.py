"""SmoothQuant (arXiv 2211.10438) with the strength searched per block: one fixed alpha is known to hurt CLIP.

`s_j = max|X_j|^a / max|W_j|^(1-a)`; the input is multiplied by 1/s when it is quantized, the weight by s before it is
rounded. Nothing is folded into neighbours, so a site stays one weight and one transform of its input. The groups of a
block are searched in the order in which they run - qkv, out, fc1, fc2 - each over {off, 0, 0.05 .. 1} by the squared
error of the *block's* output with the real quantizers in place: with a static scale where the recipe wants one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import smooth_scale

from .. import calibration, rewrite
from ..models.tower import Block, Site, Tower
from .base import Context, Method, build

ALPHAS: tuple[float | None, ...] = (None, *(i / 20 for i in range(21)))
SEARCHED = 32  # images, or captions, of the search


class SmoothQuant(Method):
    name = "smoothquant"

    def run(self, context: Context) -> None:
        samples = context.need_samples()
        # Nothing can be folded through GELU into fc1, but the scale stays with fc2, so it needs no folding.
        sites = [s for s in context.quantized_sites() if s.smoothable or s.kind == "fc2"]
        sites = [s for s in sites if s.kind != "embedding"]
        maxima = calibration.channel_maxima(context.encoders, context.towers, samples, sites, context.progress)
        chosen: dict[str, float | None] = {}
        blocks = context.blocks()
        for done, (tower, block) in enumerate(blocks):
            context.report("SmoothQuant search", done, len(blocks))
            groups: dict[str, list[Site]] = {}
            for site in block.sites.values():
                if site in sites and site.shared in maxima:
                    groups.setdefault(site.shared, []).append(site)
            if groups:
                chosen |= _search(context, tower, block, groups, maxima)
        context.report("SmoothQuant search", len(blocks), len(blocks))
        context.notes["smoothquant_alpha"] = chosen


def _smooth(context: Context, group: list[Site], maximum: Tensor, alpha: float | None) -> Tensor | None:
    if alpha is None:
        return None
    weight = torch.stack([context.weight(site).abs().amax(0) for site in group]).amax(0)
    return 1 / smooth_scale(maximum, weight, alpha)


@torch.no_grad()
def _search(
    context: Context, tower: Tower, block: Block, groups: dict[str, list[Site]], maxima: dict[str, Tensor]
) -> dict[str, float | None]:
    """Sets the states of the block's sites to the best strengths; leaves the model as it was."""
    inputs = _block_inputs(context, tower, block)
    seen: dict[str, list[Tensor]] = {key: [] for key in groups}  # what decides a static scale
    with calibration.Hooks() as hooks:
        for key, (site, *_) in groups.items():
            if context.plans[site.name].static:
                hooks.add(site.module, seen[key].append)
        wanted = []
        for args, kwargs, positions in inputs:
            hooks.reaching = positions
            wanted.append(_first(block.module(*args, **kwargs)))

    def use(group: list[Site], smooth: Tensor | None) -> None:
        scale = _static_scale(context, group[0], seen[group[0].shared], smooth)
        for site in group:
            context.states[site.name].smooth, context.states[site.name].input_scale = smooth, scale
            module = build(context, site)
            rewrite.pack(module)  # the kernels read packed weights
            tower.write(site, module)

    def error() -> float:
        total = 0.0
        for (args, kwargs, positions), want in zip(inputs, wanted, strict=True):
            off = _first(block.module(*args, **kwargs)).float() - want.float()
            total += float(calibration.reaching(off, positions).square().sum())
        return total

    chosen: dict[str, float | None] = {}
    try:
        for key, group in groups.items():
            tried = []
            for alpha in ALPHAS:
                smooth = _smooth(context, group, maxima[key], alpha)
                use(group, smooth)
                tried.append((error(), alpha, smooth))
            _, chosen[key], smooth = min(tried, key=lambda row: row[0])
            use(group, smooth)
    finally:
        for group in groups.values():
            for site in group:
                tower.write(site, context.floats[site.name])
    return chosen


def _static_scale(context: Context, site: Site, seen: list[Tensor], smooth: Tensor | None) -> Tensor | None:
    """The static scale of the smoothed input by the rule of `StaticScales`; None where the plan is dynamic."""
    plan = context.plans[site.name]
    if not plan.static:
        return None
    observer = calibration.Histogram()
    for x in seen:
        observer.update(x if smooth is None else x * smooth)
    return torch.tensor(observer.scale(plan.activation_bits), dtype=torch.float32)


def _first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def _block_inputs(context: Context, tower: Tower, block: Block) -> list[tuple[tuple, dict, Tensor | None]]:
    """What the foreign block is called with on the search samples (float model), and which positions count."""
    seen: list[tuple[tuple, dict, Tensor | None]] = []
    hooks = calibration.Hooks()
    samples = context.need_samples()
    few = calibration.Samples(
        samples.images[:SEARCHED], None if samples.tokens is None else samples.tokens[:SEARCHED], {}
    )
    handle = block.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs, hooks.reaching)), with_kwargs=True
    )
    try:
        calibration.run(context.encoders, few, [tower.name], hooks)
    finally:
        handle.remove()
    return seen
