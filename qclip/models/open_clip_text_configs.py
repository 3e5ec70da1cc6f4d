"""Hugging Face's text encoders that open_clip's configurations name, as data: a name is never looked up on the hub; and
what a description of one may hold."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError, nearest
from ..untrusted.schema import Check, Refused, flag, one_of, optional, real, record, whole
from .allowed import LAYERS, TOKENS, VOCABULARY, WIDTH, dropout
from .family import Blocks, Tables
from .text_settings import BERT, IDS

CONTEXT = 77  # tokens of a text where a configuration of open_clip says nothing

_ROBERTA = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "activation_function": "relu",
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
}
_MT5 = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "dropout_rate": 0.0,
}
#: By `hf_model_name`. Rates of dropout, which change training only, are 0.
CONFIGS: dict[str, dict[str, Any]] = {
    "roberta-base": {"model_type": "roberta"} | _ROBERTA,
    "xlm-roberta-base": {"model_type": "xlm-roberta"} | _ROBERTA | {"vocab_size": 250002},
    "xlm-roberta-large": {"model_type": "xlm-roberta"} | _ROBERTA | {"vocab_size": 250002} | _LARGE,
    "google/mt5-base": _MT5,
    "google/mt5-xl": _MT5 | {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "facebook/nllb-200-distilled-600M": _NLLB,
    "facebook/nllb-200-distilled-1.3B": _NLLB | {"encoder_layers": 24, "encoder_ffn_dim": 8192},
}


def named(name: str) -> dict[str, Any]:
    """The configuration that a name of the hub stands for. Raises ModelError for one that is not carried here."""
    if name not in CONFIGS:
        raise ModelError(
            f"the text tower {name!r} is none whose configuration is known here, and names are not looked up; "
            f"{nearest(name, list(CONFIGS))}, or give its settings as 'hf_config' in the text_cfg"
        )
    return dict(CONFIGS[name])


# ---- what a description may hold -------------------------------------------------------------------------------------

_M2M: dict[str, Check] = IDS | {
    "vocab_size": whole(1, VOCABULARY),
    "d_model": whole(4, WIDTH),
    "encoder_layers": whole(1, LAYERS),
    "encoder_ffn_dim": whole(1, 4 * WIDTH),
    "encoder_attention_heads": whole(1, WIDTH),
    "activation_function": one_of("relu", "gelu", "gelu_new"),
    "max_position_embeddings": whole(1, TOKENS),
    "scale_embedding": flag,
    "dropout": dropout,
    "attention_dropout": dropout,
    "activation_dropout": dropout,
    "encoder_layerdrop": dropout,
    "init_std": real(0, 100),
}
_T5: dict[str, Check] = IDS | {
    "vocab_size": whole(1, VOCABULARY),
    "d_model": whole(1, WIDTH),
    "d_kv": whole(1, WIDTH),
    "d_ff": whole(1, 4 * WIDTH),
    "num_layers": whole(1, LAYERS),
    "num_heads": whole(1, WIDTH),
    "relative_attention_num_buckets": whole(4, 4096),
    "relative_attention_max_distance": whole(4, 65536),
    "feed_forward_proj": one_of("gated-gelu"),
    "layer_norm_epsilon": real(1e-12, 0.1),
    "dropout_rate": dropout,
    "initializer_factor": real(0, 100),
}
SETTINGS: dict[str, dict[str, Check]] = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "m2m_100": _M2M,
    "mt5": _T5,
}


def _config(value: Any, where: str) -> None:
    kind = value.get("model_type") if isinstance(value, dict) else None
    if kind not in SETTINGS:
        raise Refused(f"{where} is of model_type {str(kind)[:60]!r}; known: {', '.join(SETTINGS)}")
    allowed = {"model_type": one_of(kind)} | SETTINGS[kind]
    record(allowed, tuple(TABLES[kind][1:]))(value, where)


#: Where the blocks are, and what a description cannot leave out: their number, rows of the lookup and its width.
TABLES: dict[str, tuple[str, str, str, str]] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta"), ("encoder.layer.", "num_hidden_layers", "vocab_size", "hidden_size")
    ),
    "m2m_100": ("layers.", "encoder_layers", "vocab_size", "d_model"),
    "mt5": ("block.", "num_layers", "vocab_size", "d_model"),
}
TEXT: Check = record(
    {
        "hf_config": _config,
        "hf_pooler_type": one_of("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"),
        "hf_proj_type": optional(one_of("linear", "mlp")),
        "output_tokens": flag,
        "context_length": whole(1, TOKENS),
        "vocab_size": whole(1, VOCABULARY),  # CoCa's decoder has it
        "width": whole(1, WIDTH),  # said by open_clip and read by nobody
    },
    ("hf_config",),
)


def sizes(config: dict[str, Any]) -> tuple[Blocks, Tables]:
    """Of a checked `text_cfg`; see `Family.sizes`."""
    settings = config["hf_config"]
    prefix, layers, rows, width = TABLES[settings["model_type"]]
    bert = prefix.startswith("encoder")
    lookup = "embeddings.word_embeddings.weight" if bert else "embed_tokens.weight"
    tables = [(f"text.transformer.{lookup}", (settings[rows], settings[width]))]
    if bert:
        held = settings.get("max_position_embeddings", 512)
        tables.append(("text.transformer.embeddings.position_embeddings.weight", (held, settings[width])))
    return [(f"text.transformer.{prefix}", settings[layers])], tables
