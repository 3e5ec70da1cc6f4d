"""Transforms of a site's input: the float product stays what it is, and layers compute with them what they should."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qclip.errors import ArtifactError
from qclip.layers import (
    Hadamard,
    Int4Linear,
    Int8Linear,
    QuantizedPatch,
    RandomHadamard,
    Scale,
    Shift,
    SimulatedLinear,
    from_facts,
)
from qclip.layers.transforms import folded, same, transformed, unfolded
from qclip.layers.transforms import from_facts as transform_from_facts
from qkernels import Int4Weight, Int8Weight

N, K = 40, 96


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(K, generator=generator) < 0.5, -1.0, 1.0)
    factor = torch.rand(K, generator=generator) + 0.5
    shift = torch.randn(K, generator=generator)
    return {
        "scale": [Scale(factor)],
        "shift": [Shift(shift)],
        "hadamard": [Hadamard(K)],
        "random rotation": [Scale(signs), Hadamard(K)],
        "shift, then scale": [Shift(shift), Scale(factor)],
        "scale, then shift": [Scale(factor), Shift(shift)],
        "all": [Shift(shift), Scale(signs), Hadamard(K), Shift(-shift), Scale(factor)],
    }


KINDS = list(drawn())


def product(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, K, generator=generator)
    w, b = torch.randn(N, K, generator=generator) / K**0.5, torch.randn(N, generator=generator)
    return x, w, b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_float_product_stays_what_it_is(kind, bias):
    x, w, b = product()
    b = b if bias else None
    transforms = drawn()[kind]
    new_w, new_b = folded(w, b, transforms)
    assert torch.allclose(F.linear(transformed(x, transforms), new_w, new_b), F.linear(x, w, b), atol=2e-5)
    if len(transforms) == 1:  # the interface of one, as its docstring has it
        (one,) = transforms
        extra = one.bias(w)
        y = one.input(x) @ one.weight(w).T + (0 if extra is None else extra)
        assert torch.allclose(y, x @ w.T, atol=2e-5)
        assert (extra is None) == (kind != "shift")
    back, back_b = unfolded(new_w, new_b, transforms)
    assert torch.allclose(back, w, atol=1e-5)
    assert torch.allclose(torch.zeros(N) if back_b is None else back_b, torch.zeros(N) if b is None else b, atol=1e-5)


def layers(kind, transforms):
    _, w, b = product()
    w, b = folded(w, b, transforms)
    return {
        "int8": lambda: Int8Linear(Int8Weight.quantize(w), b, transforms),
        "int8 static": lambda: Int8Linear(Int8Weight.quantize(w), b, transforms, torch.tensor(0.05)),
        "int4": lambda: Int4Linear(Int4Weight.quantize(w, 32), b, transforms),
        "int4 float": lambda: Int4Linear(Int4Weight.quantize(w, 32), b, transforms, float_input=True),
        "simulated": lambda: SimulatedLinear(Int8Weight.quantize(w), b, transforms, activation_bits=8),
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["int8", "int8 static", "int4", "int4 float", "simulated"])
def test_layers_behind_transforms_are_near_the_float_product(layer, kind):
    x, w, b = product()
    made = layers(layer, drawn()[kind])
    made.pack()
    want = F.linear(x, w, b)
    close = 0.2 if "int4" in layer else 0.03  # what is left is rounding
    assert (made(x) - want).norm() < close * want.norm()
    # Taken out again: the same weight and bias to the input as it comes.
    plain = made.dequantized()
    assert type(plain) is nn.Linear and (plain(x) - want).norm() < close * want.norm()
    # The sum of what it does itself: transformed input on the grid, times the weight.
    if layer == "int4 float":
        by_hand = F.linear(transformed(x, made.transforms), made.quantized.canonical().dequantize(), made.bias)
        assert torch.allclose(made(x), by_hand, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_before_transforms_is_a_norm_before(kind):
    """Fused with the quantizer where nothing comes between, else called before it."""
    x, _, _ = product()
    norm = nn.LayerNorm(K)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.3)
    layer = layers("int8", drawn()[kind])
    with torch.no_grad():
        codes, scale = layer.quantize(x, norm)
        want, want_scale = layer.quantize(norm(x))
    assert torch.allclose(scale, want_scale, rtol=1e-5)
    assert (codes != want).float().mean() < 0.002 and (codes.int() - want.int()).abs().max() <= 1


def test_patches_go_through_their_transforms():
    conv = nn.Conv2d(3, 8, 4, 4)
    transforms = [Shift(torch.randn(48)), Hadamard(48)]
    w, b = folded(conv.weight.detach().flatten(1), conv.bias.detach(), transforms)
    patch = QuantizedPatch(Int8Linear(Int8Weight.quantize(w), b, transforms), (4, 4))
    x = torch.randn(2, 3, 9, 14)
    for y in (patch(x), patch.dequantized()(x)):
        assert (y - conv(x)).norm() < 0.03 * conv(x).norm()


def test_sites_that_share_their_input_know_it():
    a, b = drawn()["all"], drawn()["all"]
    assert same(a, a) and same(a, b) and not same(a, b[:-1]) and not same(a, drawn(seed=1)["all"])
    assert not same([Scale(torch.ones(K))], [Shift(torch.ones(K))]) and not same([Hadamard(K)], [Hadamard(48)])
    q, k = layers("int8", a), layers("int8", a)
    assert q.same_input(k) and not q.same_input(layers("int8", drawn()["scale"]))
    copied = copy.deepcopy(nn.ModuleList([q, k]))
    assert copied[0].transforms[0] is copied[1].transforms[0]  # one instance, also in a copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["int8", "int8 static", "int4", "int4 float", "simulated"])
def test_layers_describe_themselves(layer, kind):
    """facts -> an empty layer of the same form; with the tensors, the same layer."""
    made = layers(layer, drawn()[kind])
    empty = from_facts(made.facts())
    assert type(empty) is type(made) and empty.facts() == made.facts() and empty.describe() == made.describe()
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    again = empty.to_empty(device="cpu")
    again.load_state_dict(made.state_dict())
    x = product()[0]
    assert torch.equal(again(x), made(x))
    assert same(again.transforms, made.transforms)
    assert [transform_from_facts(t.facts(), K).facts() for t in made.transforms] == [t.facts() for t in made.transforms]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_constants_of_transforms_stay_float32(dtype):
    layer = layers("int8", drawn()["all"]).to(dtype)
    assert {t.dtype for transform in layer.transforms for t in transform.buffers()} == {torch.float32}
    assert layer(product()[0].to(dtype)).dtype == dtype


@pytest.mark.parametrize("width", [1, 96, 100, 128, 1000])
def test_random_hadamard_is_a_rotation_of_any_width(width):
    """One transform where there is one of that width, else two that overlap; a file's signs are looked at."""
    rotation = RandomHadamard.drawn(width, np.random.default_rng(0))
    turned = rotation.weight(torch.eye(width))
    assert torch.allclose(turned @ turned.T, torch.eye(width), atol=1e-5)
    assert torch.allclose(rotation.undo(turned), torch.eye(width), atol=1e-5)
    assert len(rotation.signs) == (2 if width in (100, 1000) else 1)
    x = torch.randn(3, 2, width)
    assert torch.allclose(rotation.input(x), x @ turned, atol=1e-4 * width**0.5)
    # Every channel reaches every other one, evenly but for those in the middle of two.
    assert turned.abs().max() <= (1 / width**0.5 if len(rotation.signs) == 1 else 4 / width**0.5) * 1.0001
    empty = transform_from_facts(rotation.facts(), width)
    assert empty.signs.shape == rotation.signs.shape and empty.signs.dtype == torch.int8
    rotation.check_tensor("signs", rotation.signs, "x")
    for odd in (0, 2, -128):
        with pytest.raises(ArtifactError, match=f"x holds {odd}; signs are -1 or 1"):
            rotation.check_tensor("signs", torch.full_like(rotation.signs, odd), "x")
    assert rotation.same(RandomHadamard.drawn(width, np.random.default_rng(0)))
    assert width == 1 or not rotation.same(RandomHadamard.drawn(width, np.random.default_rng(1)))
