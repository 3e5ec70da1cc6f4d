"""Small models of every family with random weights: the smallest that have all the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torch
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

VISION = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}
BASE = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
SIGLIP_TEXT = TEXT | {
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "act_kwargs": {"approximate": "tanh"},
    "norm_kwargs": {"eps": 1e-6},
}
COCA = {
    "embed_dim": 24,
    "vision_cfg": VISION
    | {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 4, "output_tokens": True},
    "text_cfg": TEXT | {"width": 24, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 16, "vocab_size": 100, "width": 24, "heads": 2, "layers": 1},
}


def clip(vision: dict | None = None, text: dict | None = None, custom: bool = False, **settings: Any) -> nn.Module:
    config = {"embed_dim": 24, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {})} | settings
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


OPEN_CLIP: dict[str, Callable[[], nn.Module]] = {
    "clip": clip,
    "quick_gelu": lambda: clip(quick_gelu=True),
    "eos_pool": lambda: clip(text={"pool_type": "eos", "eos_id": 99}),
    "layer_scale": lambda: clip({"ls_init_value": 0.3}, {"ls_init_value": 0.2}),
    "own_attention": lambda: clip({"block_type": "custom"}, {"block_type": "custom"}),
    "own_attention_all_norms": lambda: clip(CUSTOM, CUSTOM),
    "no_ln_pre_avg": lambda: clip({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}),
    "custom_text": lambda: clip(custom=True),
    "siglip_text": lambda: clip(text=SIGLIP_TEXT, custom=True, init_logit_bias=-10.0),
    "no_text_projection": lambda: clip(text={"proj_type": "none", "width": 24}, custom=True),
    "no_causal_mask": lambda: clip(custom=True, text={"no_causal_mask": True}),
    "coca": lambda: open_clip.CoCa(**COCA),
    "coca_parallel_pools": lambda: open_clip.CoCa(
        **COCA
        | {  # open_clip's norm behind the pools asks for equal widths
            "embed_dim": 48,
            "vision_cfg": COCA["vision_cfg"] | {"attentional_pool": "parallel"},
        }
    ),
    "nonscalar_scale": lambda: clip(nonscalar_logit_scale=True, init_logit_bias=0.0, output_dict=True),
    "float32_norms": lambda: clip(cast_dtype=torch.float16),
}


def with_trunk(trunk: nn.Module, proj: str = "none", width: int = 24) -> nn.Module:
    """A CustomTextCLIP whose image tower is open_clip's TimmModel around a small trunk of ours."""
    model = clip(custom=True, embed_dim=width)
    tower = open_clip.timm_model.TimmModel.__new__(open_clip.timm_model.TimmModel)
    nn.Module.__init__(tower)
    tower.image_size, tower.trunk = (32, 32), trunk
    layers: dict[str, nn.Module] = {}
    if proj == "linear":
        layers = {"drop": nn.Dropout(0.0), "proj": nn.Linear(trunk.num_features, width, bias=False)}
    elif proj == "mlp":
        layers = {"mlp": timm.layers.Mlp(trunk.num_features, 2 * width, width, bias=(True, False))}
    tower.head = nn.Sequential()
    for name, layer in layers.items():
        tower.head.add_module(name, layer)
    model.visual = tower
    return model


def _other_pool() -> nn.Module:
    """A SigLIP tower whose pool has what open_clip's do not use: norms, positions, several queries."""
    trunk = TIMM["vit_siglip"]()
    pool = timm.layers.AttentionPoolLatent
    trunk.attn_pool = pool(
        24,
        num_heads=4,
        qk_norm=True,
        latent_len=2,
        pool_type="avg",
        pos_embed="abs",
        feat_size=16,
        norm_layer=nn.LayerNorm,
    )
    return trunk


def _conv_stem() -> nn.Module:
    """MobileCLIP-B's tower: convolutions with batch norm where the patch embedding would be."""
    trunk = timm.create_model("vit_base_patch32_clip_224", **SMALL_VIT | {"patch_size": 16}, num_classes=10)
    stem = ConvStem(channels=(6, 6, 24), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0)
    trunk.patch_embed = timm.layers.HybridEmbed(stem, img_size=32, proj=False, embed_dim=24)
    return trunk


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
SMALL_CONVNEXT = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 16, 24, 32),
    "pretrained_cfg_overlay": {"input_size": (3, 32, 32)},
}

TIMM: dict[str, Callable[[], nn.Module]] = {
    "vit_clip": lambda: timm.create_model("vit_base_patch32_clip_224", **SMALL_VIT, num_classes=10),
    "vit_qk_norm_layer_scale": lambda: timm.create_model(
        "vit_base_patch32_clip_quickgelu_224", **SMALL_VIT, num_classes=10, qk_norm=True, init_values=0.1
    ),
    "vit_inner_norms": lambda: timm.create_model(
        "vit_base_patch32_clip_224", **SMALL_VIT, num_classes=0, scale_attn_norm=True, scale_mlp_norm=True
    ),
    "vit_registers": lambda: timm.create_model("vit_base_patch32_clip_224", **SMALL_VIT, num_classes=0, reg_tokens=4),
    "vit_siglip": lambda: timm.create_model("vit_base_patch16_siglip_224", **SMALL_VIT, num_classes=0),
    "vit_other_pool": _other_pool,
    "vit_conv_stem": _conv_stem,
    "convnext": lambda: timm.create_model("convnext_tiny", **SMALL_CONVNEXT, num_classes=10),
    "convnext_1x1": lambda: timm.create_model("convnext_atto", **SMALL_CONVNEXT, num_classes=10, conv_mlp=True),
    "convnext_grn": lambda: timm.create_model("convnextv2_atto", **SMALL_CONVNEXT, num_classes=10, conv_mlp=False),
}


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random biases, norms and masks, so that nothing is hidden by zeros and ones; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or parameter.min() == parameter.max() != 0:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif not 0 < parameter.abs().max() < 100:  # zeros, or memory that the library never fills (CoCa's decoder)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(n: int = 3, side: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = 16, lengths: tuple[int, ...] = (5, 9, 7), eot: int = 99) -> Tensor:
    """Captions of these lengths: ids 1..97, EOT (the largest id) last, zeros behind it."""
    out = torch.zeros(len(lengths), length, dtype=torch.long)
    generator = torch.Generator().manual_seed(2)
    for row, n in enumerate(lengths):
        out[row, : n - 1] = torch.randint(1, 98, (n - 1,), generator=generator)
        out[row, n - 1] = eot
    return out
