"""timm's towers, alone or inside open_clip's TimmModel: which class is brought into explicit form by which file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from . import replay
from .explicit import Form, become, by_name, mlp_sites, projection_site, unsupported
from .family import Family
from .timm_convnext import convnext
from .timm_eva import ExplicitEvaPostNormBlock, eva
from .timm_fastvit import fastvit
from .timm_parts import Parts, mlp
from .timm_swin import swin
from .timm_vit import relative_positions, vision_transformer
from .tower import Site, Tower
from .value_path import ValuePath, undefined

#: What makes the parts of a trunk of this class, or of one that it is a base of.
TRUNKS: dict[type, Callable[[Any], Parts]] = {
    VisionTransformer: vision_transformer,
    VisionTransformerRelPos: relative_positions,
    Eva: eva,
    SwinTransformer: swin,
}
#: The same, for trunks that take images of any size: it is asked for, height and width.
CONVOLUTIONAL: dict[type, Callable[[Any, tuple[int, int]], Parts]] = {ConvNeXt: convnext, FastVit: fastvit}


class ExplicitTower(Form):
    """A timm model, or open_clip's TimmModel around one."""

    WRAPS = frozenset({"forward"})

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        whole = super().forward  # type: ignore[misc]
        if args or kwargs:
            return whole(x, *args, **kwargs)
        return replay.run(self, whole, x)


def tower(visual: Any) -> Tower:
    """The tower of a timm model, or of open_clip's TimmModel around one, in explicit form, in place."""
    trunk = getattr(visual, "trunk", visual)
    parts = _parts(visual, trunk)
    sites = parts.sites + _head(visual, trunk)
    become(visual, ExplicitTower)
    return Tower("vision", visual, parts.blocks, by_name(sites), parts.tokens)


def _parts(visual: Any, trunk: Any) -> Parts:
    for kind, make in TRUNKS.items():
        if isinstance(trunk, kind):
            return make(trunk)
    for kind, make_for_size in CONVOLUTIONAL.items():
        if isinstance(trunk, kind):
            height, width = getattr(visual, "image_size", None) or trunk.pretrained_cfg["input_size"][1:]
            return make_for_size(trunk, (int(height), int(width)))
    raise unsupported(trunk)


def _head(visual: Any, trunk: Any) -> list[Site]:
    """The map into the joint space: TimmModel's own head, or the trunk's classifier where that serves as one."""
    head = getattr(visual, "head", None)
    if visual is not trunk and isinstance(head, nn.Sequential):
        if hasattr(head, "pool"):
            raise unsupported(head.pool, "attention pooling over a feature map")
        if hasattr(head, "mlp"):
            head.mlp = mlp(head.mlp)
            return list(mlp_sites("vision.projection", head.mlp, None, 1).values())
        if hasattr(head, "proj"):
            return projection_site("vision", head, "proj")
    classifier = trunk.head
    owner, attribute = (classifier, "fc") if hasattr(classifier, "fc") else (trunk, "head")
    return projection_site("vision", owner, attribute)


def value_path(visual: Any, tower: Tower) -> ValuePath:
    """Of a pre-norm transformer that pools its class token. Raises ModelError."""
    trunk = getattr(visual, "trunk", visual)
    transformer = isinstance(trunk, VisionTransformer | VisionTransformerRelPos | Eva)
    if not transformer or trunk.global_pool != "token" or trunk.num_prefix_tokens < 1:
        raise undefined(trunk, "it does not pool a class token")
    block: Any = tower.blocks[-1].module
    if isinstance(block, ExplicitEvaPostNormBlock):
        raise undefined(trunk, "the norms of its blocks stand behind attention and MLP")
    if isinstance(trunk, Eva):
        gammas = (block.gamma_1, block.gamma_2)
        behind = [() if gamma is None else (functools.partial(torch.mul, gamma),) for gamma in gammas]
    else:
        behind = [(block.ls1,), (block.ls2,)]

    def tail(x: Tensor) -> Tensor:
        x = trunk.head(trunk.fc_norm(trunk.norm(x)))
        return x if visual is trunk else visual.head(x)  # type: ignore[no-any-return]

    return ValuePath.of(
        tower.blocks[-1],
        tail,
        behind_attention=behind[0],
        behind_mlp=behind[1],
        prefix=trunk.num_prefix_tokens,
    )


def rebuild_buffers(model: nn.Module) -> None:
    """Tables that no checkpoint holds (of rotary and relative positions, masks of windows) anew, on the CPU, in the
    dtype of their trunk."""
    for trunk in model.modules():
        if isinstance(trunk, Eva | VisionTransformerRelPos | SwinTransformer):
            for module in trunk.modules():
                _rebuild(module, trunk.patch_embed.proj.weight.dtype)


def _rebuild(module: Any, dtype: torch.dtype) -> None:
    tables = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    lacking = {name: table for name, table in tables.items() if table is not None and table.is_meta}
    if isinstance(module, SwinTransformerBlock) and lacking:
        module.attn_mask = module.get_attn_mask(device=torch.device("cpu"), dtype=dtype)
    elif lacking and hasattr(module, "init_non_persistent_buffers"):
        for name, table in lacking.items():
            module._buffers[name] = torch.empty_like(table, device="cpu")
        module.init_non_persistent_buffers()
        if any(table.is_floating_point() for table in lacking.values()):
            module.to(dtype)  # as a whole: timm keeps frequencies in float32


class Timm(Family):
    """Vision towers by themselves, to be looked at (sites, spectra). Without a text encoder and a logit scale they are
    not quantized."""

    name = "timm"

    def owns(self, model: nn.Module) -> bool:
        return hasattr(model, "pretrained_cfg")  # every timm model has it

    def towers(self, model: Any) -> dict[str, Tower]:
        return {"vision": tower(model)}

    rebuild_buffers = staticmethod(rebuild_buffers)


FAMILY = Timm()
