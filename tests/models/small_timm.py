"""Small image towers of every family of timm that is supported, under names that timm knows, so that descriptions of
models with them can be saved and loaded: `small_eva02` and the like."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from timm.models.fastvit import RepConditionalPosEnc
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import nn

from qclip import models

from ..small import CONFIG
from .architectures import perturb

TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
STEM = VitCfg((8, 12, 24), (1, 1, 1), 8, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), "1d")
POSITIONS = functools.partial(RepConditionalPosEnc, spatial_shape=(7, 7))
CONVOLUTIONAL = {
    "pretrained_cfg_overlay": {"input_size": (3, 32, 32)},
    "layers": (1, 1, 1),
    "embed_dims": (8, 16, 32),
    "mlp_ratios": (3, 3, 3),
    "downsamples": (False, True, True),
    "se_downsamples": (False, False, True),
    "pos_embs": (None, None, POSITIONS),
    "token_mixers": ("repmixer", "repmixer", "attention"),
}

#: By name: timm's architecture, what is smaller, and how open_clip's configurations of it pool and project.
SMALL: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "eva": ("eva_giant_patch14_224", TRANSFORMER | {"init_values": 0.3}, {"timm_pool": "token"}),
    "eva02": ("eva02_base_patch16_clip_224", TRANSFORMER, {"timm_pool": "token"}),
    "eva02_packed": ("eva02_base_patch16_clip_224", TRANSFORMER | {"scale_mlp": False}, {"timm_pool": "token"}),
    "eva_post_norm": ("eva02_enormous_patch14_clip_224", TRANSFORMER | {"mlp_ratio": 2}, {"timm_pool": "token"}),
    "pe": ("vit_pe_core_tiny_patch16_384", TRANSFORMER | {"attn_pool_num_heads": 4}, {"timm_pool": "map"}),
    "vitamin": ("vitamin_small_224", TRANSFORMER | {"patch_size": 1, "embed_cfg": STEM}, {"timm_proj": "linear"}),
    "fastvit": ("fastvit_mci0", CONVOLUTIONAL, {"timm_pool": "avg"}),
    "fastvit_norms": ("fastvit_mci3", CONVOLUTIONAL, {"timm_pool": "avg"}),
    "relpos": ("vit_relpos_medium_patch16_cls_224", TRANSFORMER | {"rel_pos_dim": 8}, {"timm_proj": "linear"}),
    "swin": (
        "swin_base_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3)},
        {"timm_proj": "linear"},
    ),
}


def trunk(name: str, **settings: Any) -> nn.Module:
    base, smaller, _ = SMALL[name]
    return timm.create_model(base, **smaller | settings)


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **settings: Any) -> nn.Module:
        return trunk(name, **{key: value for key, value in settings.items() if value is not None})

    entrypoint.__name__ = f"small_{name}"
    timm.models.register_model(entrypoint)


for each in SMALL:
    _register(each)


@torch.no_grad()
def strong(tower: nn.Module) -> nn.Module:
    """With weights by which every part changes the output: timm's begin smaller, those of heads a thousand times."""
    for layer in tower.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.normal_(0, layer.weight[0].numel() ** -0.5)
    return tower


def build(name: str, seed: int = 0) -> Any:
    """A CustomTextCLIP with that image tower, which has preprocessing, a tokenizer and a description."""
    torch.manual_seed(seed)
    vision = {"timm_model_name": f"small_{name}", "image_size": 32, **SMALL[name][2]}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": CONFIG["text_cfg"], "custom_text": True}
    model = perturb(models.create_from_config(config), seed)
    strong(model.visual)
    return models.attach(model, {"image_size": 32}, {"kind": "clip-bpe", "context_length": 16}, source=name)
