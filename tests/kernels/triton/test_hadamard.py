"""hadamard_transform by the interpreter against the reference, for every kind of width."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels import reference
from qkernels.triton import hadamard

WIDTHS = [1, 2, 8, 12, 16, 20, 28, 44, 64, 76, 80, 104, 140, 256, 384, 768, 1152, 1408, 2240, 4096]
#: One step of the type, where a float32 sum lies near a tie.
STEP = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("transpose", [False, True])
def test_widths(n: int, transpose: bool) -> None:
    for dtype, step in STEP.items():
        x = sample(3, n).to(dtype)
        out = torch.full_like(x, 1e4)
        assert qkernels.hadamard_transform(x, transpose, out=out) is out
        torch.testing.assert_close(out, reference.hadamard_transform(x, transpose), rtol=step, atol=1e-5)


@pytest.mark.parametrize("n", [12_288, 16_384, 140 * 128])
def test_rows_of_several_passes(n: int) -> None:
    assert {len(hadamard.passes(n, dtype)) for dtype in STEP} <= {2, 3}
    for dtype, step in STEP.items():
        x = sample(2, n).to(dtype)
        found = qkernels.hadamard_transform(x, True)
        torch.testing.assert_close(found, reference.hadamard_transform(x, True), rtol=step, atol=1e-5)
    back = qkernels.hadamard_transform(qkernels.hadamard_transform(x.float()), True)
    torch.testing.assert_close(back, x.float(), rtol=0, atol=1e-5)


def test_shapes_and_strides() -> None:
    x = sample(3, 4, 24)
    for view in (x, x[:, 0], x.transpose(0, 1), x[:, :, ::2], x[:0], x[0, 0], x[:1].expand(2, 4, 24)):
        found = qkernels.hadamard_transform(view)
        assert found.shape == view.shape
        torch.testing.assert_close(found, reference.hadamard_transform(view), rtol=0, atol=1e-5)


def test_gradient() -> None:
    x, g = sample(3, 24).requires_grad_(), sample(2, 3, 24)[1]
    qkernels.hadamard_transform(x).backward(g)
    torch.testing.assert_close(x.grad, reference.hadamard_transform(g, True), rtol=0, atol=1e-5)


def test_matrices_stay_where_captured_graphs_read_them() -> None:
    device = torch.device("cpu")
    first = hadamard._matrix(16, 1, False, 16, torch.float32, device)
    for padded in range(17, 217):
        hadamard._matrix(16, 1, False, padded, torch.float32, device)
    assert hadamard._matrix(16, 1, False, 16, torch.float32, device) is first
