"""The two products inside attention with quantized operands, in float arithmetic: q, k, v and the softmax's output."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..untrusted.schema import Check, flag, one_of, optional, record, whole
from .activations import ASYM, quantize_dequantize
from .fixed import Fixed
from .values import check_normal

SOFTMAX = ("uniform", "log-sqrt2", "twin")


def probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`softmax(q kT * scale + mask)`, float32 `[B, H, Lq, Lk]`, of q and k `[B, L, H, d]`; mask and scale as
    `models.tower.Attention` takes them."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def quantize_softmax(p: Tensor, kind: str, bits: int, scale: Tensor | float) -> Tensor:
    """Probabilities on the codes of `bits` bits.

    "uniform": whole multiples of `scale`, up to 2^bits - 1 of them. "log-sqrt2" (RepQ-ViT, arXiv 2212.08254): `scale *
    2^(-c/2)`, codes c from 0 on; what needs a code beyond 2^bits - 1 becomes 0. "twin" (PTQ4ViT, arXiv 2111.12293): one
    bit says the range; up to `scale`, a power of 1/2, a fine step, beyond it steps of 1 / (2^(bits-1) - 1). A value
    takes the range whose code is nearer: the published code adds both ranges up.
    """
    if kind == "uniform":
        return (p / scale).round().clamp(max=2**bits - 1) * scale
    if kind == "log-sqrt2":
        codes = (-2 * torch.log2(p / scale)).round().clamp(min=0)
        values = scale * torch.exp2(-torch.ceil(codes / 2)) * torch.where(codes % 2 == 1, 2**0.5, 1.0)
        return torch.where(codes < 2**bits, values, 0.0)
    steps = 2 ** (bits - 1) - 1
    fine, coarse = (p * (steps / scale)).round().clamp(max=steps) * (scale / steps), (p * steps).round() / steps
    return torch.where((p - fine).abs() <= (p - coarse).abs(), fine, coarse)


class AttentionOperands(Fixed):
    """What runs between the projections of an attention whose operands are quantized: q, k, v `[B, L, H, d]` -> the
    same shape, static scales per tensor or per head.

    Buffers: `q_scale` float32 `[1]` or `[H]`, `q_zero` int32 of that shape or None, the same for k and v, and
    `softmax_scale` float32 `[]`, which means what `quantize_softmax` says.
    """

    FIXED = ("q_scale", "q_zero", "k_scale", "k_zero", "v_scale", "v_zero", "softmax_scale")
    MOST_HEADS: ClassVar[int] = 1024
    softmax_scale: Tensor

    def __init__(
        self,
        bits: int,
        softmax: str,
        scales: tuple[Tensor, Tensor, Tensor],
        zeros: tuple[Tensor, Tensor, Tensor] | None,
        softmax_scale: Tensor,
    ) -> None:
        super().__init__()
        self.bits, self.softmax = bits, softmax
        for i, name in enumerate("qkv"):
            self.register_buffer(f"{name}_scale", scales[i])
            self.register_buffer(f"{name}_zero", None if zeros is None else zeros[i])
        self.register_buffer("softmax_scale", softmax_scale)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        p = probabilities(self._rounded("q", q), self._rounded("k", k), mask, causal, scale)
        p = quantize_softmax(p, self.softmax, self.bits, self.softmax_scale)
        return torch.einsum("bhqk,bkhd->bqhd", p, self._rounded("v", v)).to(v.dtype)

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        scale, zero = getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")
        return quantize_dequantize(x, self.bits, scale[:, None], None if zero is None else zero[:, None])

    def facts(self) -> dict[str, Any]:
        """What `from_facts` needs to make an empty one, as JSON."""
        heads = len(self.q_scale)  # type: ignore[arg-type]
        return {
            "bits": self.bits,
            "softmax": self.softmax,
            "heads": heads if heads > 1 else None,
            "zeros": self.q_zero is not None,
        }

    @classmethod
    def schema(cls) -> Check:
        """What `facts` may hold."""
        fields: dict[str, Check] = {
            "bits": whole(2, 8),
            "softmax": one_of(*SOFTMAX),
            "heads": optional(whole(1, cls.MOST_HEADS)),
            "zeros": flag,
        }
        return record(fields, tuple(fields))

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> AttentionOperands:
        """One of this form on the meta device."""
        with torch.device("meta"):
            scales = [torch.empty(facts["heads"] or 1) for _ in range(3)]
            zeros = tuple(each.to(torch.int32) for each in scales) if facts["zeros"] else None
            return cls(facts["bits"], facts["softmax"], tuple(scales), zeros, torch.empty(()))  # type: ignore[arg-type]

    def check_tensor(self, attribute: str, tensor: Tensor, what: str, turned: bool = False) -> None:
        """Raises ArtifactError for numbers that it cannot hold; `what` names the tensor."""
        if attribute.endswith("scale"):
            check_normal(tensor, what, positive=True)
            if attribute == "softmax_scale" and self.softmax == "twin" and not 0 < float(tensor) <= 1:
                raise ArtifactError(f"{what} is {float(tensor):g}; where the ranges of a twin meet lies within 0 and 1")
        elif not (-128 <= int(tensor.min()) and int(tensor.max()) <= 127):
            raise ArtifactError(f"{what} holds a zero point outside of -128 .. 127")

    def extra_repr(self) -> str:
        grid = ASYM if self.q_zero is not None else "sym"
        return f"bits={self.bits}, softmax={self.softmax!r}, grid={grid!r}, scales={len(self.q_scale)}"  # type: ignore[arg-type]
