"""The constructor arguments of an open_clip model that somebody else made, read off the model itself."""

from __future__ import annotations

from typing import Any

from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import LayerNormFp32, LayerScale, TextTransformer, VisionTransformer
from torch import nn

from . import open_clip_texts
from .explicit import activation_name, present, unsupported


def describe(model: Any) -> dict[str, Any]:
    """`config` such that `type(model)(**config)` has the same architecture. For models not yet in explicit form.

    Raises ModelError where a setting cannot be read off.
    """
    config: dict[str, Any] = {}
    visual, text = model.visual, getattr(model, "text", model)
    vision_cfg, vision_act, norm = _vision(visual)
    text_cfg, text_act, text_norm = _text(text)
    acts = {vision_act, text_act} - {None}
    quick = "quick_gelu" in acts
    for cfg, act in ((vision_cfg, vision_act), (text_cfg, text_act)):
        if act == "gelu_tanh":
            cfg["act_kwargs"] = {"approximate": "tanh"}
        if quick and act not in (None, "quick_gelu"):
            raise unsupported(model, "QuickGELU in one tower only")
    if isinstance(model, CoCa) and isinstance(text, HFTextEncoder):
        text_cfg["vocab_size"] = model.text_decoder.text_projection.shape[1]
    config.update(embed_dim=_embed_dim(visual, text), vision_cfg=vision_cfg, text_cfg=text_cfg)
    if quick:
        config["quick_gelu"] = True
    if norm or text_norm:
        config["cast_dtype"] = "float16"  # only chooses the layer norms that compute in float32
    if model.logit_bias is not None:
        config["init_logit_bias"] = 0.0
    if model.logit_scale.ndim:
        config["nonscalar_logit_scale"] = True
    if getattr(model, "output_dict", False):
        config["output_dict"] = True
    if isinstance(model, CoCa):
        decoder = model.text_decoder
        block = decoder.resblocks[0]
        config["multimodal_cfg"] = {
            "context_length": decoder.context_length,
            "width": decoder.width,
            "heads": block.attn.num_heads,
            "layers": len(decoder.resblocks),
            "ls_init_value": _layer_scale(block),
        }
        config["pad_id"] = model.pad_id
    return config


def _embed_dim(visual: Any, text: Any) -> int:
    if isinstance(text, HFTextEncoder):
        return text.output_dim  # type: ignore[no-any-return]
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if projection is not None:
        return projection.shape[1]
    if isinstance(visual, VisionTransformer):
        return visual.output_dim
    return text.ln_final.normalized_shape[0]


def _transformer(transformer: Any, block: Any) -> dict[str, Any]:
    width = transformer.width
    cfg: dict[str, Any] = {
        "width": width,
        "layers": len(transformer.resblocks),
        "mlp_ratio": block.mlp.c_fc.out_features / width,
    }
    if (scale := _layer_scale(block)) is not None:
        cfg["ls_init_value"] = scale
    if not isinstance(block.attn, nn.MultiheadAttention):
        attention = block.attn
        cfg |= {
            "block_type": "custom",
            "qk_norm": present(attention.ln_q) is not None,
            "scaled_cosine_attn": attention.scaled_cosine,
            "scale_heads": attention.scale_heads,
            "scale_attn_inner": present(attention.ln_inner) is not None,
            "scale_attn": present(block.ln_attn) is not None,
            "scale_fc": present(block.mlp.ln) is not None,
        }
    eps = block.ln_1.eps
    if eps != 1e-5:
        cfg["norm_kwargs"] = {"eps": eps}
    return cfg


def _layer_scale(block: Any) -> float | None:
    return 1e-5 if isinstance(block.ls_1, LayerScale) else None  # the values themselves are weights


def _vision(visual: Any) -> tuple[dict[str, Any], str | None, bool]:
    if isinstance(visual, TimmModel):
        return _timm(visual), None, False
    if not isinstance(visual, VisionTransformer):
        raise unsupported(visual)
    block = visual.transformer.resblocks[0]
    cfg = _transformer(visual.transformer, block)
    cfg |= {
        "image_size": list(visual.image_size),
        "patch_size": list(visual.patch_size),
        "head_width": cfg["width"] // block.attn.num_heads,
        "no_ln_pre": present(visual.ln_pre) is None,
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
        "output_tokens": visual.output_tokens,
    }
    for side in ("image_size", "patch_size"):
        if cfg[side][0] == cfg[side][1]:
            cfg[side] = cfg[side][0]
    if not visual.positional_embedding.requires_grad and all(p.requires_grad for p in block.parameters()):
        cfg["pos_embed_type"] = "sin_cos_2d"
    if (pool := visual.attn_pool) is not None:
        cfg |= {
            "attentional_pool": visual.attn_pool_type or True,
            "attn_pooler_queries": pool.query.shape[0],
            "attn_pooler_heads": pool.attn.num_heads,
        }
    return cfg, activation_name(block.mlp.gelu), isinstance(block.ln_1, LayerNormFp32)


def _timm(visual: Any) -> dict[str, Any]:
    trunk, head = visual.trunk, visual.head
    name = (getattr(trunk, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise unsupported(trunk, "it does not say by which timm name it was made")
    if hasattr(head, "pool"):
        raise unsupported(head.pool, "attention pooling over a feature map")
    cfg: dict[str, Any] = {"timm_model_name": name, "image_size": list(visual.image_size)}
    if cfg["image_size"][0] == cfg["image_size"][1]:
        cfg["image_size"] = cfg["image_size"][0]
    if hasattr(head, "proj"):
        cfg |= {"timm_proj": "linear", "timm_proj_bias": head.proj.bias is not None}
    elif hasattr(head, "mlp"):
        cfg |= {"timm_proj": "mlp", "timm_proj_bias": head.mlp.fc2.bias is not None}
    else:
        cfg["timm_proj"] = "none" if trunk.num_classes == 0 else ""
    vit = hasattr(trunk, "global_pool")
    cfg["timm_pool"] = trunk.global_pool if vit else ("" if cfg["timm_proj"] in ("linear", "mlp") else "avg")
    return cfg


def _text(text: Any) -> tuple[dict[str, Any], str | None, bool]:
    if isinstance(text, HFTextEncoder):
        return open_clip_texts.describe(text), None, False
    if not isinstance(text, CLIP | TextTransformer):
        raise unsupported(text)
    block = text.transformer.resblocks[0]
    cfg = _transformer(text.transformer, block)
    flat = isinstance(text, CLIP)
    cfg |= {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "heads": block.attn.num_heads,
        "pool_type": text.text_pool_type if flat else text.pool_type,
        "eos_id": text.text_eos_id if flat else text.eos_id,
        "no_causal_mask": text.attn_mask is None,
    }
    if text.text_projection is None:
        cfg["proj_type"] = "none"
    elif isinstance(text.text_projection, nn.Linear):
        cfg["proj_bias"] = text.text_projection.bias is not None
    if not flat:
        cfg |= {"embed_cls": text.cls_emb is not None, "pad_id": text.pad_id, "output_tokens": text.output_tokens}
    return cfg, activation_name(block.mlp.gelu), isinstance(block.ln_1, LayerNormFp32)
