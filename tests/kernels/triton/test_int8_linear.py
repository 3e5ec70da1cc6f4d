"""int8_linear by the interpreter: exact sums in every configuration, the epilogue within the contract, bad values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qkernels
from qkernels import Int8Weight, reference
from qkernels.contract import GROUP, Epilogue
from qkernels.triton import function
from qkernels.triton.launch import SM80, SM90
from tests.kernels.fresh_memory import guarded
from tests.kernels.linear_cases import check_float, finish
from tests.kernels.triton.linear_checks import CHIPS, ENDS, check_end, pretend

function("int8_linear")  # imports the file, whose name the package's attribute then is
from qkernels.triton import int8_linear  # noqa: E402

FORMS = list(CHIPS)
CONFIGS = [(form, config) for form, chip in CHIPS.items() for config in int8_linear.candidates(chip)]


def codes(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def unit_weight(w: torch.Tensor) -> Int8Weight:
    return Int8Weight(w, torch.ones(w.shape[0]), (w.shape[0], w.shape[1])).pack("rows16")


def force(monkeypatch: pytest.MonkeyPatch, config: int8_linear.Config) -> None:
    monkeypatch.setattr(int8_linear, "configure", lambda *_: config)


@pytest.mark.parametrize(("form", "config"), CONFIGS, ids=str)
def test_sums_are_exact_in_every_configuration(form, config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around a tile and primes, more tiles than programs, K split or not."""
    pretend(monkeypatch, form)
    m, n, k = config.block_m, config.block_n, config.block_k
    for split, shape in ((1, (m + 1, n, k)), (1, (m - 1, n + 1, 37)), (3, (m, 2 * n - 1, 5 * k + 16))):
        force(monkeypatch, replace(config, split=split))
        x, w = codes(1, shape[0], shape[2]), codes(2, shape[1], shape[2])
        out = guarded((shape[0], shape[1]), torch.float32)
        qkernels.int8_linear(x, 1.0, unit_weight(w), out=out)
        assert torch.equal(out.long(), x.long() @ w.long().t()), (split, shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 130, 16), (7, 3, 17), (2, 64, 15), (130, 129, 33)])
def test_sums_are_exact_for_odd_shapes(form: str, shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, form)
    x, w = codes(3, shape[0], shape[2]), codes(4, shape[1], shape[2])
    y = qkernels.int8_linear(x, 1.0, unit_weight(w))
    assert torch.equal(y.long(), x.long() @ w.long().t())


@pytest.mark.parametrize("split", [1, 8])
def test_deep_sums_at_the_extremes(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest magnitudes in all sign patterns at the deepest K: nothing saturates or wraps."""
    config = pretend(monkeypatch, "descriptors") and int8_linear.candidates(SM90)[0]
    force(monkeypatch, replace(config, split=split, block_k=8192))
    k = 65536
    x, w = torch.full((4, k), 127, dtype=torch.int8), torch.full((3, k), 127, dtype=torch.int8)
    x[1], x[2, ::2], x[3] = -127, -127, -128
    w[1], w[2, k // 3 :] = -127, -127
    assert torch.equal(qkernels.int8_linear(x, 1.0, unit_weight(w)), (x.long() @ w.long().t()).float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scales", ["one", "row", "group"])
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_epilogue_within_the_contract(form: str, scales: str, end: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, form)
    seed = ENDS.index(end) + 10 * ["one", "row", "group"].index(scales)
    m, n, k = ((5, 70, 300), (19, 131, 129), (67, 257, 48))[seed % 3]
    split = 2 if seed % 2 else 1
    real = int8_linear.configure
    monkeypatch.setattr(int8_linear, "configure", lambda *args: replace(real(*args), split=split))
    generator = torch.Generator().manual_seed(seed)
    x, groups = codes(seed, m, k), -(-k // 128)
    w = Int8Weight(codes(seed + 1, n, k), torch.rand(n, generator=generator) * 0.002 + 1e-4, (n, k))
    shape = {"one": (), "row": (m,), "group": (m, groups)}[scales]
    x_scale = torch.rand(shape, generator=generator) * 0.05 + 1e-3
    bias = None if seed % 4 == 3 else torch.randn(n, generator=generator)
    if scales == "group":
        blocks = [slice(128 * g, min(128 * g + 128, k)) for g in range(groups)]
        terms = [(x[:, b].double() @ w.codes[:, b].double().t()) * x_scale[:, [g]] for g, b in enumerate(blocks)]
        linear = sum(terms) * w.scales.double()
        size, ulps = sum(term.abs() for term in terms) * w.scales.double(), groups + 2
    else:
        linear = (x.long() @ w.codes.long().t()).double() * (x_scale.reshape(-1, 1) * w.scales).double()
        size, ulps = linear.abs(), 2
    packed = w.pack("rows16")
    check_end(lambda **rest: qkernels.int8_linear(x, x_scale, packed, **rest), linear, size, ulps, end, bias, seed)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_tanh"])
def test_activation_over_its_range(activation: str) -> None:
    """K = 1 makes every float: 127 codes times many scales, both signs, dense where the function bends."""
    x = torch.arange(-127, 128, dtype=torch.int8)[:, None]
    scales = torch.cat([torch.linspace(1e-4, 0.06, 400), torch.logspace(-6, 3, 60)])
    weight = Int8Weight(torch.ones(len(scales), 1, dtype=torch.int8), scales, (len(scales), 1))
    y = qkernels.int8_linear(x, 1.0, weight.pack("rows16"), activation=activation)
    linear = x.double() * scales.double()
    check_float(y, finish(linear, linear.abs(), 2, activation, None))
    assert (y[127] == 0).all() and (y[linear < -30].abs() < 1e-6).all()


def test_non_finite_values() -> None:
    """A NaN scale makes its row NaN and no other; int8 output writes 0 there, and groups carry it in their scale."""
    x, weight = codes(0, 9, 33), unit_weight(codes(1, 200, 33))
    scale = torch.ones(9)
    scale[4] = float("nan")
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    for activation in (None, "gelu", "quick_gelu", "gelu_tanh"):
        y = qkernels.int8_linear(x, scale, weight, activation=activation)
        assert torch.isnan(y[4]).all() and torch.isfinite(y[rest]).all()
    bias = torch.zeros(200)
    bias[7], bias[150] = float("inf"), float("-inf")
    out = qkernels.int8_linear(x, scale, weight, bias, out_scale=torch.tensor(100.0), out_zero_point=5)
    assert (out[4] == 0).all() and (out[:, [7, 150]] == 0).all() and (out[rest] != 0).any()
    for bad in (0.0, float("nan"), float("inf"), -1.0):
        static = {"out_scale": torch.tensor(bad), "out_zero_point": 5}
        want = reference.int8_linear(
            x, scale, weight, Epilogue(bias, out_scale=static["out_scale"], out_zero_point=torch.tensor(5.0))
        )
        assert torch.equal(qkernels.int8_linear(x, scale, weight, bias, **static), want), bad
    grouped, group_scales = qkernels.int8_linear(x, scale, weight, bias[:149].new_zeros(200), out_group=128)
    assert torch.isnan(group_scales[4]).all() and (grouped[4] == 0).all() and torch.isfinite(group_scales[rest]).all()
    grouped, group_scales = qkernels.int8_linear(x, scale, weight, bias, out_group=128)
    assert torch.isnan(group_scales).all() and (grouped == 0).all()


def test_leading_axes_strides_no_rows_and_odd_addresses() -> None:
    weight = Int8Weight.quantize(torch.randn(50, 48, generator=torch.Generator().manual_seed(0))).pack("rows16")
    x, scale = codes(5, 2, 9, 48), torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    whole = qkernels.int8_linear(x, scale, weight)
    assert whole.shape == (2, 9, 50)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(qkernels.int8_linear(strided, scale, weight), whole)
    shifted = torch.cat([torch.zeros(3, dtype=torch.int8), x.flatten()])[3:].view(x.shape)
    assert shifted.data_ptr() % 16 and torch.equal(qkernels.int8_linear(shifted, scale, weight), whole)
    assert qkernels.int8_linear(x[:0], scale[:0], weight).shape == (0, 9, 50)
    codes_, scales = qkernels.int8_linear(x[:, :0], scale[:, :0], weight, out_group=128)
    assert codes_.shape == (2, 0, 50) and scales.shape == (2, 0, 1)


@pytest.mark.parametrize("chip", [SM80, SM90], ids=["sm80", "sm90"])
def test_configurations_are_legal_and_few_tiles_are_split(chip) -> None:
    for m in (1, 16, 50, 197, 257, 800, 12800, 65792):
        for n, k in ((512, 512), (768, 768), (768, 3072), (3072, 768), (4096, 1024), (1024, 4096), (8192, 8192)):
            for kind in ("one", "row", "group"):
                for out in (("float", 4), ("float", 2), ("tensor", 1), ("channel", 1), ("group", 1)):
                    config = int8_linear.configure(m, n, k, chip, kind, *out)
                    assert config.legal(chip, kind, *out)
                    if config.split > 1:
                        assert -(-k // config.block_k) >= 2 * config.split
    assert int8_linear.configure(1, 1024, 4096, chip, "row", "float", 2).split > 1
    assert int8_linear.configure(1, 1024, 4096, chip, "row", "float", 2).swap
    assert int8_linear.configure(12800, 768, 3072, chip, "row", "float", 2).split == 1


def test_an_unpacked_weight_is_refused() -> None:
    with pytest.raises(qkernels.FallbackError, match="rows16"):
        qkernels.int8_linear(codes(0, 2, 16), 1.0, Int8Weight.quantize(torch.ones(3, 16)))
    assert GROUP == 128


def test_biases_of_16_bits_are_read_as_they_are() -> None:
    bias = torch.randn(130) * 1000
    for half in (bias.bfloat16(), bias.half()):
        for k in (40, 4096):  # whole, and split among programs
            x, weight = codes(0, 5, k), unit_weight(codes(1, 130, k))
            want = qkernels.int8_linear(x, 1.0, weight, half.float())
            assert torch.equal(qkernels.int8_linear(x, 1.0, weight, half), want)
