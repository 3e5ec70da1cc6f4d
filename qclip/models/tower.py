"""What every other part sees of a model: towers, blocks and sites.

A *site* is one linear map of a tower (`vision.blocks.3.attn.q`). An adapter of this package brings a foreign
model into *explicit form* in place - every site a module of its own, attention and MLP as the two cores below - and
describes it as `Tower`s. The float numbers do not change. Whoever replaces a layer calls `Tower.write`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import replay
from .hooks import carry, watched

KINDS = (
    "patch",
    "q",
    "k",
    "v",
    "out",
    "gate",
    "fc1",
    "fc2",
    "projection",
    "pool_q",
    "pool_k",
    "pool_v",
    "pool_out",
    "downsample",
    "embedding",
)
FEEDS = ("norm", "attention", "activation", "raw")
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")  # kernels have them in the epilogue of a product
UNFUSED = ("silu", "relu")  # run in torch, between kernels


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Activations in torch; the names of those that the kernels know are those of `qkernels.int8_linear`."""
    if activation is None:
        return x
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    raise ValueError(f"unknown activation {activation!r}; known: {', '.join((*ACTIVATIONS, *UNFUSED))}")


def _values(module: Any) -> Tensor:
    """The weight that a site computes with, `[N, ...]`: dequantized where it is held as codes."""
    dequantized = getattr(module, "dequantized_weight", None)
    return module.weight if dequantized is None else dequantized()  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """Turns queries and keys by angles that depend on their positions (RoPE, Su et al. 2104.09864). The first `prefix`
    tokens have no position and stay. Pairs are neighbouring channels, or, with `halves`, fellows in the two halves."""

    def __init__(self, prefix: int = 0, halves: bool = False) -> None:
        super().__init__()
        self.prefix, self.halves = prefix, halves

    def forward(self, q: Tensor, k: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """q, k `[B, L, H, d]`; rope `[L - prefix, 2 * d]`, or with heads, and batch, before: sines, then cosines of the
        angle of every channel. Computes in float32, or float64, and gives the dtype of q and k."""
        rope = rope.unsqueeze(-2) if rope.ndim == 2 else rope.transpose(-3, -2)
        sin, cos = rope.chunk(2, -1)
        if self.prefix:
            before = (0, 0, 0, 0, self.prefix, 0)  # of the third last dimension: tokens
            sin, cos = F.pad(sin, before), F.pad(cos, before, value=1.0)
        return self._turned(q, sin, cos), self._turned(k, sin, cos)

    def _turned(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        sin, cos = sin.to(wide.dtype), cos.to(wide.dtype)
        if self.halves:
            first, second = wide.chunk(2, -1)
            return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
        # Both channels of a pair have one angle: a product of complex numbers, in one pass over memory.
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * torch.complex(cos[..., ::2], sin[..., ::2])
        return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Explicit multi-head self attention: four linear sites, one softmax. Input and output `[B, L, D]`.

    `q_norm` and `k_norm` act on `[B, L, H, d]`, then `rotary`, where `rope` is given; `inner_norm` on the heads' joined
    output before `out`. In an attention pool the queries come from elsewhere: `query` of `forward`; keys and values
    always come from x.
    """

    def __init__(
        self,
        q: nn.Module,
        k: nn.Module,
        v: nn.Module,
        out: nn.Module,
        heads: int,
        scale: float | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        inner_norm: nn.Module | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = q, k, v, out
        self.heads, self.scale = heads, scale
        self.q_norm, self.k_norm, self.inner_norm, self.rotary = q_norm, k_norm, inner_norm, rotary
        # Runs instead of scaled_dot_product_attention: (q, k, v [B, L, H, d], mask, causal, scale) -> [B, L, H, d].
        self.operands: nn.Module | None = None
        # Whether q, k and v keep the compute dtype between quantized sites where the processor has a faster one.
        self.keeps_dtype = False

    @property
    def in_proj_weight(self) -> Tensor:
        """The packed `[3 * D, D]` of nn.MultiheadAttention, dequantized; a copy that refuses to be written to."""
        with torch.inference_mode():
            sites: tuple[Any, ...] = (self.q, self.k, self.v)
            return torch.cat([_values(site).to(site.weight.dtype) for site in sites])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """As `in_proj_weight`."""
        with torch.inference_mode():
            biases = [site.bias for site in (self.q, self.k, self.v)]
            return None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]

    @property
    def out_proj(self) -> nn.Module:
        return self.out

    def _placed(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention multiplies, `[B, L, H, d]`: heads apart, normed and turned."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rotary is not None and rope is not None:
            q, k = self.rotary(q, k, rope)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        query: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """`mask`: additive float or bool (True = may attend), broadcastable to `[B, H, Lq, Lk]`. `query`: input of q
        where it is not x (attention pools). `rope`: of `Rotary`."""
        source = x if query is None else query
        q, k, v = self._placed(self.q(source), self.k(x), self.v(x), rope)
        if self.operands is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)
            y = y.transpose(1, 2).flatten(2)
        else:
            y = self.operands(q, k, v, mask, causal, self.scale).flatten(2)
        if self.inner_norm is not None:
            y = self.inner_norm(y)
        return self.out(y)


class Mlp(nn.Module):
    """Explicit MLP: fc1, activation, (inner norm), fc2. Input and output `[..., D]`. With a `gate`, a second map of the
    input, the activation is the gate's, and its result is multiplied by fc1's (GLU, Shazeer 2002.05202)."""

    def __init__(
        self,
        fc1: nn.Module,
        fc2: nn.Module,
        activation: str,
        inner_norm: nn.Module | None = None,
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.fc1, self.fc2, self.activation = gate, fc1, fc2, activation
        self.inner_norm = inner_norm

    @property
    def c_fc(self) -> nn.Module:
        """open_clip's name for `fc1`: its `get_weight_dtype` reads `mlp.c_fc.weight.dtype`."""
        return self.fc1

    @property
    def c_proj(self) -> nn.Module:
        """open_clip's name for `fc2`."""
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            x = activate(self.fc1(x), self.activation)
        else:
            x = activate(self.gate(x), self.activation) * self.fc1(x)
        if self.inner_norm is not None:
            x = self.inner_norm(x)
        return self.fc2(x)


def fuse(norm: nn.Module, core: Any) -> bool:
    """Whether `core` takes `norm` as an argument and runs it in one pass with its quantization. Not where someone
    watches either of the two."""
    fuses = getattr(core, "fuses", None)
    return fuses is not None and not watched(norm, core) and bool(fuses(norm))


def normed(norm: nn.Module, core: Any, x: Tensor, **rest: Any) -> Tensor:
    """`core(norm(x), **rest)`, fused where that is possible."""
    return core(x, norm=norm, **rest) if fuse(norm, core) else core(norm(x), **rest)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Site:
    """One linear map of a tower, or a lookup (`kind="embedding"`)."""

    name: str  # "vision.blocks.3.attn.q", "vision.patch", "vision.projection", "text.embedding"
    kind: str  # one of KINDS
    feed: str  # one of FEEDS: what its input is
    shared: str  # sites of equal `shared` read the same input tensor ("vision.blocks.3.attn.in")
    owner: nn.Module = dataclasses.field(repr=False, compare=False)  # the module that holds it ...
    attribute: str = ""  # ... under this name
    smoothable: bool = True  # False where a scale cannot be moved into or out of its input
    rows: int = 1  # input rows per sample at the model's own resolution / context: MACs = rows * N * K (lookups: none)

    @property
    def module(self) -> nn.Module:
        return getattr(self.owner, self.attribute)

    @property
    def tower(self) -> str:
        return self.name.split(".", 1)[0]


@dataclasses.dataclass
class Block:
    """One residual block. The cores are `Attention` / `Mlp` (or their quantized successors) held by `owner.attribute`;
    `norm` names the module that feeds a core: (owner, attribute), or None where nothing does."""

    name: str  # "vision.blocks.3"
    module: nn.Module  # the foreign block: hooks on it keep working
    attention: tuple[nn.Module, str] | None  # getattr(*attention) is the core
    attention_norm: tuple[nn.Module, str] | None
    mlp: tuple[nn.Module, str] | None
    mlp_norm: tuple[nn.Module, str] | None
    sites: dict[str, Site]  # by kind: q k v out (gate) fc1 fc2 (downsample)
    pairs: int | None = None  # of a query and a key, for one sample; None: every token with every token of the tower


@dataclasses.dataclass
class Tower:
    """One encoder of a model, in explicit form."""

    name: str  # "vision" or "text"
    module: nn.Module  # what encodes: runs the whole tower
    blocks: list[Block]
    sites: dict[str, Site]  # by name, in the order in which they run
    tokens: int  # sequence length at the model's own resolution / context
    runner: nn.Module | None = None  # what `replay.run` is called with, where that is not `module`

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def use_programs(self, use: bool = True) -> None:
        """From now on the tower runs from recorded programs where nothing asks for its modules, or no longer."""
        (replay.enable if use else replay.disable)(self.module if self.runner is None else self.runner)

    def weight(self, site: Site) -> Tensor:
        """The float weight as `[N, K]` (a convolution's flattened over (C, kh, kw); an embedding's `[rows, width]`)."""
        weight: Tensor = site.module.weight  # type: ignore[assignment]
        return weight.detach().flatten(1)

    def bias(self, site: Site) -> Tensor | None:
        bias = getattr(site.module, "bias", None)
        return None if bias is None else bias.detach()

    def write(self, site: Site, module: nn.Module) -> nn.Module:
        """Put `module` in the site's place, with the forward hooks of what was there, and return that."""
        old = site.module
        carry(old, module)
        setattr(site.owner, site.attribute, module)
        return old
