"""What a description of a Hugging Face model may hold (see `allowed`), and which tensors it then has."""

from __future__ import annotations

from ..untrusted.schema import Check, either, flag, listing, one_of, optional, real, record, whole
from .allowed import LAYERS, SIDE, TOKENS, VOCABULARY, WIDTH, dropout, pair, sides
from .family import Blocks, Description, Tables

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
_VISION = _SHARED | {
    "num_channels": one_of(3),
    "image_size": sides(1, SIDE),
    "patch_size": sides(1, SIDE),
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
SETTINGS: dict[str, dict[str, Check]] = {"text_config": _TEXT, "vision_config": _VISION}
_TOP: dict[str, Check] = {
    "text_config": record(_TEXT),
    "vision_config": record(_VISION),
    "projection_dim": whole(1, WIDTH),
    "logit_scale_init_value": real(-100, 100),
    "initializer_factor": real(0, 100),
    "initializer_range": real(0, 100),
}
CLASSES: dict[str, Check] = {
    "CLIPModel": record(_TOP, ("text_config", "vision_config")),
    "SiglipModel": record(_TOP, ("text_config", "vision_config")),
}

# ---- sizes -----------------------------------------------------------------------------------------------------------


def grid(description: Description) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size of the images, and patches down and across."""
    vision, default = description["config"]["vision_config"], 32 if description["class"] == "CLIPModel" else 16
    height, width = pair(vision.get("image_size", 224))
    down, across = pair(vision.get("patch_size") or default)
    return (height, width), (height // down, width // across)


def sizes(description: Description) -> tuple[Blocks, Tables]:
    """See `Family.sizes`."""
    config, (down, across) = description["config"], grid(description)[1]
    clip = description["class"] == "CLIPModel"
    vision, words = config["vision_config"], config["text_config"]
    width, narrow = vision.get("hidden_size", 768), words.get("hidden_size", 512 if clip else 768)
    length, rows = (77, 49408) if clip else (64, 32000)
    return [
        ("vision_model.encoder.layers.", vision.get("num_hidden_layers", 12)),
        ("text_model.encoder.layers.", words.get("num_hidden_layers", 12)),
    ], [
        ("vision_model.embeddings.position_embedding.weight", (down * across + clip, width)),
        (
            "text_model.embeddings.position_embedding.weight",
            (words.get("max_position_embeddings", length), narrow),
        ),
        ("text_model.embeddings.token_embedding.weight", (words.get("vocab_size", rows), narrow)),
    ]
