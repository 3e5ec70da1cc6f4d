"""Tensors of more than 2^31 elements: every kernel runs on the first and the last tile of one, by the interpreter,
which raises where 32 bits overflow. What no tile touches takes no memory."""

from __future__ import annotations

import builtins

import pytest
import torch

import qkernels
from qkernels import Int4Weight, Int8Weight, dispatch, triton
from qkernels.triton import function, launch

FAR = 2**31


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """None here: what no tile touches is to take no memory."""


@pytest.fixture(autouse=True)
def ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a grid's axis the first and the last two programs run, each of which takes one tile."""
    from triton.runtime import interpreter

    def ends(count: int, *more: int) -> list[int] | range:
        return [0, count - 2, count - 1] if not more and count > 64 else builtins.range(count, *more)

    monkeypatch.setattr(interpreter, "range", ends, raising=False)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # would copy onto itself
    monkeypatch.setattr(launch, "INTERPRETER", launch.Chip(90, 2**30, 227 * 1024))


def sparse(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, width]` of which the last two rows hold something, and those rows."""
    x = torch.empty(rows, width, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    x[-2:] = (20 * torch.randn(2, width, generator=generator)).clamp(-127, 127).to(dtype)
    return x, x[-2:].clone()


def check(whole: object, part: object) -> None:
    """The end of the last row of every result of all rows is that of the last rows alone."""
    for got, want in zip(*((y if isinstance(y, tuple) else (y,)) for y in (whole, part)), strict=True):
        end = max(1, want[-1].numel() // 256)
        assert torch.equal(got[-1].view(-1)[-end:], want[-1].view(-1)[-end:])


@pytest.mark.parametrize("width", [4096, 12288], ids=["in registers", "in a loop"])
@pytest.mark.parametrize("name", ["quantize_per_token", "layer_norm_quantize"])
def test_rows_to_codes(name: str, width: int) -> None:
    rest = (None, None, 1e-5) if name == "layer_norm_quantize" else ()
    x, last = sparse(FAR // width + 3, width, torch.float16)
    check(getattr(qkernels, name)(x, *rest), getattr(qkernels, name)(last, *rest))


def test_patches() -> None:
    x = torch.empty(FAR // (3 * 512 * 512) + 2, 3, 512, 512, dtype=torch.float16)
    x[-1] = torch.randn(3, 512, 512, generator=torch.Generator().manual_seed(0)).half()
    codes, scales = qkernels.quantize_patches(x, 16)
    want = qkernels.quantize_patches(x[-1:, :, -16:, -16:].clone(), 16)
    assert torch.equal(codes[-1, -1:], want[0][0]) and torch.equal(scales[-1, -1:], want[1][0])


def test_hadamard() -> None:
    for width in (64, 8192):  # in one pass, and in two
        x, last = sparse(FAR // width + 3, width, torch.float16)
        check(qkernels.hadamard_transform(x), qkernels.hadamard_transform(last))


@pytest.mark.parametrize("shape", [(1, FAR + 70_000), (FAR // 4096 + 3, 4096)], ids=["one run", "rows"])
def test_fake_quantize(shape: tuple[int, int]) -> None:
    rows, width = shape
    x = torch.empty(shape, dtype=torch.float16)
    ends = x.view(-1)[:4096], x.view(-1)[-4096:]
    for seed, end in enumerate(ends):
        end[:] = torch.randn(4096, generator=torch.Generator().manual_seed(seed)).half()
    want = [qkernels.fake_quantize(end.clone(), 0.1, None, -8, 7, "ste") for end in ends]
    for options in ({}, {"group": 64}) if rows > 1 else ({},):
        scale = torch.full((rows, width // 64), 0.1) if options else 0.1
        got = qkernels.fake_quantize(x, scale, None, -8, 7, "ste", **options)
        assert torch.equal(got.view(-1)[:4096], want[0]) and torch.equal(got.view(-1)[-4096:], want[1])


def test_gradients_of_fake_quantize() -> None:
    width = 4096
    x, last = sparse(FAR // width + 3, width, torch.float16)
    scale = torch.full((len(x),), 0.5)
    backward = function("fake_quantize_backward")
    dx, dscale, _ = backward(x, x, scale, None, -8, 7, "lsq", axis=0)
    want, dwant, _ = backward(last, last, scale[-2:], None, -8, 7, "lsq", axis=0)
    check((dx, dscale), (want, dwant))


def test_maxima() -> None:
    """Rows far apart, by a stride of 32 bits."""
    stride = FAR // 2 + 64
    x = torch.empty(2 * stride + 200, dtype=torch.float16).as_strided((3, 200), (stride, 1))
    x[:] = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(qkernels.channel_absmax(x), x.float().abs().amax(0))


@pytest.mark.parametrize("form", ["pointers", "descriptors"])
@pytest.mark.parametrize("out", ["float", "group", "tensor", "residual"])
@pytest.mark.parametrize("bits", [8, 4])
def test_results_of_linear_maps(bits: int, out: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETER", launch.Chip(90 if form == "descriptors" else 80, 2**30, 227 * 1024))
    n, k = 16_384, 144
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    weight = qkernels.pack(Int8Weight.quantize(w) if bits == 8 else Int4Weight.quantize(w, group=128))
    x, last = sparse(FAR // n + 3, k, torch.int8)
    options: dict = {"out_group": 128} if out == "group" else {"out_scale": 3.0} if out == "tensor" else {}
    residuals: tuple = (None, None)
    if out == "residual":
        residuals = sparse(len(x), n, torch.float16, 2)
    linear = qkernels.int8_linear if bits == 8 else qkernels.int4_linear
    whole, part = (
        linear(rows, 0.01, weight, residual=residual, out_dtype=torch.float16, **options)
        for rows, residual in zip((x, last), residuals, strict=True)
    )
    check(whole, part)


REFUSED = {
    "rows": ("quantize_per_token", (torch.zeros(1, 1).expand(FAR, 1),)),
    "values": ("channel_absmax", (torch.zeros(1, 1).expand(1, FAR),)),
    "image": ("quantize_patches", (torch.zeros(1, 1, 1, 1).expand(1, 3, 2**15, 2**15), 16, 16)),
    "sequence": ("attention", (torch.zeros(1, 1, 1, 1).expand(1, 2**20, 32, 64),) * 3),
    "mask": (
        "attention",
        (*(torch.zeros(1, 1, 1, 1).expand(1, 2**16, 1, 8),) * 3, torch.zeros(1, 1, 1, 1)),
    ),
    "runs": (
        "fake_quantize",
        (torch.zeros(1, 1).expand(FAR // 2, 4), torch.zeros(1, 1).expand(FAR // 2, 4), None, -8, 7, "ste", None, 1),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_32_bits_cannot_count_is_refused_in_words(name: str) -> None:
    op, arguments = REFUSED[name]
    reason = triton.supports(op, *arguments)
    assert reason is not None and reason.startswith("counts ") and reason.endswith("; split the tensor")
    with pytest.raises(dispatch.FallbackError, match="split the tensor"):
        dispatch.select(op, "cpu", *arguments)
