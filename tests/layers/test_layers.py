"""Layers against plain torch: what they compute, what they keep, and how they move."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qclip.errors import ArtifactError
from qclip.layers import (
    Int4Linear,
    Int8Linear,
    QuantizedAttention,
    QuantizedEmbedding,
    QuantizedMlp,
    QuantizedPatch,
    Scale,
    SimulatedLinear,
    from_facts,
)
from qclip.layers.activations import quantize_dequantize, quantize_twin
from qclip.models.tower import Attention, Mlp
from qclip.untrusted.schema import Refused
from qkernels import Int4Weight, Int8Weight, quantize_per_token

N, K = 96, 160


def int8(n=N, k=K, bias=True, smooth=False, static=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) / k**0.5
    factor = torch.rand(k, generator=g) + 0.5 if smooth else None
    stored = weight if factor is None else weight / factor
    layer = Int8Linear(
        Int8Weight.quantize(stored),
        torch.randn(n, generator=g) if bias else None,
        [] if factor is None else [Scale(factor)],
        torch.tensor(0.03) if static else None,
    )
    return layer, weight


def int4(n=N, k=K, group=64, float_input=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) / k**0.5
    return Int4Linear(Int4Weight.quantize(weight, group), torch.randn(n, generator=g), float_input=float_input), weight


def relative(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


def made(kind):
    return {
        "int8": lambda: int8()[0],
        "int8-smooth": lambda: int8(smooth=True)[0],
        "int8-static": lambda: int8(static=True)[0],
        "int4": lambda: int4()[0],
        "int4-float": lambda: int4(float_input=True)[0],
        "simulated": lambda: SimulatedLinear(Int8Weight.quantize(int8()[1]), torch.ones(N), activation_bits=8),
    }[kind]()


KINDS = ["int8", "int8-smooth", "int8-static", "int4", "int4-float", "simulated"]


@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_near_the_float_product(kind):
    layer = made(kind)
    layer.pack()
    x = torch.randn(3, 7, K)
    want = F.linear(x, layer.dequantized_weight(), layer.bias)
    got = layer(x)
    assert got.shape == (3, 7, N) and got.dtype == torch.float32
    assert relative(got, want) < 0.02  # what is left is the rounding of the activations


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_canonical_and_round_trips_bit_for_bit(kind):
    layer, other = made(kind), made(kind)
    with torch.no_grad():
        other.scales.mul_(2)
    layer.pack()
    other.pack()
    state = layer.state_dict()
    weight = layer.quantized.canonical()
    assert torch.equal(state["codes"], weight.codes) and state["codes"].dtype == weight.codes.dtype
    other.load_state_dict(state)
    assert layer.layout == other.layout
    x = torch.randn(5, K)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_moves_biases_and_leaves_codes_scales_and_zeros(kind, dtype):
    layer = made(kind)
    layer.pack()
    before = {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}
    layout = layer.layout
    layer = layer.to(dtype)
    assert layer.bias.dtype == dtype and layer.weight.dtype == dtype and layer.layout == layout
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    assert layer(torch.randn(4, K, dtype=dtype)).dtype == dtype


def test_deepcopy_shares_nothing():
    layer = made("int8")
    layer.pack()
    twin = copy.deepcopy(layer)
    twin.scales.zero_()
    assert layer.scales.abs().min() > 0 and twin.layout == layer.layout


def test_to_meta_and_back_empty():
    layer = made("int8-smooth").to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    assert layer.codes.shape == (N, K) and layer.codes.dtype == torch.int8


def test_smoothing_leaves_the_effective_weight():
    layer, weight = int8(smooth=True)
    assert relative(layer.dequantized_weight(), weight) < 0.01


def test_embedding_dequantizes_rows():
    table = torch.randn(50, 24) * torch.logspace(-3, 1, 50)[:, None]
    layer = QuantizedEmbedding(Int8Weight.quantize(table))
    tokens = torch.tensor([[0, 49, 7], [7, 7, 1]])
    got = layer(tokens)
    assert got.shape == (2, 3, 24)
    assert ((got - table[tokens]).abs() <= table[tokens].abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert layer.half()(tokens).dtype == torch.float16


@pytest.mark.parametrize("size", [(16, 16), (17, 19)])
def test_patch_equals_the_convolution(size):
    conv = nn.Conv2d(3, 40, 4, 4)
    weight = Int8Weight.quantize(conv.weight.detach().flatten(1))
    patch = QuantizedPatch(Int8Linear(weight, conv.bias.detach()), (4, 4))
    assert QuantizedPatch.fits(conv) and not QuantizedPatch.fits(nn.Conv2d(3, 40, 4, 2))
    assert not QuantizedPatch.fits(nn.Conv2d(3, 40, 4, 4, padding=1))
    x = torch.randn(2, 3, *size)
    assert relative(patch(x), conv(x)) < 0.02 and patch(x).shape == conv(x).shape


@pytest.mark.parametrize("kind", ["dynamic", "smooth", "static", "float input"])
def test_patches_are_rows_of_the_site(kind):
    """The patches that a site reads as codes are the ones it would quantize itself."""
    weight = torch.randn(40, 48)
    smooth = torch.rand(48) + 0.5 if kind == "smooth" else None
    if kind == "float input":
        site = Int4Linear(Int4Weight.quantize(weight, 32), float_input=True)
    else:
        scale = torch.tensor(0.02) if kind == "static" else None
        site = Int8Linear(Int8Weight.quantize(weight), None, [] if smooth is None else [Scale(smooth)], scale)
    x = torch.randn(2, 3, 9, 14)
    rows = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    assert torch.equal(QuantizedPatch(site, (4, 4))(x), site(rows).transpose(1, 2).unflatten(2, (2, 3)))


def test_simulated_numbers_are_those_of_the_kernels():
    absmax = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    x = torch.cat([absmax, (torch.arange(127) + 0.5) * absmax / 127], dim=1)  # all close to a tie
    codes, scale = quantize_per_token(x)
    assert torch.equal(quantize_dequantize(x, 8), codes.float() * scale[:, None])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_simulated_grid(bits):
    x = torch.randn(20, K)
    x[3] = 0
    y = quantize_dequantize(x, bits)
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((y - x).abs() <= step / 2 * 1.0001 + 1e-9).all() and (y[3] == 0).all()
    codes = (y / step.clamp(min=1e-9)).round()
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.allclose(quantize_dequantize(y, bits), y, atol=1e-6)


def float_attention(width=64, heads=4, seed=0):
    torch.manual_seed(seed)
    core = Attention(*(nn.Linear(width, width) for _ in range(4)), heads)
    return core.eval()


def quantized(core, **kwargs):
    core = copy.deepcopy(core)
    for name in ("q", "k", "v", "out", "fc1", "fc2"):
        site = getattr(core, name, None)
        if site is not None:
            setattr(core, name, Int8Linear(Int8Weight.quantize(site.weight.detach()), site.bias.detach(), **kwargs))
    return (QuantizedAttention if isinstance(core, Attention) else QuantizedMlp).fuse(core)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_fused_attention_is_near_float(causal, static):
    core = float_attention()
    fused = quantized(core, **({"input_scale": torch.tensor(0.03)} if static else {}))
    assert fused.shares_input and fused.codes_out
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert relative(fused(x, causal=causal), core(x, causal=causal)) < 0.04


def test_fused_attention_equals_its_own_sites_one_by_one(monkeypatch):
    monkeypatch.setattr(qkernels, "attention_dtype", lambda device, dtype: dtype)
    core = float_attention()
    fused, plain = quantized(core), quantized(core)
    plain.unfuse()
    assert type(plain) is Attention
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert relative(fused(x), plain(x)) < 0.005


def test_products_in_bfloat16_cost_less_than_the_codes_that_follow(monkeypatch):
    """Where the processor multiplies bfloat16, q, k and v are handed over in it."""
    core = float_attention()
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        exact, fused = core(x), quantized(core)
        errors = {}
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(qkernels, "attention_dtype", lambda device, given, dtype=dtype: dtype)
            errors[dtype] = relative(fused(x), exact)
    assert errors[torch.bfloat16] != errors[torch.float32]
    assert errors[torch.bfloat16] < 1.1 * errors[torch.float32] + 1e-3


def test_norm_inside_equals_norm_before():
    core, norm = float_attention(), nn.LayerNorm(64)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.3)
    fused = quantized(core)
    x = torch.randn(2, 9, 64) * 3 + 1
    with torch.no_grad():
        before = fused(norm(x))
        assert fused.fuses(norm) and relative(fused(x, norm=norm), before) < 0.005


def test_mixed_sites_fall_back_to_one_by_one():
    core = float_attention()
    fused = quantized(core)
    fused.k = core.k  # float: an exception in the recipe
    fused = QuantizedAttention.fuse(fused)
    assert not fused.shares_input
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert relative(fused(x), core(x)) < 0.04


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_tanh"])
@pytest.mark.parametrize("static", [False, True])
def test_fused_mlp_is_near_float(activation, static):
    torch.manual_seed(0)
    core = Mlp(nn.Linear(64, 256), nn.Linear(256, 64), activation).eval()
    fused = quantized(core, **({"input_scale": torch.tensor(0.03)} if static else {}))
    assert fused.codes_between
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert relative(fused(x), core(x)) < 0.04


def float_mlp(k=64, hidden=300):
    """Its hidden values are of very different sizes, as a transformer's are; 300 ends in a short group."""
    torch.manual_seed(0)
    core = Mlp(nn.Linear(k, hidden), nn.Linear(hidden, k), "gelu").eval()
    with torch.no_grad():
        core.fc1.weight.mul_(torch.linspace(0.2, 6, hidden)[:, None])
        core.fc1.bias[:4] += 20
    return core


def test_codes_in_groups_between_the_linears_are_nearer_than_rows(monkeypatch):
    """What a GPU does where fc2 quantizes dynamically: fc1 writes codes with a scale for 128 outputs each."""
    core, x = float_mlp(), torch.randn(2, 9, 64)
    fused, found = quantized(core), {}
    with torch.no_grad():
        for group in (None, 128):
            monkeypatch.setattr(qkernels, "output_group", lambda device, group=group: group)
            found[group] = fused(x)
        codes, scale = fused.fc1.quantize(x)
        hidden = fused.fc1.linear(codes, scale, "gelu")
        parts = [quantize_per_token(part) for part in hidden.split(128, -1)]
        by_hand = torch.cat([(c * s[..., None]) for c, s in parts], -1)
        by_hand = by_hand @ fused.fc2.dequantized_weight().t() + fused.fc2.bias
        exact = core(x)
    assert not torch.equal(found[None], found[128])
    # The same codes in other sums, but where a value lies so near a tie that float32 rounds it apart.
    assert relative(found[128], by_hand) < 1e-3
    errors = {group: relative(y, exact) for group, y in found.items()}
    assert errors[128] < errors[None] < 0.04
    assert F.cosine_similarity(found[128].flatten(), exact.flatten(), dim=0) > 0.9995


@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_groups_are_only_for_inputs_that_fc2_would_quantize_plainly(monkeypatch, weight):
    """Not where it is smoothed or static, nor where fc2 wants floats; and for 4-bit weights too."""
    x, core = torch.randn(2, 9, 64), float_mlp(hidden=256)

    def make(**kwargs):
        if weight == "int8":
            made = quantized(core, **kwargs)
        else:
            made = copy.deepcopy(core)
            for name in ("fc1", "fc2"):
                site = getattr(core, name)
                setattr(
                    made, name, Int4Linear(Int4Weight.quantize(site.weight.detach(), 64), site.bias.detach(), **kwargs)
                )
            made = QuantizedMlp.fuse(made)
        return made

    def both(made):
        results = []
        for group in (None, 128):
            monkeypatch.setattr(qkernels, "output_group", lambda device, group=group: group)
            with torch.no_grad():
                results.append(made(x))
        return torch.equal(*results)

    assert not both(make())
    assert both(make(input_scale=torch.tensor(0.2)))
    smoothed = make()
    smoothed.fc2.transforms = [Scale(torch.rand(256) + 0.5)]
    assert both(QuantizedMlp.fuse(smoothed))
    floating = make()
    floating.fc2 = core.fc2
    assert both(QuantizedMlp.fuse(floating))


def test_compute_in_bfloat16():
    fused = quantized(float_attention()).bfloat16()
    x = torch.randn(2, 9, 64).bfloat16()
    assert fused(x).dtype == torch.bfloat16


def test_codes_that_cover_a_share_of_each_token():
    """The file says so; a static, float or asym input has no such share."""
    g = torch.Generator().manual_seed(0)
    codes, bias = Int8Weight.quantize(torch.randn(N, K, generator=g)), torch.randn(N, generator=g)
    layer = SimulatedLinear(codes, bias, activation_bits=4, input_share=0.8)
    x = torch.randn(5, K, generator=g) * torch.rand(5, 1, generator=g)
    scale = 0.8 * x.abs().amax(-1, keepdim=True) / 7
    want = (x / scale).round().clamp(-7, 7) * scale @ codes.dequantize().T + bias
    assert torch.allclose(layer(x), want, atol=1e-4)
    assert (want - SimulatedLinear(codes, bias, activation_bits=4)(x)).abs().max() > 1e-2
    again = from_facts(layer.facts()).to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert "input_share" not in SimulatedLinear(codes, bias, activation_bits=4).facts()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = 0.8 * (high - low) / 15
    zero = -8 - (0.8 * low / scale).round()
    want = (((x / scale).round() + zero).clamp(-8, 7) - zero) * scale @ codes.dequantize().T + bias
    asym = SimulatedLinear(codes, bias, activation_bits=4, activation_grid="asym", input_share=0.8)
    assert torch.allclose(asym(x), want, atol=1e-4)
    for change in ({"input_scale": True}, {"activation_bits": None}):
        with pytest.raises(ArtifactError, match="covers a share of each token, which takes a dynamic input"):
            from_facts(layer.facts() | change)
    check = SimulatedLinear.schema()
    check(layer.facts(), "layer")
    for share in (0.0, 1.1, float("nan"), "1", True):
        with pytest.raises(Refused, match="must be a number from 0.001 to 1"):
            check(layer.facts() | {"input_share": share}, "layer")


@pytest.mark.parametrize("scaled", [False, True])
def test_a_twin_input_is_rounded_to_its_two_ranges(scaled):
    """Behind the transforms; the file says so, and one without a scale is refused."""
    g = torch.Generator().manual_seed(0)
    weight, bias, factor = torch.randn(N, K, generator=g) / K**0.5, torch.randn(N, generator=g), torch.ones(K)
    factor = torch.rand(K, generator=g) + 0.5 if scaled else factor
    codes, step = Int8Weight.quantize(weight / factor), torch.tensor(0.11)
    layer = SimulatedLinear(codes, bias, [Scale(factor)], step, activation_bits=6, negative_step=0.17 / 32)
    x = F.gelu(2 * torch.randn(5, K, generator=g))
    seen = quantize_twin(x * factor, 6, step, 0.17 / 32)
    want = seen @ codes.dequantize().T + bias
    assert torch.allclose(layer(x), want, atol=1e-5)
    single = SimulatedLinear(codes, bias, [Scale(factor)], step, activation_bits=6)(x)
    assert (want - single).abs().max() > 1e-2  # the ranges are two
    again = from_facts(layer.facts()).to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    for change in ({"input_scale": False}, {"input_zero": True}, {"activation_bits": None}):
        with pytest.raises(ArtifactError, match="a twin input, which takes a static scale and no zero point"):
            from_facts(layer.facts() | change)
