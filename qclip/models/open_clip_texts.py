"""Text towers of Hugging Face inside open_clip (HFTextEncoder): built from data, described again, in explicit form."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from torch import Tensor, nn

from ..errors import ModelError
from . import replay
from .explicit import (
    Form,
    activation_name,
    become,
    by_name,
    embedding_site,
    mlp_sites,
    present,
    projection_site,
    succeed,
    unsupported,
)
from .huggingface_kinds import class_names
from .open_clip_text_configs import CONTEXT, SETTINGS
from .text_bert import ExplicitBert, bert_blocks
from .text_m2m import ExplicitM2M, m2m_blocks
from .text_t5 import ExplicitT5, t5_blocks
from .tower import Mlp, Site, Tower

POOLERS = {MeanPooler: "mean_pooler", ClsPooler: "cls_pooler", ClsLastHiddenStatePooler: "cls_last_hidden_state_pooler"}
STACKS = {  # by the class of the encoder: its form, its blocks, where its lookup stands
    "BertModel": (ExplicitBert, bert_blocks, ("embeddings", "word_embeddings")),
    "RobertaModel": (ExplicitBert, bert_blocks, ("embeddings", "word_embeddings")),
    "XLMRobertaModel": (ExplicitBert, bert_blocks, ("embeddings", "word_embeddings")),
    "M2M100Encoder": (ExplicitM2M, m2m_blocks, ("", "embed_tokens")),
    "MT5Stack": (ExplicitT5, t5_blocks, ("", "embed_tokens")),
}
# What is there twice in open_clip's models: the decoder, which it drops after it was built.
DROPPED = {"m2m_100": {"decoder_layers": 1}, "mt5": {"num_decoder_layers": 1}}


# ---- built, and described --------------------------------------------------------------------------------------------


def build(config: dict[str, Any], embed_dim: int) -> HFTextEncoder:
    """The tower of a checked `text_cfg` (`hf_config` and how its tokens are pooled), with random weights: of
    open_clip's class, by its own code, without a name that it could look up. Raises ModelError."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ModelError("text towers of Hugging Face need transformers; install qclip[hf]") from error
    settings = deepcopy(config["hf_config"])
    kind, pooler = settings.pop("model_type"), config.get("hf_pooler_type", "mean_pooler")
    described = AutoConfig.for_model(kind, **settings | DROPPED.get(kind, {}))
    text: Any = HFTextEncoder(
        "",
        output_dim=embed_dim,
        config=described,
        pooler_type=pooler,
        proj_type=config.get("hf_proj_type", "mlp"),
        output_tokens=config.get("output_tokens", False),
    )
    # What open_clip does where it is given a name: encoders alone, and BERT's own pooler only where it is read.
    if kind in DROPPED:
        text.transformer = text.transformer.encoder
    elif pooler != "cls_pooler":
        text.transformer.pooler = None
    if not hasattr(text, "proj"):
        raise ModelError(
            f"the text tower is {described.hidden_size} wide and embeddings {embed_dim}, without a projection"
        )
    text.qclip_context = config.get("context_length", CONTEXT)
    return text  # type: ignore[no-any-return]


def describe(text: Any) -> dict[str, Any]:
    """`text_cfg` such that `build` makes this architecture. For towers not yet in explicit form. Raises ModelError."""
    kind = text.config.model_type
    if kind not in SETTINGS or type(text.pooler) not in POOLERS:
        raise unsupported(text.pooler if kind in SETTINGS else text.transformer)
    held = text.config.to_dict()
    projection = text.proj
    found = "linear" if isinstance(projection, nn.Linear) else "mlp" if isinstance(projection, nn.Sequential) else None
    return {
        "hf_config": {"model_type": kind} | {key: held[key] for key in SETTINGS[kind] if held.get(key) is not None},
        "hf_pooler_type": POOLERS[type(text.pooler)],
        "hf_proj_type": found,
        "output_tokens": bool(text.output_tokens),
        "context_length": context_of(text),
    }


def context_of(text: Any) -> int:
    """How many tokens a text has: what open_clip's tokenizer gives, not what there are positions for."""
    return int(getattr(text, "qclip_context", CONTEXT))


def rebuild_buffers(text: nn.Module) -> None:
    """See `Family.rebuild_buffers`."""
    for module in text.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta or name not in module._non_persistent_buffers_set:
                continue
            if name == "position_ids":
                module._buffers[name] = torch.arange(buffer.shape[-1], device="cpu").expand((1, -1))
            elif name == "token_type_ids":
                module._buffers[name] = torch.zeros(buffer.shape, dtype=torch.int64, device="cpu")
            elif name == "weights" and hasattr(module, "get_embedding"):  # M2M100's sines
                rows, width = buffer.shape
                with torch.device("cpu"):
                    module._buffers[name] = module.get_embedding(rows, width, module.padding_idx).to(buffer.dtype)


# ---- explicit form ---------------------------------------------------------------------------------------------------


class ExplicitHFText(Form):
    """open_clip's HFTextEncoder. Padding is no part of a text: columns of padding alone are cut off."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return replay.run(self, self._encode, self.visible_tokens(x))  # type: ignore[no-any-return]

    def visible_tokens(self, tokens: Tensor) -> Tensor:
        """`tokens` `[B, L]` without the last columns that are padding in every row, where that is known without a wait
        and nobody reads the tokens' own embeddings."""
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.output_tokens or tokens.device.type != "cpu" or not tokens.numel() or tracing:
            return tokens
        return tokens[:, : max(1, int(ends(self, tokens).max()) + 1)]

    def _encode(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mask = (tokens != self.config.pad_token_id).long()
        out = self.transformer(input_ids=tokens, attention_mask=mask)
        pooled = self.proj(self.pooler(out, mask))
        if not self.output_tokens:
            return pooled  # type: ignore[no-any-return]
        last = out.last_hidden_state
        return pooled, last[:, 1:] if type(self.pooler) is ClsPooler else last


def positions(text: Any, tokens: Tensor) -> Tensor:
    """Which tokens are no padding: bool `[B, L]`."""
    return tokens != text.config.pad_token_id  # type: ignore[no-any-return]


def ends(text: Any, tokens: Tensor) -> Tensor:
    """The position of each text's last token that is no padding, int64 `[B]`."""
    return (positions(text, tokens) * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).argmax(-1)


def text_tower(text: Any) -> Tower:
    """An HFTextEncoder in explicit form, in place. Raises ModelError for encoders and poolers that are not known."""
    encoder = text.transformer
    found = next((STACKS[name] for name in STACKS if name in class_names(encoder)), None)
    if found is None or type(text.pooler) not in POOLERS:
        raise unsupported(encoder if found is None else text.pooler)
    form, blocks_of, (owner, lookup) = found
    length = context_of(text)
    blocks = blocks_of(encoder.encoder if form is ExplicitBert else encoder, length)
    become(encoder, form)
    if isinstance(text.proj, nn.Sequential):
        if len(text.proj) != 3:
            raise unsupported(text.proj, f"a projection of {len(text.proj)} layers")
        first, activation, second = text.proj
        text.proj = succeed(text.proj, Mlp(first, second, activation_name(activation)))
    become(text, ExplicitHFText)
    sites = [
        embedding_site(getattr(encoder, owner) if owner else encoder, lookup, length),
        [site for block in blocks for site in block.sites.values()],
        _projection(text),
    ]
    return Tower("text", text, blocks, by_name(*sites), length)


def _projection(text: Any) -> list[Site]:
    if isinstance(text.proj, Mlp):
        return list(mlp_sites("text.projection", text.proj, None, 1).values())
    return projection_site("text", text, "proj") if present(text.proj) is not None else []
