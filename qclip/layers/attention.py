"""Attention whose projections share one quantized input and whose output leaves quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qkernels

from ..models.hooks import watched
from ..models.tower import Attention
from .gradients import refuse_gradients
from .linear import QuantizedLinear, behind, fusable, join, products, takes_codes


class QuantizedAttention(Attention):
    """The explicit attention core, fused where its sites allow it.

    q, k and v read one quantized input (after `norm`, in one pass with it), and `out` reads codes that the attention
    kernel wrote. Sites that cannot take part (float, simulated, W4A16) make it run like the float core, site by site;
    quantized `operands` of its products run in float arithmetic.
    """

    shares_input: bool
    shares_pool_input: bool
    codes_out: bool

    @classmethod
    def fuse(cls, core: Attention) -> QuantizedAttention:
        """Turn a core whose sites have been written into this class, in place: whoever holds it goes on holding it."""
        core.__class__ = cls
        q, k, v, out = core.q, core.k, core.v, core.out
        core.shares_input = takes_codes(q) and q.same_input(k) and q.same_input(v)  # type: ignore[operator, assignment]
        core.shares_pool_input = takes_codes(k) and k.same_input(v)  # type: ignore[operator, assignment]
        core.codes_out = isinstance(out, QuantizedLinear) and out.takes_plain_codes() and core.inner_norm is None
        return core  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("q", "k", "v", "out", "inner_norm"):  # somebody puts another layer in
            self.fuse(self)

    def join(self) -> None:
        """Make one product of q, k and v, or of k and v, where they share their input and the backend allows it."""
        if self.shares_input:
            join((self.q, self.k, self.v))
        elif self.shares_pool_input:
            join((self.k, self.v))

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantizedAttention:
        super()._apply(fn, recurse)  # packs the sites anew, each by itself
        self.join()
        return self

    def unfuse(self) -> None:
        self.__class__ = Attention  # type: ignore[assignment]

    def fuses(self, norm: nn.Module) -> bool:
        """Whether `forward` can take `norm` and run it in one pass with the quantization."""
        return self.shares_input and not watched(self.q, self.k, self.v, self.out) and fusable(norm)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        query: Tensor | None = None,
        rope: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        return refuse_gradients(self._forward(x, mask, causal, query, rope, norm), x, query, self, norm)

    def _forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        causal: bool,
        query: Tensor | None,
        rope: Tensor | None,
        norm: nn.LayerNorm | None,
    ) -> Tensor:
        one_by_one = watched(self.q, self.k, self.v, self.out)
        if query is None and self.shares_input and not one_by_one:
            codes, scale = self.q.quantize(x, norm)  # type: ignore[operator]
            dtype = self._product_dtype(x)
            q, k, v = products((self.q, self.k, self.v), codes, scale, dtype)
        else:
            q = self.q(x if query is None else query)
            if self.shares_pool_input and not one_by_one:
                codes, scale = self.k.quantize(x)  # type: ignore[operator]
                k, v = products((self.k, self.v), codes, scale)
            else:
                k, v = self.k(x), self.v(x)
        q, k, v = self._placed(q, k, v, rope)
        if not self.codes_out or one_by_one or self.operands is not None:
            if self.operands is not None:
                y = self.operands(q, k, v, mask, causal, self.scale).flatten(-2)
            else:
                y = qkernels.attention(q, k, v, mask, causal=causal, scale=self.scale).flatten(-2)
            return behind(self.inner_norm, self.out, y)
        static = self.out.input_scale
        if static is None:
            y, scale = qkernels.attention(q, k, v, mask, causal=causal, scale=self.scale, out_dynamic=True)
        else:
            y, scale = qkernels.attention(q, k, v, mask, causal=causal, scale=self.scale, out_scale=static), static
        return self.out.linear(y.flatten(-2), scale)  # type: ignore[operator, no-any-return]

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of q, k and v. Where the output leaves as codes, one may be faster than the compute dtype."""
        dtype: torch.dtype = self.q.witness.dtype  # type: ignore[assignment, union-attr]
        if (
            self.keeps_dtype
            or not self.codes_out
            or not all(each is None for each in (self.q_norm, self.k_norm, self.operands))
        ):
            return dtype
        return qkernels.attention_dtype(x.device, dtype)
