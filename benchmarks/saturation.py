"""A model whose INT8 products are computed as `vpmaddubsw` computes them: pairs of products saturate at 16 bits.

oneDNN's INT8 layers do that on processors with AVX2 and without VNNI (tests/kernels/test_exact_on_every_tier.py shows
it): codes of x are shifted by 128 to unsigned, two neighbours along k are multiplied by signed weights and added in
int16, where 255 * (|w0| + |w1|) can exceed 32,767; the shift is taken back at the end. Here the exact sum is computed
and the excess of every pair that can saturate is taken off: the same integers, on any processor.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import qkernels
from qclip import models
from qclip.layers.linear import Int8Linear

LOW, HIGH = -(2**15), 2**15 - 1
PAIRS = 256  # that may saturate, at a time


def excess(codes: Tensor, weight: Tensor) -> Tensor:
    """What saturation adds to `codes . weight^T`: int8 `[M, K]`, int8 `[N, K]` -> float64 `[M, N]`, whole numbers."""
    if codes.shape[1] % 2:
        codes, weight = (nn.functional.pad(each, (0, 1)) for each in (codes, weight))
    pairs = weight.int().view(len(weight), -1, 2)
    pair_first = pairs.transpose(0, 1).contiguous()
    places, rows = torch.nonzero(255 * pair_first.abs().sum(-1) > HIGH, as_tuple=True)
    shifted = (codes.float() + 128).t().contiguous().view(-1, 2, len(codes))  # [pairs, 2, M]
    out = torch.zeros(len(weight), len(codes))  # below 2^24: whole in float32
    for start in range(0, len(rows), PAIRS):
        n, p = rows[start : start + PAIRS], places[start : start + PAIRS]
        w = pair_first[p, n].float()
        sums = shifted[p, 0].mul_(w[:, 0, None]).addcmul_(shifted[p, 1], w[:, 1, None])
        out.index_add_(0, n, sums.clamp(LOW, HIGH).sub_(sums))
    return out.t().double()


class PairSums(nn.Module):
    """An INT8 layer in float64: the sums of the kernels, or those that saturate."""

    def __init__(self, layer: Int8Linear, saturate: bool) -> None:
        super().__init__()
        whole = layer.quantized.canonical()
        self.saturate = saturate
        self.register_buffer("codes", whole.codes)
        self.register_buffer("scales", whole.scales)
        self.register_buffer("weight", whole.dequantize())  # for those who ask a layer for its shape
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().double())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        codes, scale = qkernels.quantize_per_token(x.reshape(-1, x.shape[-1]).float().contiguous())
        sums = codes.double() @ self.codes.double().t()
        if self.saturate:
            sums += excess(codes, self.codes)
        y = sums * scale.double()[:, None] * self.scales.double()
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def with_pair_sums(model: nn.Module, quantized: nn.Module, saturate: bool) -> nn.Module:
    """A copy of the float `model` whose linear sites multiply as `quantized`'s INT8 layers (of `w8a8`) do, with sums
    that saturate or not. Patches and embeddings stay float."""
    mixed = copy.deepcopy(model)
    layers = {site.name: site.module for tower in models.towers(quantized).values() for site in tower}
    for tower in models.towers(mixed).values():
        for site in tower:
            layer = layers[site.name]
            if type(layer) is Int8Linear:
                tower.write(site, PairSums(layer, saturate))
    return mixed.eval()
