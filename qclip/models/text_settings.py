"""What a description of one of transformers' text encoders may hold (see `allowed`)."""

from __future__ import annotations

from ..untrusted.schema import Check, one_of, optional, real, whole
from .allowed import LAYERS, TOKENS, VOCABULARY, WIDTH, dropout

_ID = optional(whole(0, VOCABULARY))
IDS: dict[str, Check] = {"pad_token_id": whole(0, VOCABULARY), "bos_token_id": _ID, "eos_token_id": _ID}
BERT: dict[str, Check] = IDS | {
    "vocab_size": whole(1, VOCABULARY),
    "hidden_size": whole(1, WIDTH),
    "intermediate_size": whole(1, 4 * WIDTH),
    "num_hidden_layers": whole(1, LAYERS),
    "num_attention_heads": whole(1, WIDTH),
    "hidden_act": one_of("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu"),
    "max_position_embeddings": whole(1, TOKENS),
    "type_vocab_size": whole(1, 1000),
    "layer_norm_eps": real(1e-12, 0.1),
    "hidden_dropout_prob": dropout,
    "attention_probs_dropout_prob": dropout,
    "initializer_range": real(0, 100),
}
