"""timm's VisionTransformer (CLIP, SigLIP) and ConvNeXt, alone or inside open_clip's TimmModel."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolLatent, GlobalResponseNormMlp
from timm.layers import Mlp as TimmMlp
from timm.layers.attention import Attention as TimmAttention
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import replay
from .explicit import (
    Form,
    activation_name,
    affine,
    attention_sites,
    become,
    by_name,
    linear,
    mlp_sites,
    no_dropout,
    patch_site,
    present,
    projection_site,
    split,
    succeed,
    transformer_block,
    unsupported,
)
from .family import Family
from .tower import Attention, Block, Mlp, Site, Tower, normed
from .value_path import ValuePath, undefined


class ExplicitBlock(Form):
    """timm's pre-norm block with the explicit cores."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        y = normed(self.norm1, self.attn, x, mask=attn_mask, causal=is_causal)
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(normed(self.norm2, self.mlp, x)))


class ExplicitLatentPool(Form):
    """timm's attention pool with a latent query; `attn` is the core, `mlp` the residual MLP behind it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        x = self.proj_drop(self.attn(x, mask=attn_mask, query=self.latent.expand(x.shape[0], -1, -1)))
        if self.mlp is not None:
            x = x + normed(self.norm, self.mlp, x)
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


class ExplicitConvBlock(Form):
    """A ConvNeXt block whose MLP is the explicit core, on `[B, H, W, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x)
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y).permute(0, 2, 3, 1))
        else:
            y = normed(self.norm, self.mlp, y.permute(0, 2, 3, 1))
        y = y.permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(y) + self.shortcut(x)


class ExplicitTower(Form):
    """A timm model, or open_clip's TimmModel around one."""

    WRAPS = frozenset({"forward"})

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        whole = super().forward  # type: ignore[misc]
        if args or kwargs:
            return whole(x, *args, **kwargs)
        return replay.run(self, whole, x)


def _attention(attention: Any) -> Attention:
    if type(attention) is not TimmAttention:
        raise unsupported(attention)
    if getattr(attention, "gate", None) is not None:
        raise unsupported(attention, "gated attention")
    no_dropout(attention, attention.attn_drop.p, attention.proj_drop.p)
    q, k, v = split(attention.qkv.weight, attention.qkv.bias, 3, attention.qkv.weight)
    core = Attention(
        q,
        k,
        v,
        attention.proj,
        attention.num_heads,
        q_norm=present(attention.q_norm),
        k_norm=present(attention.k_norm),
        inner_norm=present(getattr(attention, "norm", None)),
    )
    return succeed(attention, core, positional=True)


def _mlp(mlp: Any) -> Mlp:
    if isinstance(mlp, Mlp):
        return mlp
    if type(mlp) is TimmMlp:
        inner = present(mlp.norm)
    elif type(mlp) is GlobalResponseNormMlp and isinstance(mlp.fc1, nn.Linear):
        inner = mlp.grn
    else:
        raise unsupported(mlp)
    no_dropout(mlp, mlp.drop1.p, mlp.drop2.p)
    fc1, fc2 = (
        fc if isinstance(fc, nn.Linear) else linear(fc.weight.flatten(1), fc.bias, fc.weight)
        for fc in (mlp.fc1, mlp.fc2)
    )
    return succeed(mlp, Mlp(fc1, fc2, activation_name(mlp.act), inner))


def tower(visual: Any) -> Tower:
    """The tower of a timm model, or of open_clip's TimmModel around one, in explicit form, in place."""
    trunk = getattr(visual, "trunk", visual)
    if isinstance(trunk, VisionTransformer):
        blocks, sites, tokens = _vit(trunk)
    elif isinstance(trunk, ConvNeXt):
        side = _image_side(visual, trunk)
        blocks, sites, tokens = _convnext(trunk, side)
    else:
        raise unsupported(trunk)
    sites += _head(visual, trunk)
    become(visual, ExplicitTower)
    return Tower("vision", visual, blocks, by_name(sites), tokens)


def _image_side(visual: Any, trunk: Any) -> int:
    size = getattr(visual, "image_size", None) or trunk.pretrained_cfg["input_size"][1:]
    return int(size[0])


def _vit(trunk: Any) -> tuple[list[Block], list[Site], int]:
    for block in trunk.blocks:
        if isinstance(block, ExplicitBlock):
            continue
        if type(block) is not TimmBlock:
            raise unsupported(block)
        block.attn, block.mlp = _attention(block.attn), _mlp(block.mlp)
        become(block, ExplicitBlock)
    patches = trunk.patch_embed.num_patches
    tokens = patches + trunk.num_prefix_tokens
    blocks = [
        transformer_block(f"vision.blocks.{i}", b, (b, "attn"), (b, "norm1"), (b, "mlp"), (b, "norm2"), tokens)
        for i, b in enumerate(trunk.blocks)
    ]
    sites: list[Site] = []
    if _is_patch(getattr(trunk.patch_embed, "proj", None)):
        sites += patch_site("vision", trunk.patch_embed, "proj", patches)
    pool = getattr(trunk, "attn_pool", None)
    if pool is not None:
        blocks.append(_latent_pool(pool, trunk.norm, tokens if trunk.pool_include_prefix else patches))
    for block in blocks:
        sites += block.sites.values()
    return blocks, sites, tokens


def _is_patch(conv: nn.Module | None) -> bool:
    """A patch embedding: not taking part in the tower's own form, so any module that is written there counts. Behind a
    convolutional stem (MobileCLIP-B) there is none, and the stem stays as it is."""
    return present(conv) is not None and (not isinstance(conv, nn.Conv2d) or conv.kernel_size == conv.stride)


def _latent_pool(pool: Any, norm: nn.Module, rows: int) -> Block:
    if not isinstance(pool, ExplicitLatentPool):
        if type(pool) is not AttentionPoolLatent:
            raise unsupported(pool)
        mlp = None if pool.mlp is None else _mlp(pool.mlp)
        k, v = split(pool.kv.weight, pool.kv.bias, 2, pool.kv.weight)
        pool.attn = Attention(
            pool.q, k, v, pool.proj, pool.num_heads, q_norm=present(pool.q_norm), k_norm=present(pool.k_norm)
        ).train(pool.training)
        del pool.q, pool.kv, pool.proj, pool.q_norm, pool.k_norm
        pool.mlp = mlp
        become(pool, ExplicitLatentPool)
    # The trunk's last norm feeds keys and values, but stands outside: nothing to move into the core.
    queries = pool.latent_len
    sites = attention_sites("vision.pool", pool.attn, None, rows, "pool_", queries)
    if pool.pos_embed is None and affine(norm):
        sites = {kind: _smoothable(site) if kind in ("pool_k", "pool_v") else site for kind, site in sites.items()}
    place = None
    if pool.mlp is not None:
        place = (pool, "norm") if present(pool.norm) is not None else None
        sites |= mlp_sites("vision.pool.mlp", pool.mlp, place, queries)
    return Block("vision.pool", pool, (pool, "attn"), None, None if pool.mlp is None else (pool, "mlp"), place, sites)


def _smoothable(site: Site) -> Site:
    return Site(site.name, site.kind, site.feed, site.shared, site.owner, site.attribute, True, site.rows)


def _convnext(trunk: Any, side: int) -> tuple[list[Block], list[Site], int]:
    stem, sites = trunk.stem[0], []
    side //= 4 if len(trunk.stem) > 2 else _stride(stem)
    tokens = side * side
    if len(trunk.stem) == 2:  # the patch stem; the others are overlapping convolutions and stay as they are
        sites += patch_site("vision", trunk.stem, "0", tokens)
    blocks: list[Block] = []
    for stage in trunk.stages:
        down = {}
        if isinstance(stage.downsample, nn.Sequential):
            side //= _stride(stage.downsample[1])
            name = f"vision.blocks.{len(blocks)}.downsample"
            smooth = affine(stage.downsample[0])
            down = {
                "downsample": Site(name, "downsample", "norm", f"{name}.in", stage.downsample, "1", smooth, side * side)
            }
        for block in stage.blocks:
            name = f"vision.blocks.{len(blocks)}"
            if not isinstance(block, ExplicitConvBlock):
                if type(block) is not ConvNeXtBlock:
                    raise unsupported(block)
                block.mlp = _mlp(block.mlp)
                become(block, ExplicitConvBlock)
            # With 1x1 convolutions the norm runs on [B, C, H, W], so that it cannot move into the core.
            norm = None if block.use_conv_mlp else (block, "norm")
            found = down | mlp_sites(
                f"{name}.mlp", block.mlp, norm, side * side, affine(block.norm) if block.use_conv_mlp else None
            )
            blocks.append(Block(name, block, None, None, (block, "mlp"), norm, found))
            sites += found.values()
            down = {}
    return blocks, sites, tokens


def _stride(module: Any) -> int:
    """Of a convolution, or of what was written in its place."""
    stride = getattr(module, "stride", None) or module.patch
    return stride[0] if isinstance(stride, tuple) else stride


def _head(visual: Any, trunk: Any) -> list[Site]:
    """The map into the joint space: TimmModel's own head, or the trunk's classifier where that serves as one."""
    head = getattr(visual, "head", None)
    if visual is not trunk and isinstance(head, nn.Sequential):
        if hasattr(head, "pool"):
            raise unsupported(head.pool, "attention pooling over a feature map")
        if hasattr(head, "mlp"):
            head.mlp = _mlp(head.mlp)
            return list(mlp_sites("vision.projection", head.mlp, None, 1).values())
        if hasattr(head, "proj"):
            return projection_site("vision", head, "proj")
    classifier = trunk.head
    owner, attribute = (classifier, "fc") if hasattr(classifier, "fc") else (trunk, "head")
    return projection_site("vision", owner, attribute)


def value_path(visual: Any, tower: Tower) -> ValuePath:
    """Of a VisionTransformer that pools its class token. Raises ModelError."""
    trunk = getattr(visual, "trunk", visual)
    if not isinstance(trunk, VisionTransformer) or trunk.global_pool != "token" or trunk.num_prefix_tokens < 1:
        raise undefined(trunk, "it does not pool a class token")
    block: Any = tower.blocks[-1].module

    def tail(x: Tensor) -> Tensor:
        x = trunk.head(trunk.fc_norm(trunk.norm(x)))
        return x if visual is trunk else visual.head(x)  # type: ignore[no-any-return]

    return ValuePath.of(
        tower.blocks[-1],
        tail,
        behind_attention=(block.ls1,),
        behind_mlp=(block.ls2,),
        prefix=trunk.num_prefix_tokens,
    )


class Timm(Family):
    """VisionTransformer and ConvNeXt by themselves: a vision tower to be looked at (sites, spectra). Without a text
    encoder and a logit scale they are not quantized."""

    name = "timm"

    def owns(self, model: nn.Module) -> bool:
        return hasattr(model, "pretrained_cfg")  # every timm model has it

    def towers(self, model: Any) -> dict[str, Tower]:
        return {"vision": tower(model)}


FAMILY = Timm()
