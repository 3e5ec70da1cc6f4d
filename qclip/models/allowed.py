"""Every setting that a description of a model may carry: architecture, preprocessing, tokenizer.

A description is data. What is not listed here is refused by name, whether it comes from an artifact, an open_clip
folder, a Hugging Face folder or the hub, so that no switch of a library that runs code, loads kernels or asks the
network can be set from a file. Ranges are beyond any published model, and small enough that no size in them harms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError, ModelError
from ..untrusted.schema import (
    Check,
    anything,
    either,
    flag,
    listing,
    mapping,
    null,
    one_of,
    optional,
    real,
    record,
    shown,
    text,
    validate,
    whole,
)

LAYERS, WIDTH, TOKENS, VOCABULARY, SIDE, POSITIONS = 256, 16384, 2048, 2_000_000, 2048, 16384


def _sides(low: int, high: int) -> Check:
    """One number, or height and width."""
    return either(listing(whole(low, high), 2, 2), whole(low, high))


def _dropout(value: Any, where: str) -> None:
    real(0, 0.99)(value, where)


# ---- open_clip -------------------------------------------------------------------------------------------------------

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
    "patch_size": optional(_sides(1, SIDE)),
    "image_size": _sides(1, SIDE),
    "patch_dropout": _dropout,
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
    "timm_drop": _dropout,
    "timm_drop_path": optional(_dropout),
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
    "hf_model_name": null,  # text towers of Hugging Face: open_clip would fetch them
    "hf_tokenizer_name": null,
    "tokenizer_mode": null,
    "tokenizer_kwargs": null,
}
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
    "CustomTextCLIP": record(_OPEN_CLIP, _NEEDED),
    "CoCa": record(
        _OPEN_CLIP | {"multimodal_cfg": record(_MULTIMODAL), "pad_id": whole(0, VOCABULARY)},
        (*_NEEDED, "multimodal_cfg"),
    ),
}

# What says how texts become tokens stands in open_clip's own configs beside the architecture; it is taken apart there.
CLEANING = one_of("lower", "whitespace", "canonicalize")
OPEN_CLIP_TOKENIZER: dict[str, Check] = {
    "hf_tokenizer_name": optional(text(200)),
    "tokenizer_mode": optional(one_of("clips")),
    "tokenizer_kwargs": optional(record({"clean": CLEANING, "strip_sep_token": flag})),
}

# ---- Hugging Face ----------------------------------------------------------------------------------------------------

_ID = optional(whole(0, VOCABULARY))
_SHARED: dict[str, Check] = {
    "hidden_size": whole(1, WIDTH),
    "intermediate_size": whole(1, 4 * WIDTH),
    "projection_dim": optional(whole(1, WIDTH)),
    "num_hidden_layers": whole(1, LAYERS),
    "num_attention_heads": whole(1, WIDTH),
    "hidden_act": one_of(
        "quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_pytorch", "relu"
    ),
    "layer_norm_eps": real(1e-12, 0.1),
    "attention_dropout": _dropout,
    "dropout": _dropout,
    "initializer_range": real(0, 100),
    "initializer_factor": real(0, 100),
}
_HF_TEXT = _SHARED | {
    "vocab_size": whole(1, VOCABULARY),
    "max_position_embeddings": whole(1, TOKENS),
    "pad_token_id": _ID,
    "bos_token_id": _ID,
    "eos_token_id": either(listing(whole(0, VOCABULARY), 1, 16), _ID),
    "projection_size": optional(whole(1, WIDTH)),
}
_HF_VISION = _SHARED | {
    "num_channels": one_of(3),
    "image_size": _sides(1, SIDE),
    "patch_size": _sides(1, SIDE),
    "vision_use_head": flag,
}
# What transformers writes into every config and no image or text tower reads: dropped, never handed over.
BOOKKEEPING = frozenset(
    """_name_or_path add_cross_attention architectures bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label is_decoder is_encoder_decoder label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache""".split()
)
HF_SETTINGS: dict[str, dict[str, Check]] = {"text_config": _HF_TEXT, "vision_config": _HF_VISION}
_HF_TOP: dict[str, Check] = {
    "text_config": record(_HF_TEXT),
    "vision_config": record(_HF_VISION),
    "projection_dim": whole(1, WIDTH),
    "logit_scale_init_value": real(-100, 100),
    "initializer_factor": real(0, 100),
    "initializer_range": real(0, 100),
}
HF_CLASSES: dict[str, Check] = {
    "CLIPModel": record(_HF_TOP, ("text_config", "vision_config")),
    "SiglipModel": record(_HF_TOP, ("text_config", "vision_config")),
}

# ---- preprocessing and tokenizer -------------------------------------------------------------------------------------

_COLOURS = listing(real(-1e3, 1e3), 3, 3)
PREPROCESS = record(
    {
        "image_size": _sides(1, SIDE),
        "mean": _COLOURS,
        "std": listing(real(1e-6, 1e6), 3, 3),
        "interpolation": one_of("bicubic", "bilinear", "random"),
        "resize_mode": one_of("shortest", "longest", "squash"),
        "fill_color": whole(0, 255),
    },
    ("image_size",),
)

_LENGTH = {"context_length": whole(1, TOKENS)}
_DIGEST = text(64, "[0-9a-f]{64}")
TOKENIZER_BYTES = 64_000_000
# In a file: CLIP's own, the artifact's own `tokenizer.json`, or none.
TOKENIZERS: dict[str, Check] = {
    "clip-bpe": record({"kind": one_of("clip-bpe"), "options": record({"clean": CLEANING}), **_LENGTH}),
    "unknown": record({"kind": one_of("unknown"), **_LENGTH}),
    "json": record(
        {
            "kind": one_of("json"),
            "clean": optional(CLEANING),
            "pad_id": whole(0, VOCABULARY),
            "pad_token": text(200),
            "padding_side": one_of("right", "left"),
            "truncation_side": one_of("right", "left"),
            "strip_id": optional(whole(0, VOCABULARY)),
            "clips": optional(listing(whole(0, VOCABULARY), 4, 4)),
            "sha256": _DIGEST,
            "bytes": whole(2, TOKENIZER_BYTES),
            **_LENGTH,
        },
        ("context_length", "pad_id", "pad_token", "sha256", "bytes"),
    ),
}
NAMED_TOKENIZERS = ("siglip", "hf", "hf-auto")  # of models that were loaded by name; no file may ask for them

# Tokenizers of transformers that are data: a vocabulary and rules, nothing that is looked up or run.
TOKENIZER_CLASSES = frozenset(
    name + fast
    for name in "CLIP Siglip Siglip2 T5 MT5 Gemma Bert Roberta XLMRoberta Nllb DistilBert Llama GPT2 Albert".split()
    for fast in ("Tokenizer", "TokenizerFast")
) | {"PreTrainedTokenizerFast", "TokenizersBackend"}
_TOKEN = either(
    text(200),
    null,
    record(
        {"__type": one_of("AddedToken"), "content": text(200), "id": whole(0, VOCABULARY)}
        | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), flag)
    ),
)
_WORD = optional(either(flag, text(200)))
TOKENIZER_SETTINGS: dict[str, Check] = {
    "tokenizer_class": optional(one_of(*sorted(TOKENIZER_CLASSES))),
    "model_max_length": either(real(1, 1e31), null),
    **dict.fromkeys([f"{n}_token" for n in "bos eos unk pad sep cls mask image boi eoi".split()], _TOKEN),
    "additional_special_tokens": optional(listing(_TOKEN, 0, 10_000)),
    "extra_special_tokens": either(null, listing(_TOKEN, 0, 10_000), mapping(text(200), _TOKEN, 10_000)),
    "added_tokens_decoder": mapping(text(20), _TOKEN, 20_000),
    "extra_ids": whole(0, 1000),
    "padding_side": one_of("right", "left"),
    "truncation_side": one_of("right", "left"),
    "model_input_names": listing(text(80), 0, 8),
    "src_lang": _WORD,
    "tgt_lang": _WORD,
    "errors": one_of("replace", "ignore", "strict"),
    "vocab_size": whole(1, VOCABULARY),
    **dict.fromkeys(
        """add_prefix_space do_lower_case do_basic_tokenize strip_accents tokenize_chinese_chars keep_accents
        clean_up_tokenization_spaces add_bos_token add_eos_token legacy legacy_behaviour
        spaces_between_special_tokens split_special_tokens remove_space trim_offsets from_slow
        use_default_system_prompt""".split(),
        optional(flag),
    ),
}
# Names of files and of whoever wrote the settings: not handed over either.
TOKENIZER_BOOKKEEPING = frozenset(
    """name_or_path special_tokens_map_file tokenizer_file vocab_file merges_file processor_class chat_template
    backend is_local local_files_only never_split max_length pad_to_multiple_of pad_token_type_id stride
    truncation_strategy sp_model_kwargs sentencepiece_model_file use_fast cache_dir""".split()
)


# ---- the checks ------------------------------------------------------------------------------------------------------


def check_architecture(description: Any, refuse: type[InputError] = ModelError) -> None:
    """Raises `refuse` unless every setting of `{"family", "class", "config"}` is one that a file may carry."""
    where = "the description's architecture"
    validate(record(dict.fromkeys(("family", "class", "config"), anything)), description, where, refuse)
    family, name = (value if isinstance(value := description.get(key), str) else "" for key in ("family", "class"))
    known = {"open_clip": CLASSES, "huggingface": HF_CLASSES}.get(family, {})
    if name not in known:
        raise refuse(
            f"the description is of no model that is supported (family {shown(family)}, class {shown(name)}); "
            f"known classes: {', '.join([*CLASSES, *HF_CLASSES])}"
        )
    validate(known[name], description.get("config"), f"{where}, {name}", refuse)
    if (sides := _grid(description)) is not None and not 1 <= sides[0] * sides[1] <= POSITIONS:
        raise refuse(f"{where}: {sides[0]} x {sides[1]} patches; there must be from 1 to {POSITIONS}")


def check_preprocess(description: Any, refuse: type[InputError] = ModelError) -> None:
    """Raises `refuse` unless the settings of an image transform exist and are in range."""
    validate(PREPROCESS, description, "preprocessing", refuse)


def check_image_size(architecture: dict[str, Any], preprocess: dict[str, Any], refuse: type[InputError]) -> None:
    """Raises `refuse` where an image transform makes images of another size than the model has positions for."""
    if _grid(architecture) is not None:
        part = "vision_config" if architecture["family"] == "huggingface" else "vision_cfg"
        mine, its = _pair(preprocess["image_size"]), _pair(architecture["config"][part].get("image_size", 224))
        if mine != its:
            raise refuse(
                f"preprocessing takes images of {mine[0]} x {mine[1]} and the architecture {its[0]} x {its[1]}"
            )


def check_tokenizer(description: Any, refuse: type[InputError] = ModelError) -> None:
    """Raises `refuse` unless a file may describe its tokenizer so."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind in NAMED_TOKENIZERS:
        raise refuse(
            f"tokenizer kind {kind!r} is loaded from the hub or a folder, which a file cannot ask for; artifacts carry "
            "their tokenizer: save the model again"
        )
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        raise refuse(f"tokenizer kind {shown(kind)} is unknown; known: {', '.join(TOKENIZERS)}")
    validate(TOKENIZERS[kind], description, "the tokenizer's description", refuse)


# ---- sizes against tensors -------------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)


def _grid(description: dict[str, Any]) -> tuple[int, int] | None:
    """Patches down and across; None where no setting says so (timm, ResNet)."""
    config = description["config"]
    if description["family"] == "huggingface":
        vision, default = config["vision_config"], 32 if description["class"] == "CLIPModel" else 16
    else:
        vision, default = config["vision_cfg"], 16
        if vision.get("timm_model_name") or isinstance(vision.get("layers"), list):
            return None
    (height, width), (ph, pw) = _pair(vision.get("image_size", 224)), _pair(vision.get("patch_size") or default)
    return height // ph, width // pw


def _sizes(description: dict[str, Any]) -> tuple[list[tuple[str, int]], list[tuple[str, tuple[int, int]]]]:
    """(prefix of numbered blocks, how many) and (table, its shape) that tensors of this architecture have. What stands
    here is what grows without bound when a description lies: depths, positions, vocabularies."""
    config, grid = description["config"], _grid(description)
    blocks: list[tuple[str, int]] = []
    tables: list[tuple[str, tuple[int, int]]] = []
    if description["family"] == "huggingface":
        clip = description["class"] == "CLIPModel"
        vision, words = config["vision_config"], config["text_config"]
        width, narrow = vision.get("hidden_size", 768), words.get("hidden_size", 512 if clip else 768)
        assert grid is not None
        blocks = [
            ("vision_model.encoder.layers.", vision.get("num_hidden_layers", 12)),
            ("text_model.encoder.layers.", words.get("num_hidden_layers", 12)),
        ]
        tables = [
            ("vision_model.embeddings.position_embedding.weight", (grid[0] * grid[1] + clip, width)),
            (
                "text_model.embeddings.position_embedding.weight",
                (words.get("max_position_embeddings", 77 if clip else 64), narrow),
            ),
            (
                "text_model.embeddings.token_embedding.weight",
                (words.get("vocab_size", 49408 if clip else 32000), narrow),
            ),
        ]
        return blocks, tables
    vision, words = config["vision_cfg"], config["text_cfg"]
    if grid is not None:
        blocks.append(("visual.transformer.resblocks.", vision.get("layers", 12)))
        tables.append(("visual.positional_embedding", (grid[0] * grid[1] + 1, vision.get("width", 768))))
    elif isinstance(vision.get("layers"), list):  # a ResNet
        blocks += [(f"visual.layer{i + 1}.", count) for i, count in enumerate(vision["layers"])]
    prefix = "" if description["class"] == "CLIP" else "text."
    width = words.get("width", 512)
    length = words.get("context_length", 77) + bool(words.get("embed_cls"))
    blocks.append((f"{prefix}transformer.resblocks.", words.get("layers", 12)))
    tables.append((f"{prefix}positional_embedding", (length, width)))
    tables.append((f"{prefix}token_embedding.weight", (words.get("vocab_size", 49408), width)))
    if (decoder := config.get("multimodal_cfg")) is not None:
        blocks.append(("text_decoder.resblocks.", decoder.get("layers", 12)))
    return blocks, tables


def check_sizes(
    description: dict[str, Any], shapes: Shapes, what: str, refuse: type[InputError] = ModelError, exact: bool = True
) -> None:
    """Raises `refuse` unless tensors of these shapes can be those of this (checked) architecture: as many blocks, and
    tables of positions and tokens as large. Not `exact`: positions may be resized, up to four times the file's numbers.

    Called before anything is built, so that what is built is no larger than the file.
    """
    blocks, tables = _sizes(description)
    for prefix, count in blocks:
        found = _numbered(shapes, prefix)
        if found != count:
            first = "" if found else f" (it begins with {next(iter(shapes), '')[:120]!r})"
            raise refuse(
                f"{what} holds {found} blocks {prefix + '*'!r}{first} and its description says {count}; "
                "one of them is of another model"
            )
    total = sum(math.prod(shape) for shape in shapes.values())
    for name, shape in tables:
        held = shapes.get(name) or shapes.get(f"{name.removesuffix('.weight')}.codes")
        if held is None:
            raise refuse(f"{what} lacks {name!r}, which its description asks for")
        same = held[1:] == shape[1:] and (math.prod(shape) <= 4 * total if "position" in name else held == shape)
        if held != shape if exact else not same:
            raise refuse(f"{name!r} in {what} is {held} and its description says {shape}")


def _numbered(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are, which must be numbered without a gap."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    return len(found) if found == set(range(len(found))) else -1


__all__ = [
    "BOOKKEEPING",
    "CLASSES",
    "HF_CLASSES",
    "HF_SETTINGS",
    "NAMED_TOKENIZERS",
    "OPEN_CLIP_TOKENIZER",
    "TOKENIZER_BOOKKEEPING",
    "TOKENIZER_BYTES",
    "TOKENIZER_CLASSES",
    "TOKENIZER_SETTINGS",
    "check_architecture",
    "check_preprocess",
    "check_sizes",
    "check_tokenizer",
]
