"""What a description of a Hugging Face model may hold (see `allowed`), and which tensors it then has."""

from __future__ import annotations

import math
from typing import Any

from ..untrusted.schema import Check, Refused, either, flag, listing, one_of, optional, real, record, whole
from .allowed import LAYERS, POSITIONS, SIDE, TOKENS, VOCABULARY, WIDTH, dropout, pair, sides
from .family import Blocks, Description, Shapes, Tables
from .huggingface_kinds import BOTH, KINDS, Kind
from .text_settings import BERT

_ID = optional(whole(0, VOCABULARY))


def _square(value: Any, where: str) -> None:
    """A number of positions on a square, from which those of other grids are interpolated."""
    whole(1, POSITIONS)(value, where)
    if math.isqrt(value) ** 2 != value:
        raise Refused(f"{where} is {value}, which is no square number")


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
    "attention_dropout": dropout,
    "dropout": dropout,
    "initializer_range": real(0, 100),
    "initializer_factor": real(0, 100),
}
_TEXT = _SHARED | {
    "vocab_size": whole(1, VOCABULARY),
    "max_position_embeddings": whole(1, TOKENS),
    "pad_token_id": _ID,
    "bos_token_id": _ID,
    "eos_token_id": either(listing(whole(0, VOCABULARY), 1, 16), _ID),
    "projection_size": optional(whole(1, WIDTH)),
}
_BERT = BERT | {
    "project_dim": whole(1, WIDTH),
    "initializer_factor": real(0, 100),
    "position_embedding_type": one_of("absolute"),
}
_VISION = _SHARED | {
    "num_channels": one_of(3),
    "image_size": sides(1, SIDE),
    "patch_size": sides(1, SIDE),
    "vision_use_head": flag,
}
_NAFLEX = {key: check for key, check in _VISION.items() if key != "image_size"} | {"num_patches": _square}
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


def settings(kind: Kind, tower: str) -> dict[str, Check]:
    """What the configuration of a tower may hold."""
    if tower == "text":
        return _BERT if kind.bert else _TEXT
    return _NAFLEX if kind.naflex else _VISION


def _of_class(kind: Kind) -> Check:
    if len(kind.towers) == 1:
        return record(settings(kind, kind.towers[0]))
    parts = {f"{tower}_config": record(settings(kind, tower)) for tower in BOTH}
    return record(
        parts
        | {
            "projection_dim": whole(1, WIDTH),
            "logit_scale_init_value": real(-100, 100),
            "initializer_factor": real(0, 100),
            "initializer_range": real(0, 100),
        },
        tuple(parts),
    )


CLASSES: dict[str, Check] = {name: _of_class(kind) for name, kind in KINDS.items()}

# ---- sizes -----------------------------------------------------------------------------------------------------------


def _part(description: Description, tower: str) -> dict:
    """The settings of a tower."""
    config: dict = description["config"]
    return config if len(KINDS[description["class"]].towers) == 1 else config[f"{tower}_config"]


def grid(description: Description) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Size of the images, and patches down and across; None without an image tower."""
    kind = KINDS[description["class"]]
    if "vision" not in kind.towers:
        return None
    vision = _part(description, "vision")
    down, across = pair(vision.get("patch_size") or (32 if kind.clip else 16))
    if kind.naflex:
        side = math.isqrt(vision.get("num_patches", 256))
        return (side * down, side * across), (side, side)
    height, width = pair(vision.get("image_size", 224))
    return (height, width), (height // down, width // across)


def sizes(description: Description) -> tuple[Blocks, Tables]:
    """See `Family.sizes`."""
    kind = KINDS[description["class"]]
    blocks: Blocks = []
    tables: Tables = []
    for tower in kind.towers:
        if kind.bert and tower == "text":
            more = _bert_sizes(description)
            blocks, tables = blocks + more[0], tables + more[1]
            continue
        # A tower that is a model is wrapped by some versions, and its files always say so: see `plain`.
        prefix = f"{tower}_model." if len(kind.towers) == 2 else ""
        config = _part(description, tower)
        blocks.append((f"{prefix}encoder.layers.", config.get("num_hidden_layers", 12)))
        width = config.get("hidden_size", 512 if kind.clip and tower == "text" else 768)
        length, rows = (77, 49408) if kind.clip else (64, 32000)
        if (found := grid(description)) is not None and tower == "vision":
            length = math.prod(found[1]) + kind.clip
            if kind.naflex:
                length = config.get("num_patches", 256)
        else:
            length = config.get("max_position_embeddings", length)
            tables.append((f"{prefix}embeddings.token_embedding.weight", (config.get("vocab_size", rows), width)))
        tables.append((f"{prefix}embeddings.position_embedding.weight", (length, width)))
    return blocks, tables


def _bert_sizes(description: Description) -> tuple[Blocks, Tables]:
    config, alt = _part(description, "text"), description["class"] == "AltCLIPModel"
    prefix = "text_model.roberta." if alt else "text_model."
    width = config.get("hidden_size", 1024 if alt else 768)
    rows, length = (250002, 514) if alt else (30522, 512)
    blocks = "encoder.layers." if alt else "encoder.layer."
    return [(f"{prefix}{blocks}", config.get("num_hidden_layers", 24 if alt else 12))], [
        (f"{prefix}embeddings.word_embeddings.weight", (config.get("vocab_size", rows), width)),
        (f"{prefix}embeddings.position_embeddings.weight", (config.get("max_position_embeddings", length), width)),
    ]


def plain(description: Description, shapes: Shapes) -> Shapes:
    """See `Family.plain`."""
    if description["class"] == "AltCLIPModel":  # version 5 calls blocks otherwise than files do, and writes both names
        return {name.replace(".encoder.layer.", ".encoder.layers."): shape for name, shape in shapes.items()}
    towers = KINDS[description["class"]].towers
    if len(towers) == 2:
        return shapes
    return {name.removeprefix(f"{towers[0]}_model."): shape for name, shape in shapes.items()}
