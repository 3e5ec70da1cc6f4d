"""The matrices by their defining properties, and the transform against them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels
from qkernels.hadamard import base_matrix, base_order
from tests.kernels.oracles import dtypes, examples, f64, seeds

ORDERS = {
    1: True,
    12: False,
    20: False,
    28: True,
    36: True,
    44: False,
    60: False,
    68: False,
    76: True,
    104: False,
}  # -> symmetric
WIDTHS = [1, 2, 4, 8, 12, 16, 24, 48, 64, 80, 96, 112, 144, 176, 192, 256, 384, 640, 768, 1152, 1408, 1664]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}


@pytest.mark.parametrize("order,symmetric", ORDERS.items())
def test_base_matrices_are_hadamard(order, symmetric):
    h = base_matrix(order).numpy().astype(np.int64)
    assert (np.abs(h) == 1).all() and np.array_equal(h @ h.T, order * np.eye(order, dtype=np.int64))
    assert np.array_equal(h, h.T) == symmetric


def test_widths():
    expected = {
        64: 1,
        192: 12,
        384: 12,
        768: 12,
        3072: 12,
        640: 20,
        1280: 20,
        1152: 36,
        1408: 44,
        1664: 104,
        112: 28,
        4352: 68,
    }
    assert {n: base_order(n) for n in expected} == expected
    assert [n for n in range(1, 50) if base_order(n) is not None] == [
        1,
        2,
        4,
        8,
        12,
        16,
        20,
        24,
        28,
        32,
        36,
        40,
        44,
        48,
    ]
    for n in (3, 6, 52, 4304):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of width {n} is known"):
            qkernels.hadamard_transform(torch.zeros(2, n))


@pytest.mark.parametrize("n", WIDTHS)
def test_transform_of_the_unit_vectors(backend, n):
    """Column j of T is what becomes of e_j: a Kronecker product of the base matrix and Sylvester's, orthonormal."""
    t = f64(qkernels.hadamard_transform(torch.eye(n))).T
    m = base_order(n)
    expected = np.kron(base_matrix(m).numpy(), scipy.linalg.hadamard(n // m)) / np.sqrt(n)
    assert np.abs(t - expected).max() < 1e-6
    transposed = f64(qkernels.hadamard_transform(torch.eye(n), transpose=True)).T
    assert np.abs(transposed - expected.T).max() < 1e-6


@examples(25)
@given(seeds, st.sampled_from(WIDTHS), st.sampled_from([(), (1,), (3,), (2, 2), (0,)]), dtypes, st.booleans())
def test_there_and_back(backend, seed, n, lead, dtype, transpose):
    x = torch.randn(*lead, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out = torch.full(x.shape, 1e4).to(dtype)
    y = qkernels.hadamard_transform(x, transpose, out=out)
    assert y is out
    exact = f64(qkernels.hadamard_transform(torch.eye(n), not transpose))
    assert np.abs(f64(y) - f64(x) @ exact.T).max(initial=0) <= TOLERANCE[dtype]
    back = qkernels.hadamard_transform(y, not transpose)
    assert np.abs(f64(back) - f64(x)).max(initial=0) <= 2 * TOLERANCE[dtype]


def test_a_linear_map_keeps_its_result(backend):
    x, w = torch.randn(5, 192), torch.randn(7, 192)
    y = qkernels.hadamard_transform(x) @ qkernels.hadamard_transform(w).t()
    assert torch.allclose(y, x @ w.t(), atol=1e-4)


def test_gradient_is_the_transposed_transform(backend):
    x = torch.randn(3, 24, requires_grad=True)
    g = torch.randn(3, 24)
    qkernels.hadamard_transform(x).backward(g)
    assert torch.allclose(x.grad, qkernels.hadamard_transform(g, transpose=True))


def test_strided_and_large_rows(backend):
    x = torch.randn(40, 6, 5)
    assert torch.allclose(
        qkernels.hadamard_transform(x.transpose(0, 2)), qkernels.hadamard_transform(x.transpose(0, 2).contiguous())
    )
    x = torch.randn(2, 12288)
    assert torch.allclose(qkernels.hadamard_transform(qkernels.hadamard_transform(x), transpose=True), x, atol=1e-5)
