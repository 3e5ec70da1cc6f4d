"""Weights: canonical form by its rule, packed layouts as bijections, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qkernels import Int4Weight, Int8Weight


def matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(n=st.integers(1, 140), k=st.integers(1, 140), seed=st.integers(0, 99))
def test_int8_packing_is_a_bijection(n: int, k: int, seed: int) -> None:
    weight = Int8Weight.quantize(matrix(n, k, seed))
    packed, rows = weight.pack("vnni64"), weight.pack("rows16")
    assert packed.layout == "vnni64" and packed.codes.dim() == 1 and packed.codes.dtype == torch.uint8
    assert rows.layout == "rows16" and rows.codes.dtype == torch.int8 and rows.codes.is_contiguous()
    for form in (packed, rows, packed.pack("rows16"), rows.pack("vnni64")):
        back = form.canonical()
        assert back.layout == "canonical" and back.codes.dtype == torch.int8
        assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
        assert torch.equal(form.dequantize(), weight.dequantize())


@settings(max_examples=40)
@given(
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    group=st.sampled_from([32, 64, 128, 10**6]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_int4_packing_is_a_bijection(n: int, k: int, group: int, symmetric: bool, seed: int) -> None:
    weight = Int4Weight.quantize(matrix(n, k, seed), group, symmetric)
    assert weight.codes.shape == (n, -(-k // 2)) and weight.scales.shape == (n, -(-k // weight.group))
    if k % 2:
        assert (weight.codes[:, -1] >> 4 == 8).all()
    assert (weight.zeros is None) == symmetric
    for layouts in (["nibble64"], ["halves128"], ["nibble64", "halves128"]):
        back = weight
        for layout in layouts:
            back = back.pack(layout)
        back = back.canonical()
        assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
        if weight.zeros is not None:
            assert back.zeros is not None and torch.equal(back.zeros, weight.zeros)


def test_vnni64_places_every_code_where_the_kernels_look() -> None:
    n, k = 70, 9
    weight = Int8Weight.quantize(matrix(n, k))
    buffer = weight.pack("vnni64").codes
    panels = buffer[: 128 * 12].view(torch.int8).view(2, 3, 64, 4)
    words = buffer[128 * 12 :].view(torch.int32)
    starts, largest = words[:128], words[128:]
    for row in range(128):
        for column in range(12):
            inside = row < n and column < k
            assert panels[row // 64, column // 4, row % 64, column % 4] == (weight.codes[row, column] if inside else 0)
    assert torch.equal(starts[:n], -128 * weight.codes.sum(1, dtype=torch.int32)) and (starts[n:] == 0).all()
    assert largest.tolist() == [127]


@pytest.mark.parametrize("codes", [[[0, 0]], [[-9, 3]], [[5, 8]], [[-128, 127]]])
def test_vnni64_knows_the_largest_magnitude(codes: list[list[int]]) -> None:
    weight = Int8Weight(torch.tensor(codes, dtype=torch.int8), torch.ones(1), (1, 2))
    packed = weight.pack("vnni64")
    assert packed.codes[-4:].view(torch.int32).tolist() == [max(map(abs, codes[0]))]
    assert torch.equal(packed.canonical().codes, weight.codes)


def test_rows16_pads_rows_with_zeros() -> None:
    weight = Int8Weight.quantize(matrix(3, 21))
    codes = weight.pack("rows16").codes
    assert codes.shape == (3, 32) and torch.equal(codes[:, :21], weight.codes) and (codes[:, 21:] == 0).all()


@pytest.mark.parametrize("k", [1, 64, 65, 128, 200])
def test_halves128_places_every_code_where_the_kernels_look(k: int) -> None:
    weight = Int4Weight.quantize(matrix(3, k), 32)
    codes, packed = weight.unpacked_codes(), weight.pack("halves128").codes
    assert packed.shape == (3, -(-k // 128) * 64) and packed.dtype == torch.uint8
    low, high = (packed << 4).view(torch.int8), (packed & 0xF0).view(torch.int8)  # 16 * (code - 8)
    for row in range(3):
        for at in range(2 * packed.shape[1]):
            value = (low, high)[at % 128 // 64][row, at // 128 * 64 + at % 64]
            assert value == 16 * ((int(codes[row, at]) if at < k else 8) - 8)


def test_a_packed_weight_whose_buffer_is_not_aligned_unpacks() -> None:
    weight = Int8Weight.quantize(matrix(5, 7))
    packed = weight.pack("vnni64")
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), packed.codes])[3:]
    assert torch.equal(Int8Weight(shifted, packed.scales, packed.shape, "vnni64").canonical().codes, weight.codes)


def test_int8_codes_follow_the_static_rule_with_the_stored_scale() -> None:
    w = matrix(17, 53)
    w[3] = 0.0
    w[4] *= 1e-20
    weight = Int8Weight.quantize(w)
    rows = w.numpy()
    scales = np.where(np.abs(rows).max(1) < 2.0**-100, np.float32(1), np.abs(rows).max(1) / np.float32(127))
    codes = np.clip(np.rint(rows * (np.float32(1) / scales.astype(np.float32))[:, None]), -127, 127)
    np.testing.assert_array_equal(weight.scales.numpy(), scales.astype(np.float32))
    np.testing.assert_array_equal(weight.codes.numpy(), codes.astype(np.int8))
    assert weight.scales[3] == 1 and (weight.codes[3] == 0).all() and weight.codes[4].abs().max() == 127


def test_int4_error_is_at_most_half_a_step() -> None:
    w = matrix(40, 200)
    for symmetric in (True, False):
        weight = Int4Weight.quantize(w, 64, symmetric)
        step = weight.scales.float().repeat_interleave(64, dim=1)[:, :200]
        # Rounding the scale to float16 may move the largest value out of the grid by 15 half-ulps of the scale.
        assert ((weight.dequantize() - w).abs() <= step * (0.5 + 15 * 2**-11)).all()


def test_int4_symmetric_uses_the_full_grid_and_asymmetric_its_range() -> None:
    w = torch.linspace(-1, 1, 128).repeat(3, 1)
    codes = Int4Weight.quantize(w, 128).unpacked_codes()
    assert codes.min() == 0 and codes.max() == 15
    positive = Int4Weight.quantize(w.abs() + 0.5, 128, symmetric=False)
    assert positive.zeros is not None and (positive.zeros == 0).all() and positive.unpacked_codes().max() == 15


def test_int4_whole_zeros_are_added_after_rounding() -> None:
    # -0.5 and 0.5 are ties; with an odd zero, adding it first would round the other way.
    w = torch.tensor([[-0.5, 0.5, 1.5, 2.5]])
    weight = Int4Weight.quantize(w, scales=torch.ones(1, 1), zeros=torch.full((1, 1), 7.0))
    assert weight.unpacked_codes().tolist() == [[7, 7, 9, 9]]
    middle = Int4Weight.quantize(w, scales=torch.ones(1, 1), zeros=torch.full((1, 1), 7.5))
    assert middle.unpacked_codes().tolist() == [[7, 8, 9, 10]] and torch.equal(middle.dequantize(), w)


def test_int4_negative_scales_turn_the_grid_around() -> None:
    w = torch.arange(-7.0, 9)[None]
    turned = Int4Weight.quantize(w, 16, scales=torch.full((1, 1), -1.0))
    assert torch.equal(turned.dequantize(), w) and turned.unpacked_codes().tolist() == [list(range(15, -1, -1))]
    for zeros in (None, torch.full((1, 1), 3.5)):
        turned = Int4Weight.quantize(-w, 16, symmetric=False, scales=torch.full((1, 1), -0.5), zeros=zeros)
        plain = Int4Weight.quantize(w, 16, symmetric=False, scales=torch.full((1, 1), 0.5), zeros=zeros)
        assert torch.equal(turned.codes, plain.codes) and torch.equal(turned.dequantize(), -plain.dequantize())


def test_int4_tiny_groups_keep_a_normal_scale() -> None:
    weight = Int4Weight.quantize(torch.full((1, 64), 1e-6), 32)
    assert (weight.scales == 2.0**-14).all() and weight.dequantize().abs().max() <= 2.0**-14
    assert (Int4Weight.quantize(torch.zeros(1, 64), 32).scales == 1).all()


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_refused_with_its_row(kind: type, bad: float) -> None:
    w = matrix(6, 40)
    w[4, 2] = bad
    with pytest.raises(ValueError, match="row 4"):
        kind.quantize(w)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2), (1, 65537)])
def test_bad_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="weight must"):
        Int8Weight.quantize(torch.zeros(shape))
    with pytest.raises(ValueError, match="weight must"):
        Int4Weight.quantize(torch.zeros(shape))


def test_bad_scales_groups_and_layouts_are_refused() -> None:
    w = matrix(4, 64)
    for scales in (torch.zeros(4), torch.ones(3), torch.full((4,), float("nan"))):
        with pytest.raises(ValueError, match="scales must be 4 positive"):
            Int8Weight.quantize(w, scales)
    with pytest.raises(ValueError, match="group must be"):
        Int4Weight.quantize(w, 48)
    with pytest.raises(ValueError, match="scales must have shape"):
        Int4Weight.quantize(w, 32, scales=torch.ones(4, 1))
    with pytest.raises(ValueError, match="float16"):
        Int4Weight.quantize(w, 32, scales=torch.full((4, 2), -1e-6))
    with pytest.raises(ValueError, match="float16"):
        Int4Weight.quantize(w, 32, scales=torch.full((4, 2), 1e-6))
    with pytest.raises(ValueError, match="zeros must be finite"):
        Int4Weight.quantize(w, 32, scales=torch.ones(4, 2), zeros=torch.full((4, 2), float("inf")))
    with pytest.raises(ValueError, match="unknown layout 'x'"):
        Int8Weight.quantize(w).pack("x")
    with pytest.raises(ValueError, match="unknown layout 'x'"):
        Int4Weight.quantize(w).pack("x")


def test_int8_codes_are_products_with_the_inverse_not_quotients() -> None:
    """Near ties the two differ in a code; every backend must take the same side."""
    scales = torch.rand(4000, generator=torch.Generator().manual_seed(0)) + 0.5
    w = (torch.arange(-126, 126) + 0.5) * scales[:, None]
    product, quotient = torch.round(w * (1.0 / scales)[:, None]), torch.round(w / scales[:, None])
    assert (product != quotient).any()
    assert torch.equal(Int8Weight.quantize(w, scales).codes, product.clamp(-127, 127).to(torch.int8))


class _Made(TorchDispatchMode):
    """Bytes of every tensor that is made, by where it lies."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes[storage.data_ptr()] = storage.nbytes()
        return result

    def __enter__(self):
        self.bytes = {}
        return super().__enter__()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (Int8Weight, "vnni64"),
        (Int4Weight, "nibble64"),
        (Int8Weight, "rows16"),
        (Int4Weight, "halves128"),
    ],
)
def test_packing_makes_nothing_large_but_the_packed_form(kind, layout):
    """Copies beside it would be the peak of memory while a model is loaded."""
    weight = kind.quantize(torch.randn(1024, 512, generator=torch.Generator().manual_seed(0)))
    with _Made() as made:
        packed = weight.pack(layout)
    for tensor in (weight.codes, weight.scales, packed.codes, packed.scales):
        made.bytes.pop(tensor.untyped_storage().data_ptr(), None)
    assert max(made.bytes.values(), default=0) <= 64 * 512
