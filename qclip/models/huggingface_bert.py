"""Text towers of AltCLIP (XLM-RoBERTa) and ChineseCLIP (BERT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .explicit import become, by_name, embedding_site, projection_site
from .huggingface_form import ExplicitModel
from .huggingface_kinds import inner, kind_of
from .text_bert import ExplicitBert, bert_blocks, bert_positions
from .tower import Site, Tower


def encoder_of(model: Any) -> Any:
    """BERT itself: AltCLIP has a norm and a linear map behind it."""
    text = inner(model, "text")
    return getattr(text, "roberta", text)


def context_of(model: Any) -> int:
    """How many tokens a text has: no more than the model was trained with, or has positions for."""
    return min(kind_of(model).bert, bert_positions(encoder_of(model)))


def text_tower(model: Any, whole: Any) -> Tower:
    """In explicit form, in place; `whole` is what encodes."""
    text, encoder = inner(model, "text"), encoder_of(model)
    length = context_of(model)
    blocks = bert_blocks(encoder.encoder, length)
    if encoder is not text:
        become(text, ExplicitModel)
    become(encoder, ExplicitBert)
    behind: list[Site] = []
    if encoder is not text:
        behind = [
            Site("text.transformation", "projection", "norm", "text.normed", text, "transformation", True, length)
        ]
    sites = [
        embedding_site(encoder.embeddings, "word_embeddings", length),
        [site for block in blocks for site in block.sites.values()],
        behind,
        projection_site("text", model, "text_projection"),
    ]
    return Tower("text", whole, blocks, by_name(*sites), length, encoder)


def ends(model: Any, tokens: Tensor) -> Tensor:
    """The position of each text's last token that is no padding, int64 `[B]`."""
    return (real(model, tokens) * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).argmax(-1)


def real(model: Any, tokens: Tensor) -> Tensor:
    """Which tokens are no padding, bool `[B, L]`."""
    return tokens != encoder_of(model).config.pad_token_id  # type: ignore[no-any-return]


def visible(model: Any, tokens: Tensor) -> Tensor:
    """`tokens` without the last columns that are padding in every row, where that is known without a wait."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tokens.device.type != "cpu" or not tokens.numel() or tracing:
        return tokens
    return tokens[:, : int(ends(model, tokens).max()) + 1]
