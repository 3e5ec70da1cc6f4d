"""int8_linear with codes of fewer than 8 bits: on AVX2 kernels of their own multiply them, chosen by the largest
magnitude that the packed weight says; the result is the same as any other way."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels import Int8Weight
from qkernels.grids import Grid
from qkernels.weights import quantize_weight
from tests.kernels.fresh_memory import guarded
from tests.kernels.test_every_size import SIZES, moved
from tests.kernels.test_linear_rows import native_linear, spread
from tests.kernels.tiers import TIERS, force

LARGEST = [8, 16, 32, 64]  # the last magnitude of each kernel; behind it begins the next, behind 64 that of 8 bits
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=[tier for tier in TIERS if tier != "scalar"])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, request.param)
    return request.param


def narrow(largest: int, n: int, k: int, seed: int = 0) -> Int8Weight:
    """Codes -largest..largest, one in five an end."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest, largest + 1, (n, k), generator=generator)
    corner = torch.rand((n, k), generator=generator)
    codes = torch.where(corner < 0.1, -largest, torch.where(corner > 0.9, largest, codes))
    return Int8Weight(codes.to(torch.int8), torch.rand(n, generator=generator) + 0.5, (n, k))


def as_eight_bits(packed: Int8Weight) -> Int8Weight:
    """The same packed codes, said to need all 8 bits."""
    codes = packed.codes.clone()
    codes[-4:].view(torch.int32).fill_(127)
    return Int8Weight(codes, packed.scales, packed.shape, packed.layout)


@pytest.mark.slow
@pytest.mark.parametrize("largest", LARGEST)
def test_every_size(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "avx2")
    for m, n, k in SIZES:
        weight = narrow(largest, n, k, seed=k)
        unit = Int8Weight(weight.codes, torch.ones(n), (n, k)).pack("vnni64")
        x = narrow(127, m, k, seed=m).codes
        assert torch.equal(qkernels.int8_linear(x, 1.0, unit).long(), x.long() @ weight.codes.long().t()), (m, n, k)


@pytest.mark.parametrize("largest", [*LARGEST, *(each + 1 for each in LARGEST), 127])
def test_corners_do_not_saturate(tier: str, largest: int) -> None:
    """All of the largest by all of the largest, in all signs, whole and alternating; -128 too, which x may hold."""
    for k in (2, 129, 2100):
        x = torch.full((9, k), 127, dtype=torch.int8)
        x[1], x[2], x[3, ::2], x[4, k // 2 :], x[5, 1::2], x[6, 1::4] = -127, -128, -127, -127, -128, -127
        w = torch.full((5, k), largest, dtype=torch.int8)
        w[1], w[2, ::2], w[3, k // 3 :], w[4, 1::2] = -largest, -largest, -largest, -largest
        weight = qkernels.pack(Int8Weight(w, torch.ones(5), (5, k)))
        assert torch.equal(qkernels.int8_linear(x, 1.0, weight), (x.long() @ w.long().t()).float()), k


@pytest.mark.parametrize("lowest", [-9, -17, -33, -65, -127])
def test_the_largest_magnitude_may_be_a_negative_code_s(tier: str, lowest: int) -> None:
    x = torch.full((9, 40), 127, dtype=torch.int8)
    x[1], x[2, ::2] = -128, -127
    w = torch.full((3, 40), lowest, dtype=torch.int8)
    w[1], w[2, ::2] = 8, 8
    weight = qkernels.pack(Int8Weight(w, torch.ones(3), (3, 40)))
    assert torch.equal(qkernels.int8_linear(x, 1.0, weight), (x.long() @ w.long().t()).float())


@pytest.mark.parametrize("bits, kind", [(b, "sym") for b in range(2, 8) if b != 4] + [(5, "midrise"), (6, "midrise")])
def test_grids_of_fewer_bits(tier: str, bits: int, kind: str) -> None:
    """Odd codes of midrise grids take the kernel of a bit more."""
    weight = quantize_weight(torch.randn(70, 100, generator=torch.Generator().manual_seed(bits)), Grid(bits, kind))
    assert isinstance(weight, Int8Weight)
    unit = Int8Weight(weight.codes, torch.ones(70), (70, 100))
    x = narrow(127, 9, 100).codes
    assert torch.equal(qkernels.int8_linear(x, 1.0, qkernels.pack(unit)).long(), x.long() @ weight.codes.long().t())


@pytest.mark.parametrize("largest", LARGEST)
def test_results_have_the_bits_of_the_eight_bit_kernel(tier: str, largest: int) -> None:
    """Every kind of epilogue, few rows and many, K beyond a block; strided rows, unaligned memory, any threads."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 70, 300), (4, 130, 2050), (101, 200, 1100), (7, 2100, 40)):
        packed = narrow(largest, n, k).pack("vnni64")
        wide, x = as_eight_bits(packed), narrow(127, m, k).codes
        scale, bias, residual = (torch.rand(shape, generator=generator) for shape in ((m,), (n,), (m, n)))
        for epilogue in (
            {},
            {"bias": bias, "activation": "gelu", "residual": residual},
            {"bias": bias, "out_dtype": torch.bfloat16},
            {"out_scale": torch.tensor(3.0), "out_zero_point": 5},
            {"out_scale": torch.arange(n) + 2.0},
        ):
            found, wanted = (qkernels.int8_linear(x, scale, weight, **epilogue) for weight in (packed, wide))
            assert torch.equal(found, wanted), (m, n, k, epilogue.keys())
        grouped, wanted = (qkernels.int8_linear(x, scale, weight, out_group=128) for weight in (packed, wide))
        assert all(torch.equal(a, b) for a, b in zip(grouped, wanted, strict=True))
        by_groups = torch.rand(m, -(-k // 128), generator=generator)
        assert torch.equal(*(qkernels.int8_linear(x, by_groups, weight) for weight in (packed, wide)))
        plain = qkernels.int8_linear(x, scale, packed)
        assert torch.equal(native_linear(spread(x, 5), k, k + 5, False, scale, packed), plain)
        out = guarded((m, n), torch.float32, shift=1)
        assert torch.equal(qkernels.int8_linear(moved(x), scale, packed, out=out), plain)
        before = torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(qkernels.int8_linear(x, scale, packed), plain)
        finally:
            torch.set_num_threads(before)


def test_more_rows_than_one_copy_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 8 MB the activations are copied in several chunks."""
    force(monkeypatch, "avx2")
    weight, x = narrow(8, 3, 4200), narrow(127, 2100, 4200).codes
    scale = torch.arange(2100) % 7 + 1.0
    found = qkernels.int8_linear(x, scale, Int8Weight(weight.codes, torch.ones(3), (3, 4200)).pack("vnni64"))
    assert torch.equal(found, (x.double() @ weight.codes.double().t()).float() * scale[:, None])


@pytest.mark.parametrize("largest", LARGEST)
def test_a_row_that_is_not_finite_stays_alone(tier: str, largest: int) -> None:
    packed, x = narrow(largest, 200, 33).pack("vnni64"), narrow(127, 9, 33).codes
    scale, rest = torch.ones(9), [0, 1, 2, 3, 5, 6, 7, 8]
    scale[4] = float("nan")
    for activation in (None, "gelu"):
        found = qkernels.int8_linear(x, scale, packed, activation=activation)
        wanted = qkernels.int8_linear(x, torch.ones(9), packed, activation=activation)
        assert found[4].isnan().all() and torch.equal(found[rest], wanted[rest])
    codes, scales = qkernels.int8_linear(x, scale, packed, out_group=128)
    assert scales[4].isnan().all() and (codes[4] == 0).all() and scales[rest].isfinite().all()
