"""The same bits on every CPU tier: codes, scales and integer products, also where a kernel of saturating pairs
(`vpmaddubsw`: two products of unsigned and signed bytes in 16 bits) would be wrong."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

import qkernels
from qkernels import Int4Weight, Int8Weight
from tests.kernels.tiers import TIERS, force

N, K = 130, 394


def inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a weight. "largest": each pair of products is 2 * 127 * 127, and shifted by 128 twice that."""
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randn(9, K, generator=generator), torch.randn(N, K, generator=generator)
    sign = torch.randint(0, 2, (N, 1), generator=generator) * 2.0 - 1
    return torch.ones(9, K) * torch.tensor([1.0, -1.0, 1.0]).repeat(3)[:, None], sign.expand(N, K).contiguous()


def results(kind: str) -> list[torch.Tensor]:
    x, w = inputs(kind)
    int8, int4 = Int8Weight.quantize(w), Int4Weight.quantize(w, group=32)
    unit = Int8Weight(int8.codes, torch.ones(N), (N, K))
    codes, scales = qkernels.quantize_per_token(x)
    static, _ = qkernels.quantize_per_token(x, scale=0.02, zero_point=3)
    patches = qkernels.quantize_patches(x[:, :392].reshape(9, 2, 14, 14), 7)
    sums = qkernels.int8_linear(codes, 1.0, qkernels.pack(unit))
    exact = codes.double() @ int8.codes.double().t()  # sums of int8 products are whole in float64
    assert torch.equal(sums.double(), exact.float().double())
    if kind == "largest":
        assert sums.abs().min() == 127 * 127 * K
    return [
        *(codes, scales, static, *patches, sums),
        qkernels.int8_linear(codes, scales, qkernels.pack(int8), w[:, 0].contiguous()),
        qkernels.int8_linear(codes, scales, qkernels.pack(int8), out_scale=0.1, out_zero_point=2),
        *qkernels.int8_linear(codes, scales, qkernels.pack(int8), out_group=128),
        qkernels.int4_linear(codes, scales, qkernels.pack(int4)),
    ]


@pytest.mark.parametrize("kind", ["random", "largest"])
@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier != "scalar"])
def test_codes_and_integer_products_have_the_same_bits(tier: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "scalar")
    scalar = results(kind)
    force(monkeypatch, tier)
    for number, (ours, theirs) in enumerate(zip(results(kind), scalar, strict=True)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), f"result {number}"


SATURATING = """
import torch
import qkernels
if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
    raise SystemExit("this torch has no onednn.qlinear_pointwise")
m, n, k = 25, 64, 256
codes, weight = torch.full((m, k), 127, dtype=torch.int8), torch.full((n, k), 127, dtype=torch.int8)
packed = torch.ops.onednn.qlinear_prepack(weight, [m, k])
zeros = torch.zeros(n, dtype=torch.int64)
y = torch.ops.onednn.qlinear_pointwise(
    codes.view(torch.uint8) ^ 128, 1.0, 128, packed, torch.ones(n), zeros, None, 1.0, 0, torch.float32, "none", [], ""
)
ours = qkernels.int8_linear(codes, torch.ones(()), qkernels.pack(qkernels.Int8Weight(weight, torch.ones(n), (n, k))))
print(float(y.min()), float(ours.min()), float(ours.max()), 127 * 127 * k)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_onednn_saturates_with_avx2_and_ours_does_not() -> None:
    """What the README says of another engine: the sum of largest codes is not the exact one there. Here it is."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "QKERNELS_CPU_TIER": "avx2"}
    done = subprocess.run([sys.executable, "-c", SATURATING], env=environment, capture_output=True, text=True)
    if "this torch has no" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    theirs, least, most, exact = map(float, done.stdout.split())
    assert theirs < exact / 2
    assert least == most == exact
