"""What timm's towers are made of: attention, MLPs and attention pools as the explicit cores."""

from __future__ import annotations

import dataclasses
from typing import Any

from timm.layers import AttentionPoolLatent, GlobalResponseNormMlp, GluMlp, SwiGLU
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn

from .explicit import (
    Form,
    activation_name,
    affine,
    attention_sites,
    become,
    linear,
    mlp_sites,
    no_dropout,
    present,
    split,
    succeed,
    unsupported,
)
from .tower import Attention, Block, Mlp, Rotary, Site, normed


@dataclasses.dataclass
class Parts:
    """Of a trunk: its blocks, the sites outside of them that run before, and its sequence length."""

    blocks: list[Block]
    first: list[Site]
    tokens: int

    @property
    def sites(self) -> list[Site]:
        return [*self.first, *(site for block in self.blocks for site in block.sites.values())]


def attention(module: Any, known: tuple[type, ...], hooks: bool = True) -> Attention:
    """The core of one of timm's attention classes, of which `known` are expected here. `hooks`: the core is called with
    the same input, so that hooks on the module may go over."""
    if type(module) not in known:
        raise unsupported(module)
    if getattr(module, "gate", None) is not None:
        raise unsupported(module, "gated attention")
    if getattr(module, "num_kv_groups", 1) > 1:
        raise unsupported(module, "grouped-query attention")
    no_dropout(module, module.attn_drop.p, module.proj_drop.p)
    prefix = getattr(module, "num_prefix_tokens", None)
    q, k, v = _projections(module)
    core = Attention(
        q,
        k,
        v,
        module.proj,
        module.num_heads,
        q_norm=present(getattr(module, "q_norm", None)),
        k_norm=present(getattr(module, "k_norm", None)),
        inner_norm=present(getattr(module, "norm", None)),
        rotary=None if prefix is None else Rotary(prefix, getattr(module, "rotate_half", False)),
    )
    return succeed(module, core, positional=True) if hooks else core.train(module.training)  # type: ignore[no-any-return]


def _projections(module: Any) -> list[nn.Module]:
    """q, k and v: apart, or in one weight, whose biases may be apart (EVA: keys have none)."""
    if module.qkv is None:
        return [module.q_proj, module.k_proj, module.v_proj]
    weight = module.qkv.weight
    if getattr(module, "q_bias", None) is None:
        return list(split(weight, module.qkv.bias, 3, weight))
    biases = (module.q_bias, None, module.v_bias)
    return [linear(part, bias, weight) for part, bias in zip(weight.chunk(3), biases, strict=True)]


def mlp(module: Any) -> Mlp:
    """The core of one of timm's MLPs; a core stays."""
    if isinstance(module, Mlp):
        return module
    inner, gate = present(getattr(module, "norm", None)), None
    if type(module) is TimmMlp:
        fc1, fc2 = _flat(module.fc1), _flat(module.fc2)
    elif type(module) is GlobalResponseNormMlp and isinstance(module.fc1, nn.Linear):
        fc1, fc2, inner = module.fc1, module.fc2, module.grn
    elif type(module) is SwiGLU:
        gate, fc1, fc2 = module.fc1_g, module.fc1_x, module.fc2
    elif type(module) is GluMlp and isinstance(module.fc1, nn.Linear):
        first, second = split(module.fc1.weight, module.fc1.bias, 2, module.fc1.weight)
        gate, fc1 = (second, first) if module.gate_last else (first, second)
        fc2 = module.fc2
    else:
        raise unsupported(module)
    no_dropout(module, module.drop1.p, module.drop2.p)
    return succeed(module, Mlp(fc1, fc2, activation_name(module.act, gate is not None), inner, gate))  # type: ignore[no-any-return]


def _flat(layer: Any) -> nn.Module:
    """A 1x1 convolution as a linear layer."""
    return layer if isinstance(layer, nn.Linear) else linear(layer.weight.flatten(1), layer.bias, layer.weight)


def convolutional_mlp(module: Any) -> Mlp:
    """The core of fc1, fc2 and the activation of an MLP of 1x1 convolutions; it works on `[..., C]`."""
    for layer in (module.fc1, module.fc2):
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.groups != 1:
            raise unsupported(layer, "it is no 1x1 convolution")
    return Mlp(_flat(module.fc1), _flat(module.fc2), activation_name(module.act)).train(module.training)


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


def latent_pool(pool: Any, norm: nn.Module, rows: int) -> Block:
    """An attention pool behind the trunk's last `norm` as a block."""
    if not isinstance(pool, ExplicitLatentPool):
        if type(pool) is not AttentionPoolLatent:
            raise unsupported(pool)
        behind = None if pool.mlp is None else mlp(pool.mlp)
        k, v = split(pool.kv.weight, pool.kv.bias, 2, pool.kv.weight)
        pool.attn = Attention(
            pool.q, k, v, pool.proj, pool.num_heads, q_norm=present(pool.q_norm), k_norm=present(pool.k_norm)
        ).train(pool.training)
        del pool.q, pool.kv, pool.proj, pool.q_norm, pool.k_norm
        pool.mlp = behind
        become(pool, ExplicitLatentPool)
    # The trunk's last norm feeds keys and values, but stands outside: nothing to move into the core.
    queries = pool.latent_len
    sites = attention_sites("vision.pool", pool.attn, None, rows, "pool_", queries)
    if pool.pos_embed is None and affine(norm):
        sites = {
            kind: dataclasses.replace(site, smoothable=True) if kind in ("pool_k", "pool_v") else site
            for kind, site in sites.items()
        }
    place = None
    if pool.mlp is not None:
        place = (pool, "norm") if present(pool.norm) is not None else None
        sites |= mlp_sites("vision.pool.mlp", pool.mlp, place, queries)
    core, behind_it = (pool, "attn"), None if pool.mlp is None else (pool, "mlp")
    return Block("vision.pool", pool, core, None, behind_it, place, sites, queries * rows)
