"""int4_linear by the interpreter, W4A8 and W4A16: every configuration, group, type, zero point and epilogue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qkernels
from qkernels import Int4Weight
from qkernels.triton import function
from qkernels.triton.launch import SM80, SM90
from tests.kernels.fresh_memory import guarded
from tests.kernels.linear_cases import EPS, check_float, finish
from tests.kernels.triton.linear_checks import CHIPS, ENDS, check_end, pretend

function("int4_linear")  # imports the file, whose name the package's attribute then is
from qkernels.triton import int4_linear  # noqa: E402

FORMS = list(CHIPS)
CONFIGS = [(form, config) for form, chip in CHIPS.items() for config in int4_linear.candidates(chip)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def make(n: int, k: int, group: int, zeros: str | None, seed: int = 0) -> Int4Weight:
    """Random codes; scales are powers of two times small numbers, so that sums of whole numbers stay exact."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    weight = Int4Weight.quantize(w, group, symmetric=zeros is None)
    if zeros is None:  # rows of a turned grid among them
        weight = Int4Weight.quantize(w, group, scales=weight.scales * (1 - 2 * (torch.arange(n) % 2))[:, None])
    if zeros == "half":
        weight = Int4Weight.quantize(w, group, zeros=torch.full(weight.scales.shape, 7.5))
    return weight


def codes(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def exact(x: torch.Tensor, weight: Int4Weight, x_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Result in float64, the sum of the magnitudes of what kernels add up, and how many terms that is."""
    n, k = weight.shape
    rows = x.double()
    if x_scale is not None:
        wide = x_scale.dim() == 2
        spread = x_scale.repeat_interleave(128, 1)[:, :k] if wide else x_scale.reshape(-1, 1)
        rows = rows * spread.double()
    value, size, terms = torch.zeros(len(x), n).double(), torch.zeros(len(x), n).double(), 0
    zero = torch.full(weight.scales.shape, 8.0) if weight.zeros is None else weight.zeros
    step = min(weight.group, 128)
    for first in range(0, k, step):
        part, group = slice(first, min(first + step, k)), first // weight.group
        steps = weight.unpacked_codes()[:, part].double() - 8
        scale, lift = weight.scales[:, group].double(), zero[:, group].double() - 8
        product, total = rows[:, part] @ steps.t() * scale, rows[:, part].sum(1, keepdim=True) * lift * scale
        value, size, terms = value + product - total, size + product.abs() + total.abs(), terms + 1
    return value, size, terms


def force(monkeypatch: pytest.MonkeyPatch, config: int4_linear.Config) -> None:
    monkeypatch.setattr(int4_linear, "configure", lambda *_: config)


@pytest.mark.parametrize(("form", "config"), CONFIGS, ids=str)
def test_whole_numbers_are_exact_in_every_configuration(form, config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scales of 1 everything is a whole number below 2^24, so that float32 holds it."""
    pretend(monkeypatch, form)
    m, n = config.block_m, config.block_n
    for split, shape in ((1, (m + 1, n, 128)), (3, (m - 1, n + 1, 700))):
        force(monkeypatch, replace(config, split=split))
        x = codes(1, shape[0], shape[2])
        weight = make(shape[1], shape[2], 128, None)
        weight = replace(weight, scales=torch.ones_like(weight.scales))
        want = x.double() @ weight.dequantize().double().t()
        out = guarded((shape[0], shape[1]), torch.float32)
        qkernels.int4_linear(x, 1.0, weight.pack("halves128"), out=out)
        assert torch.equal(out.double(), want), (split, shape)
        x = (x // 8).float()
        want = x.double() @ weight.dequantize().double().t()
        for dtype in FLOATS[split % 2 :: 2]:
            out.fill_(float("nan"))
            qkernels.int4_linear(x.to(dtype), None, weight.pack("halves128"), out=out)
            assert torch.equal(out.double(), want), (split, shape, dtype)


@pytest.mark.parametrize(
    ("bits", "less", "integer", "dtype"),
    [
        (int4_linear._HALF, 1032, torch.int16, torch.float16),
        (int4_linear._BRAIN, 136, torch.int16, torch.bfloat16),
        (int4_linear._SINGLE, 8388616, torch.int32, torch.float32),
    ],
)
def test_bits_of_a_nibble_make_its_code(bits, less, integer, dtype) -> None:
    """The interpreter cannot compute with bfloat16; torch can."""
    code = torch.arange(16)
    value = ((code ^ 8).to(integer) ^ bits.value).view(dtype) - less
    assert torch.equal(value.float(), code - 8.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zeros", [None, "whole", "half"])
@pytest.mark.parametrize("group", [32, 64, 128, 10**6])
def test_groups_and_zeros(form: str, group: int, zeros: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, form)
    for number, (m, n, k) in enumerate(((3, 70, 300), (17, 5, 33), (1, 1, 1), (2, 66, 161))):
        weight = make(n, k, group, zeros, seed=number)
        packed, groups = weight.pack("halves128"), -(-k // 128)
        x = codes(number, m, k)
        for shape in ((), (m,), (m, groups)):
            x_scale = torch.rand(shape, generator=torch.Generator().manual_seed(number)) * 0.05 + 1e-3
            value, size, terms = exact(x, weight, x_scale)
            y = qkernels.int4_linear(x, x_scale, packed)
            check_float(y, finish(value, size, terms + 2, None, None))
        rows = torch.randn(m, k, generator=torch.Generator().manual_seed(number))
        for dtype in FLOATS:
            given = rows.to(dtype)
            value, _, _ = exact(given, weight, None)
            y = qkernels.int4_linear(given, None, packed).double()
            allowed = (1e-5 if dtype == torch.float32 else 1e-2) * (
                given.double().abs() @ weight.dequantize().double().abs().t()
            )
            # With a zero point the sum of |x w| may be near nothing where its two parts are not.
            allowed = allowed + 64 * EPS * exact(given, weight, None)[1]
            assert ((y - value).abs() <= allowed).all(), (dtype, m, n, k)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_epilogue_within_the_contract(form: str, end: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, form)
    seed = ENDS.index(end)
    m, n, k = ((5, 70, 300), (19, 131, 129), (33, 257, 48))[seed % 3]
    real = int4_linear.configure
    monkeypatch.setattr(int4_linear, "configure", lambda *args: replace(real(*args), split=1 + seed % 2))
    weight = make(n, k, (32, 64, 128)[seed % 3], ("half", None)[seed % 2], seed)
    x, generator = codes(seed, m, k), torch.Generator().manual_seed(seed)
    x_scale = torch.rand(((m,), (), (m, -(-k // 128)))[seed % 3], generator=generator) * 0.005 + 1e-3
    bias = None if seed % 4 == 3 else torch.randn(n, generator=generator)
    value, size, terms = exact(x, weight, x_scale)
    packed = weight.pack("halves128")
    check_end(lambda **rest: qkernels.int4_linear(x, x_scale, packed, **rest), value, size, terms + 2, end, bias, seed)


def test_bad_values_stay_in_their_row() -> None:
    weight = make(40, 70, 32, "half").pack("halves128")
    x, scale = codes(0, 5, 70), torch.ones(5)
    scale[2] = float("nan")
    y = qkernels.int4_linear(x, scale, weight)
    assert torch.isnan(y[2]).all() and torch.isfinite(y[[0, 1, 3, 4]]).all()
    rows = torch.randn(5, 70)
    rows[1, 69], rows[3, 0] = float("nan"), float("inf")
    for dtype in FLOATS:
        y = qkernels.int4_linear(rows.to(dtype), None, weight)
        assert not torch.isfinite(y[[1, 3]]).any() and torch.isfinite(y[[0, 2, 4]]).all()


def test_leading_axes_strides_and_no_rows() -> None:
    weight = make(50, 48, 32, None).pack("halves128")
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    whole = qkernels.int4_linear(x, None, weight)
    assert whole.shape == (2, 9, 50)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(qkernels.int4_linear(strided, None, weight), whole)
    assert qkernels.int4_linear(x[:0], None, weight).shape == (0, 9, 50)


@pytest.mark.parametrize("chip", [SM80, SM90], ids=["sm80", "sm90"])
def test_configurations_are_legal_and_few_tiles_are_split(chip) -> None:
    for m in (1, 16, 33, 197, 257, 12800):
        for n, k in ((512, 512), (768, 3072), (4096, 1024), (8192, 8192)):
            for x_type in ("i8", "bf16", "fp16", "fp32"):
                for out in ("float", "tensor", "group"):
                    assert int4_linear.configure(m, n, k, chip, x_type, out).legal(chip, x_type, out)
    assert int4_linear.configure(1, 1024, 4096, chip, "bf16", "float").split > 1
    assert int4_linear.configure(12800, 768, 3072, chip, "i8", "float").split == 1
