"""The explicit form of open_clip's own modules, and their towers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import (
    AttentionalPooler,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    text_global_pool,
)
from torch import Tensor, nn

from ..errors import ModelError
from . import replay
from .explicit import (
    Form,
    activation_name,
    attention_sites,
    become,
    by_name,
    embedding_site,
    from_multihead_attention,
    no_dropout,
    patch_site,
    present,
    projection,
    projection_site,
    split,
    succeed,
    transformer_block,
    unsupported,
)
from .tower import Attention, Block, Mlp, Tower, normed
from .value_path import ValuePath, undefined

CAUSAL = "causal"  # stands for open_clip's own triangular mask between the text towers and their blocks


class HeadScale(nn.Module):
    """NormFormer's factor for each head, on the heads' joined output `[B, L, H * d]`."""

    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale  # [H, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        heads = self.scale.shape[0]
        return (x.unflatten(-1, (heads, -1)) * self.scale.view(heads, 1)).flatten(-2)


class ExplicitBlock(Form):
    """A residual block of open_clip whose `attn` and `mlp` are the explicit cores."""

    REPLACES = frozenset({"attention"})

    def _run(self, x: Tensor, attn_mask: Tensor | str | None) -> Tensor:
        causal = isinstance(attn_mask, str)
        mask = None if causal else _core_mask(attn_mask, x, self.attn.heads)
        y = normed(self.ln_1, self.attn, x, mask=mask, causal=causal)
        if hasattr(self, "ln_attn"):
            y = self.ln_attn(y)
        x = x + self.ls_1(y)
        return x + self.ls_2(normed(self.ln_2, self.mlp, x))


class ExplicitResidualBlock(ExplicitBlock):
    def forward(self, q_x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | str | None = None) -> Tensor:
        if k_x is not None or v_x is not None:
            raise unsupported(self, "cross attention in the encoder")
        return self._run(q_x, attn_mask)


class ExplicitCustomBlock(ExplicitBlock):
    def forward(self, x: Tensor, attn_mask: Tensor | str | None = None) -> Tensor:
        return self._run(x, attn_mask)


def _core_mask(mask: Tensor | None, x: Tensor, heads: int) -> Tensor | None:
    """From open_clip's masks (additive, or bool with True = hidden; `[B*H, L, L]` where they differ by sample) to the
    cores'."""
    if mask is None:
        return None
    if mask.ndim == 3 and mask.shape[0] > 1:
        mask = mask.unflatten(0, (-1, heads))
    return ~mask if mask.dtype == torch.bool else mask.to(x.dtype)


def _explicit_block(block: Any) -> None:
    if isinstance(block, ExplicitBlock):
        return
    if isinstance(block, ResidualAttentionBlock):
        if hasattr(block, "ln_1_kv"):
            raise unsupported(block, "cross attention in the encoder")
        form: type = ExplicitResidualBlock
    elif isinstance(block, CustomResidualAttentionBlock):
        form = ExplicitCustomBlock
    else:
        raise unsupported(block)
    attention, mlp = block.attn, block.mlp
    if odd := [name for name, _ in mlp.named_children() if name not in ("c_fc", "ln", "gelu", "c_proj")]:
        raise unsupported(mlp, f"{odd[0]!r} in it is not open_clip's")
    norm = present(getattr(mlp, "ln", None))
    explicit = succeed(mlp, Mlp(mlp.c_fc, mlp.c_proj, activation_name(mlp.gelu), norm))
    if isinstance(attention, nn.MultiheadAttention):
        block.attn = from_multihead_attention(attention)
    elif isinstance(attention, OpenClipAttention):
        block.attn = _from_own_attention(attention)
    else:
        raise unsupported(attention)
    block.mlp = explicit
    become(block, form)


def _from_own_attention(attention: Any) -> Attention:
    if attention.logit_scale is not None:
        raise unsupported(attention, "scaled cosine attention")
    no_dropout(attention, attention.attn_drop.p, attention.out_drop.p)
    q, k, v = split(attention.in_proj_weight, attention.in_proj_bias, 3, attention.in_proj_weight)
    inner = present(attention.ln_inner)
    if attention.head_scale is not None:
        scale = HeadScale(attention.head_scale)
        inner = scale if inner is None else nn.Sequential(scale, inner)
    core = Attention(
        q,
        k,
        v,
        attention.out_proj,
        attention.num_heads,
        q_norm=present(attention.ln_q),
        k_norm=present(attention.ln_k),
        inner_norm=inner,
    )
    return succeed(attention, core, positional=True)


def _explicit_transformer(transformer: Any) -> None:
    if not getattr(transformer, "batch_first", True):
        raise unsupported(transformer, "batch_first=False")
    for block in transformer.resblocks:
        _explicit_block(block)


def _blocks(tower: str, transformer: Any, rows: int) -> list[Block]:
    return [
        transformer_block(f"{tower}.blocks.{i}", b, (b, "attn"), (b, "ln_1"), (b, "mlp"), (b, "ln_2"), rows)
        for i, b in enumerate(transformer.resblocks)
    ]


# ---- vision ----------------------------------------------------------------------------------------------------------


class ExplicitPooler(Form):
    """CoCa's attention pool: learned queries over normed tokens."""

    def forward(self, x: Tensor) -> Tensor:
        query = self.ln_q(self.query)
        return self.attn(self.ln_k(x), query=query.unsqueeze(0).expand(x.shape[0], -1, -1))


class ExplicitVision(Form):
    """open_clip's VisionTransformer with its projection as a linear module."""

    WRAPS = frozenset({"forward_intermediates"})

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return replay.run(self, self._encode, x)

    def _encode(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pooled, tokens = self._pool(self.transformer(self._embeds(x)))
        if self.proj is not None:
            pooled = self.proj(pooled)
        return (pooled, tokens) if self.output_tokens else pooled

    def forward_intermediates(self, *args: object, **kwargs: object) -> dict:
        output = super(ExplicitVision, _view(self, "proj", None)).forward_intermediates(*args, **kwargs)
        if "image_features" in output and self.proj is not None:
            output["image_features"] = self.proj(output["image_features"])
        return output


def _view(module: Any, child: str, put: nn.Module | None) -> Any:
    """A shallow copy of `module` that shares all but one child."""
    view = copy.copy(module)
    view._modules = {**module._modules, child: put}
    return view


def vision_tower(visual: Any) -> Tower:
    """`visual` in explicit form, in place."""
    _explicit_transformer(visual.transformer)
    pools = [name for name in ("attn_pool", "attn_pool_contrastive") if getattr(visual, name, None) is not None]
    for name in pools:
        pooler = getattr(visual, name)
        if not isinstance(pooler, AttentionalPooler):
            raise unsupported(pooler)
        if isinstance(pooler.attn, nn.MultiheadAttention):
            pooler.attn = from_multihead_attention(pooler.attn)
        become(pooler, ExplicitPooler)
    if isinstance(visual.proj, nn.Parameter):
        weight = visual.proj
        del visual.proj
        visual.proj = projection(weight, visual.training)
    become(visual, ExplicitVision)

    patches = visual.grid_size[0] * visual.grid_size[1]
    blocks = _blocks("vision", visual.transformer, patches + 1)
    pooled: list[Block] = []
    for name in pools:
        pooler = getattr(visual, name)
        label = "vision.pool" if name == "attn_pool" else "vision.pool_contrastive"
        norm = (pooler, "ln_k")
        queries = pooler.query.shape[0]
        sites = attention_sites(label, pooler.attn, norm, patches + 1, "pool_", queries)
        pooled.append(Block(label, pooler, (pooler, "attn"), norm, None, None, sites, queries * (patches + 1)))
    # Without further pooling every query of the last pool goes through the projection.
    rows = getattr(visual, pools[-1]).query.shape[0] if pools and visual.pool_type == "none" else 1
    sites = by_name(
        patch_site("vision", visual, "conv1", patches),
        *(list(b.sites.values()) for b in blocks + pooled),
        projection_site("vision", visual, "proj", rows),
    )
    return Tower("vision", visual, blocks + pooled, sites, patches + 1)


def value_path(visual: Any, tower: Tower) -> ValuePath:
    """Of a tower that pools its class token. Raises ModelError."""
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise undefined(visual, "it does not pool a class token")
    block: Any = tower.blocks[-1].module
    behind = [module for name in ("ln_attn", "ls_1") if (module := getattr(block, name, None)) is not None]
    norm, projection = visual.ln_post, visual.proj

    def tail(x: Tensor) -> Tensor:
        x = norm(x)
        return x if projection is None else projection(x)

    return ValuePath.of(tower.blocks[-1], tail, behind_attention=tuple(behind), behind_mlp=(block.ls_2,))


# ---- text ------------------------------------------------------------------------------------------------------------


def visible(tokens: Tensor, pool: str, eos: int | None) -> Tensor:
    """`tokens` up to the last EOT that any row is pooled at. Causal attention makes what follows unreadable.

    Only where the length is known without a wait (host memory), and never while a graph is being traced: there it
    would become a constant.
    """
    if tokens.device.type != "cpu" or tokens.numel() == 0 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return tokens
    at = tokens.argmax(-1) if pool == "argmax" else (tokens == eos).int().argmax(-1)
    return tokens[:, : int(at.max()) + 1]


def check_length(tokens: Tensor, positions: int) -> None:
    """Raises ModelError where a text of `tokens` `[B, L]` has more than the tower has positions for."""
    if tokens.shape[1] > positions:
        raise ModelError(
            f"texts of {tokens.shape[1]} tokens are longer than the {positions} positions of the text tower; "
            "cut them (the tokenizer does)"
        )


class ExplicitText(Form):
    """What the two forms of open_clip's text tower share: `qclip_causal` says that the mask is the triangular one."""

    WRAPS = frozenset({"forward_intermediates"})

    qclip_causal: bool

    def visible_tokens(self, tokens: Tensor) -> Tensor:
        """The part of `tokens` `[B, L]` that decides the embedding; all of it where that is not known to be exact."""
        pool, eos = self._pooling()
        if not self.qclip_causal or pool not in ("argmax", "eos"):
            return tokens
        return visible(tokens, pool, eos)

    def _foreign_view(self) -> Any:
        """The tower as open_clip's own code can run it."""
        projection = self.text_projection
        return self if projection is None else _view(self, "text_projection", _Called(projection))

    def _mask(self, length: int) -> Tensor | str | None:
        if self.qclip_causal:
            return CAUSAL
        return None if self.attn_mask is None else self.attn_mask[..., :length, :length]


class ExplicitFlatText(ExplicitText):
    """CLIP, whose text tower is spread over the model itself."""

    def _pooling(self) -> tuple[str, int | None]:
        return self.text_pool_type, getattr(self, "text_eos_id", None)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        children = (self.token_embedding, self.transformer, self.ln_final, self.text_projection)
        below = [child for child in children if isinstance(child, nn.Module)]
        x = replay.run(self, self._encode_text, self.visible_tokens(text), below=below)
        return F.normalize(x, dim=-1) if normalize else x

    def _encode_text(self, text: Tensor) -> Tensor:
        check_length(text, len(self.positional_embedding))
        cast_dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(cast_dtype)
        x = x + self.positional_embedding[: text.shape[1]].to(cast_dtype)
        x = self.transformer(x, attn_mask=self._mask(text.shape[1]))
        x = self.ln_final(x)
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=getattr(self, "text_eos_id", None))
        return x if self.text_projection is None else self.text_projection(x)

    def forward_intermediates(self, *args: object, **kwargs: object) -> dict:
        return super(ExplicitFlatText, self._foreign_view()).forward_intermediates(*args, **kwargs)


class ExplicitTextTransformer(ExplicitText):
    """open_clip's TextTransformer (CustomTextCLIP, CoCa) with its projection as a linear module."""

    def _pooling(self) -> tuple[str, int | None]:
        return self.pool_type, getattr(self, "eos_id", None)

    def visible_tokens(self, tokens: Tensor) -> Tensor:
        if self.cls_emb is not None or self.output_tokens or getattr(self, "use_pad_mask", False):
            return tokens
        return super().visible_tokens(tokens)

    def forward(self, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return replay.run(self, self._encode, self.visible_tokens(text))

    def _encode(self, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        check_length(text, len(self.positional_embedding) - (self.cls_emb is not None))
        x, mask = self._embeds(text)
        if self.cls_emb is None and not getattr(self, "use_pad_mask", False):
            mask = self._mask(text.shape[1])
        x = self.transformer(x, attn_mask=mask)
        if self.cls_emb is not None:  # CoCa: the class token comes last and is pooled
            pooled, tokens = self.ln_final(x[:, -1]), x[:, :-1]
        else:
            tokens = self.ln_final(x)
            pooled = text_global_pool(tokens, text, self.pool_type, eos_token_id=getattr(self, "eos_id", None))
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return (pooled, tokens) if self.output_tokens else pooled

    def forward_intermediates(self, *args: object, **kwargs: object) -> dict:
        return super(ExplicitTextTransformer, self._foreign_view()).forward_intermediates(*args, **kwargs)


class _Called(nn.Linear):
    """Any module as an nn.Linear: open_clip calls a projection as a module only where it is of that class."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class FlatText(nn.Module):
    """The text tower of a flat CLIP seen as one module. It owns nothing: what is replaced there is replaced here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["clip"] = model  # not a child: the tower is a part of the model, not the other way round
        self.register_parameter("positional_embedding", model.positional_embedding)

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True):  # noqa: ANN201
        memo = set() if memo is None else memo
        yield prefix, self
        for name in ("token_embedding", "transformer", "ln_final", "text_projection"):
            child = getattr(self.clip, name)
            if isinstance(child, nn.Module):
                yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens)


def text_tower(text: Any) -> Tower:
    """A TextTransformer, or a CLIP for its flat text tower, in explicit form, in place."""
    flat = not isinstance(text, TextTransformer)
    _explicit_transformer(text.transformer)
    if isinstance(text.text_projection, nn.Parameter):
        weight = text.text_projection
        del text.text_projection
        text.text_projection = projection(weight, text.training)
    if not isinstance(text, ExplicitText):
        text.qclip_causal = _is_triangular(getattr(text, "attn_mask", None))
        become(text, ExplicitFlatText if flat else ExplicitTextTransformer)
    length = text.positional_embedding.shape[0]
    blocks = _blocks("text", text.transformer, length)
    sites = by_name(
        embedding_site(text, "token_embedding", text.context_length),
        *(list(b.sites.values()) for b in blocks),
        projection_site("text", text, "text_projection"),
    )
    return Tower("text", FlatText(text) if flat else text, blocks, sites, length, text)


def _is_triangular(mask: Tensor | None) -> bool:
    """Whether `mask` is open_clip's own causal mask. A mask without memory is: nothing else has been built there."""
    if mask is None:
        return False
    if mask.is_meta:
        return True
    return torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))
