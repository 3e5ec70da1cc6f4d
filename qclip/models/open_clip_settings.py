"""What a description of an open_clip model may hold (see `allowed`), and which tensors it then has."""

from __future__ import annotations

from typing import Any

from ..untrusted.schema import Check, either, flag, listing, null, one_of, optional, real, record, text, whole
from . import allowed, open_clip_text_configs
from .allowed import LAYERS, SIDE, TOKENS, VOCABULARY, WIDTH, dropout, pair, sides
from .family import Blocks, Description, Tables

_NORM = optional(record({"eps": real(1e-12, 0.1), "elementwise_affine": one_of(True)}))
_ACTIVATION = optional(record({"approximate": one_of("none", "tanh")}))
_TRANSFORMER: dict[str, Check] = {
    "width": whole(1, WIDTH),
    "mlp_ratio": real(0.01, 64),
    "ls_init_value": optional(real(-1e3, 1e3)),
    "act_kwargs": _ACTIVATION,
    "norm_kwargs": _NORM,
    "output_tokens": flag,
    "final_ln_after_pool": flag,
    "block_type": optional(one_of("default", "custom")),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), flag
    ),
}
_VISION: dict[str, Check] = _TRANSFORMER | {
    "layers": either(listing(whole(1, LAYERS), 4, 4), whole(1, LAYERS)),
    "head_width": whole(1, WIDTH),
    "patch_size": optional(sides(1, SIDE)),
    "image_size": sides(1, SIDE),
    "patchdropout": dropout,
    "attentional_pool": either(one_of("parallel", "cascade"), flag),
    "attn_pooler_queries": whole(1, 4096),
    "attn_pooler_heads": whole(1, WIDTH),
    "no_ln_pre": flag,
    "pos_embed_type": one_of("learnable", "sin_cos_2d"),
    "pool_type": one_of("tok", "avg", "none"),
    "timm_model_name": optional(text(80, r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")),
    "timm_model_pretrained": one_of(False),
    "timm_pool": one_of("", "avg", "max", "avgmax", "map", "token", "abs_attn", "rot_attn"),
    "timm_proj": optional(one_of("", "linear", "mlp", "none")),
    "timm_proj_bias": flag,
    "timm_drop": dropout,
    "timm_drop_path": optional(dropout),
}
_TEXT: dict[str, Check] = _TRANSFORMER | {
    "layers": whole(1, LAYERS),
    "heads": whole(1, WIDTH),
    "context_length": whole(1, TOKENS),
    "vocab_size": whole(1, VOCABULARY),
    "embed_cls": flag,
    "pad_id": whole(0, VOCABULARY),
    "eos_id": whole(0, VOCABULARY),
    "no_causal_mask": flag,
    "pool_type": one_of("first", "last", "argmax", "eos", "none"),
    "proj_bias": flag,
    "proj_type": optional(one_of("linear", "none")),
    "hf_model_name": null,  # settings stand in its place: `open_clip_text_configs.py`
    "hf_tokenizer_name": null,
    "tokenizer_mode": null,
    "tokenizer_kwargs": null,
}


def _text(value: Any, where: str) -> None:
    """open_clip's own text tower, or one of Hugging Face."""
    hugging = isinstance(value, dict) and "hf_config" in value
    (open_clip_text_configs.TEXT if hugging else record(_TEXT))(value, where)


_MULTIMODAL = _TEXT | {"dim_head": whole(1, WIDTH), "n_queries": whole(1, 4096), "attn_pooler_heads": whole(1, WIDTH)}
_OPEN_CLIP: dict[str, Check] = {
    "embed_dim": whole(1, WIDTH),
    "vision_cfg": record(_VISION),
    "text_cfg": record(_TEXT),
    "quick_gelu": flag,
    "init_logit_scale": real(-100, 100),
    "init_logit_bias": optional(real(-1e4, 1e4)),
    "nonscalar_logit_scale": flag,
    "cast_dtype": one_of("float32", "float16", "bfloat16"),
    "output_dict": flag,
}
_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")
CLASSES: dict[str, Check] = {
    "CLIP": record(_OPEN_CLIP, _NEEDED),
    "CustomTextCLIP": record(_OPEN_CLIP | {"text_cfg": _text}, _NEEDED),
    "CoCa": record(
        _OPEN_CLIP | {"text_cfg": _text, "multimodal_cfg": record(_MULTIMODAL), "pad_id": whole(0, VOCABULARY)},
        (*_NEEDED, "multimodal_cfg"),
    ),
}

# What says how texts become tokens stands in open_clip's own configs beside the architecture; it is taken apart there.
TOKENIZER: dict[str, Check] = {
    "hf_tokenizer_name": optional(text(200)),
    "tokenizer_mode": optional(one_of("clips")),
    "tokenizer_kwargs": optional(record({"clean": allowed.CLEANING, "strip_sep_token": flag})),
}

# ---- sizes -----------------------------------------------------------------------------------------------------------


def grid(description: Description) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Size of the images, and patches down and across; None where no setting says so (timm, ResNet)."""
    vision = description["config"]["vision_cfg"]
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list):
        return None
    height, width = pair(vision.get("image_size", 224))
    down, across = pair(vision.get("patch_size") or 16)
    return (height, width), (height // down, width // across)


def sizes(description: Description) -> tuple[Blocks, Tables]:
    """See `Family.sizes`."""
    config, found = description["config"], grid(description)
    blocks: Blocks = []
    tables: Tables = []
    vision, words = config["vision_cfg"], config["text_cfg"]
    if found is not None:
        down, across = found[1]
        blocks.append(("visual.transformer.resblocks.", vision.get("layers", 12)))
        tables.append(("visual.positional_embedding", (down * across + 1, vision.get("width", 768))))
    elif isinstance(vision.get("layers"), list):  # a ResNet
        blocks += [(f"visual.layer{i + 1}.", count) for i, count in enumerate(vision["layers"])]
    own = "hf_config" not in words
    texts = _own_text(words, description["class"]) if own else open_clip_text_configs.sizes(words)
    blocks, tables = blocks + texts[0], tables + texts[1]
    if (decoder := config.get("multimodal_cfg")) is not None:
        blocks.append(("text_decoder.resblocks.", decoder.get("layers", 12)))
    return blocks, tables


def _own_text(words: dict[str, Any], kind: str) -> tuple[Blocks, Tables]:
    prefix = "" if kind == "CLIP" else "text."
    width = words.get("width", 512)
    length = words.get("context_length", 77) + bool(words.get("embed_cls"))
    return [(f"{prefix}transformer.resblocks.", words.get("layers", 12))], [
        (f"{prefix}positional_embedding", (length, width)),
        (f"{prefix}token_embedding.weight", (words.get("vocab_size", 49408), width)),
    ]
