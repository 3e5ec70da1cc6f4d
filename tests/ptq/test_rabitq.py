"""RaBitQ codes: the best of all codes, products that are unbiased over rotations, the errors that are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qclip.layers import RandomHadamard
from qclip.ptq import rabitq
from qkernels import Int4Weight, Int8Weight


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(weight: Tensor, codes: Tensor, bits: int) -> Tensor:
    y = codes.double() - (2**bits - 1) / 2
    return torch.nn.functional.cosine_similarity(weight.double(), y, dim=-1)


@pytest.mark.parametrize(("bits", "width"), [(1, 6), (2, 5), (2, 6), (3, 4), (4, 3)])
def test_codes_point_as_near_as_brute_force(bits: int, width: int) -> None:
    weight = drawn(30, width)
    weight[0], weight[1, 0], weight[2] = weight[0].sign(), 0.0, torch.full((width,), 1e-20)  # ties, zeros, small ones
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=width)))
    best = torch.stack([cosine(row[None], every, bits).max() for row in weight])
    assert torch.allclose(cosine(weight, rabitq.codes(weight, bits), bits), best, atol=1e-12)


def test_a_row_may_be_best_with_one_magnitude() -> None:
    """The start state, or the end state, which points the same way: a sweep from somewhere in between misses both."""
    spread = torch.tensor([[1.0, 0.7, 0.72, 0.74, 0.7, -0.73, 0.71, 0.69]])  # whose first steps make it worse
    for weight in (torch.ones(1, 9), spread):
        assert len((2 * rabitq.codes(weight, 2).int() - 3).abs().unique()) == 1


@pytest.mark.parametrize("bits", range(1, 8))
def test_errors_are_those_of_the_table(bits: int) -> None:
    weight = drawn(20, 3000)
    for rule in rabitq.SCALE_RULES:
        found, grid = rabitq.quantize(weight, bits, rule)
        error = (found.dequantize() - weight).square().sum(1) / weight.square().sum(1)
        # At many bits a row of finite length has a largest value: the grid is finer than for an endless Gaussian.
        assert float(error.mean()) == pytest.approx(rabitq.relative_error(bits, rule), rel=0.02 if bits < 5 else 0.2)
        assert (grid.bits, grid.kind, grid.group) == (bits, "midrise", None)
        assert isinstance(found, Int4Weight if bits == 4 else Int8Weight)
        if isinstance(found, Int8Weight):  # odd integers
            assert (found.codes % 2).abs().min() == 1 and found.codes.abs().max() <= 2**bits - 1


def test_least_squares_has_the_smaller_error_and_unbiased_keeps_the_product() -> None:
    weight = drawn(40, 256)
    for bits in (1, 2, 4):
        square = rabitq.quantize(weight, bits, "least-squares")[0].dequantize()
        plain = rabitq.quantize(weight, bits, "unbiased")[0].dequantize()
        least = (square - weight).square().sum(1)
        assert (least < (plain - weight).square().sum(1)).all()
        for factor in (0.98, 1.02):  # the minimum over scales
            assert (least < (factor * square - weight).square().sum(1)).all()
        # Along the weight itself nothing is lost; float16 holds the scales of 4 bits.
        along = (plain * weight).sum(1) / weight.square().sum(1)
        assert torch.allclose(along, torch.ones(40), atol=1e-3 if bits == 4 else 1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_inner_product_is_unbiased_over_rotations(bits: int) -> None:
    """Least squares shrinks it by the squared cosine, 1 - SINE2."""
    count, width, generator = 600, 32, torch.Generator().manual_seed(0)
    w, x = drawn(1, width, seed=1), drawn(1, width, seed=2)
    x = x + 2 * w  # so that the bias of least squares is seen
    rotations, _ = torch.linalg.qr(torch.randn(count, width, width, generator=generator))
    turned_w, turned_x = (rotations @ w[0]), (rotations @ x[0])
    want = float(w[0] @ x[0])
    for rule, factor in (("unbiased", 1.0), ("least-squares", 1 - rabitq.SINE2[bits])):
        found = (rabitq.quantize(turned_w, bits, rule)[0].dequantize() * turned_x).sum(1)
        error = float(found.std()) / count**0.5
        # SINE2 is that of many dimensions; in 32 the squared cosine is larger, by 0.01 at most.
        assert abs(float(found.mean()) - want * factor) < 4 * error + (rule == "least-squares") * 0.01 * want
    assert abs(float(found.mean()) - want) > 4 * error  # the bias of least squares is seen


@pytest.mark.parametrize("width", [1536, 1000])
def test_random_hadamard_rotations_make_any_weight_a_gaussian_one(width: int) -> None:
    """Rows that are mostly zeros, of which the grid has none; rotated, they err as the table says."""
    weight = torch.zeros(100, width).scatter_(1, torch.randint(0, width, (100, 24)), drawn(100, 24))
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, RandomHadamard.shape(width), generator=generator, dtype=torch.int8) * 2 - 1
    turned = RandomHadamard(signs).weight(weight)

    def error(w: Tensor) -> float:
        return float((rabitq.quantize(w, 3)[0].dequantize() - w).square().sum() / w.square().sum())

    assert 0.8 < error(turned) / rabitq.relative_error(3) < 1.05
    assert error(weight) > 2 * error(turned)


def test_rows_of_zeros_and_of_extreme_size() -> None:
    weight = drawn(4, 64)
    weight[0], weight[1], weight[2] = 0.0, weight[1] * 1e-25, weight[2] * 1e25
    for bits in (1, 2, 5):
        found, small = (rabitq.quantize(each, bits)[0].dequantize() for each in (weight, drawn(4, 64)[1:3]))
        assert found[0].abs().max() < 1e-28 and found.isfinite().all()
        assert torch.allclose(found[1:3] / found[1:3].abs().amax(1, True), small / small.abs().amax(1, True))
    assert rabitq.quantize(torch.zeros(2, 64), 4)[0].dequantize().abs().max() < 1e-3
    with pytest.raises(ValueError, match="float16"):
        rabitq.quantize(weight, 4)


def test_bits_beyond_seven_are_refused() -> None:
    for bits in (0, 8):
        with pytest.raises(ValueError, match="1 to 7 bits here, not"):
            rabitq.codes(drawn(2, 8), bits)
