"""The CUDA INT8 linear map on a CPU: its own loops, maps and epilogue over models of the instructions (emulator.cc),
called through `qkernels.cuda` and compared with exact sums and the contract's bounds."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import Int8Weight, cuda, reference
from qkernels.abi import Parameters
from qkernels.contract import Epilogue
from tests.kernels.fresh_memory import guarded
from tests.kernels.linear_cases import Exact, check_codes, check_float, check_groups, finish

DEFINITIONS = (Path(__file__).parents[3] / "csrc/cuda/ops.def").read_text()
PARAMETERS = Parameters(re.search(r"QK_CUDA_OP\(int8_linear, (.*?)\)", DEFINITIONS, re.S)[1])  # type: ignore[index]
WIDE = ("m", "x_pitch", "code_pitch")  # 64 bits

#: chip, configuration, and the tile that it makes
CONFIGURATIONS = {
    "sm_90 narrow": (90, 0, 64, 128),
    "sm_90 square": (90, 1, 128, 128),
    "sm_90 deep": (90, 2, 128, 256),
    "sm_80 narrow": (80, 0, 64, 128),
    "sm_80 square": (80, 1, 128, 128),
}


class Emulated:
    """`qkernels.cuda.int8_linear` on a chip with `processors` multiprocessors."""

    def __init__(self, emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.emulator, self.chip, self.processors, self.seed = emulator, 90, 2, 0
        monkeypatch.setattr(cuda, "launch", self.launch)

    def launch(self, name: str, device: torch.device, **arguments: Any) -> None:
        assert name == "int8_linear" and device.type == "cpu"
        pointers = {PARAMETERS.names[place] for place in PARAMETERS.pointers}
        typed = [
            ctypes.c_void_p(word) if name in pointers else ctypes.c_int64(word) if name in WIDE else ctypes.c_int(word)
            for name, word in zip(PARAMETERS.names, PARAMETERS.words(arguments), strict=True)
        ]
        head = (ctypes.c_int(self.chip), ctypes.c_int(self.processors), ctypes.c_uint(self.seed))
        assert self.emulator.emulate_int8_linear(*head, *typed) == 0, self.emulator.emulator_message().decode()


@pytest.fixture
def emulated(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(emulator, monkeypatch)


def codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def packed(w: torch.Tensor, scales: torch.Tensor | None = None) -> Int8Weight:
    scales = torch.ones(w.shape[0]) if scales is None else scales
    return Int8Weight(w, scales, (w.shape[0], w.shape[1])).pack("rows16")


def test_tiles_come_once_and_banks_do_not_collide(emulator: Any) -> None:
    assert emulator.emulator_check_maps() == 0, emulator.emulator_message().decode()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_sums_are_exact_around_every_tile(name: str, emulated: Emulated) -> None:
    """Sizes at, before and after a tile, depths at, before and after a stage, with more and fewer tiles than blocks;
    the last round has the largest magnitudes in all sign patterns."""
    chip, configuration, tile_m, tile_n = CONFIGURATIONS[name]
    emulated.chip = chip
    generator = torch.Generator().manual_seed(0)
    cases = [
        (1, 1, 1),
        (tile_m - 1, tile_n + 1, 127),
        (tile_m, tile_n, 128),
        (tile_m + 1, tile_n - 1, 129),
        (3 * tile_m + 5, tile_n + 3, 64),
        (17, 2 * tile_n, 1301),
        (9 * tile_m - 2, 2 * tile_n - 7, 48),
    ]
    for number, (m, n, k) in enumerate(cases):
        emulated.seed, emulated.processors = number, 1 + number % 3
        x, w = codes(generator, m, k), codes(generator, n, k)
        if number == len(cases) - 1:
            x, w = 127 * x.sign(), 127 * w.sign()
        out = guarded((m, n), torch.float32)
        cuda.int8_linear(x, torch.ones(()), packed(w), out=out, configuration=configuration)
        assert torch.equal(out.long(), x.long() @ w.long().t()), (m, n, k)


@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_loads_and_consumers_breaks_the_pipeline(seed: int, emulated: Emulated) -> None:
    """One block, several tiles, fewer and more steps than stages: every interleaving ends, with the same sums."""
    generator = torch.Generator().manual_seed(seed)
    emulated.seed, emulated.processors = 100 * seed, 1
    configuration, k = seed % 3, (100, 300, 700, 1290)[seed % 4]
    x, w = codes(generator, 5 * 64 + 3, k), codes(generator, 130, k)
    got = cuda.int8_linear(x, torch.ones(()), packed(w), configuration=configuration)
    assert torch.equal(got.long(), x.long() @ w.long().t())


EPILOGUES = [
    dict(out_dtype=torch.float32, activation=None, residual=None, bias=False),
    dict(out_dtype=torch.float32, activation="gelu", residual=torch.float32, bias=True),
    dict(out_dtype=torch.bfloat16, activation="quick_gelu", residual=None, bias=True),
    dict(out_dtype=torch.bfloat16, activation=None, residual=torch.bfloat16, bias=True),
    dict(out_dtype=torch.float16, activation="gelu_tanh", residual=torch.float16, bias=True),
    dict(static="scalar", activation="gelu", residual=None, bias=True),
    dict(static="zero point", activation="quick_gelu", residual=torch.float32, bias=True),
    dict(static="channel", activation=None, residual=None, bias=False),
    dict(group=128, activation="quick_gelu", residual=None, bias=True),
    dict(group=128, activation=None, residual=torch.bfloat16, bias=True),
]


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: "-".join(str(v) for v in e.values()))
@pytest.mark.parametrize("n", [272, 270, 269], ids=["wide", "pairs that begin elsewhere", "single"])
@pytest.mark.parametrize("kind", ["scalar", "row", "group"])
def test_epilogues_within_the_contract(epilogue: dict, n: int, kind: str, emulated: Emulated) -> None:
    """Every way out, over rows that begin at 16 bytes and rows that do not; activation scales of all three kinds."""
    index = EPILOGUES.index(epilogue)
    name = list(CONFIGURATIONS)[(index + n) % 5]
    emulated.chip, configuration, _, _ = CONFIGURATIONS[name]
    generator = torch.Generator().manual_seed(index)
    m, k = 70, 200
    x, w = codes(generator, m, k), codes(generator, n, k)
    shape = {"scalar": (), "row": (m,), "group": (m, 2)}[kind]
    x_scale = torch.rand(shape, generator=generator) * 0.01 + 0.001
    scales = torch.rand(n, generator=generator) * 0.01 + 0.001
    bias = torch.randn(n, generator=generator) if epilogue["bias"] else None
    residual = None
    if epilogue["residual"] is not None:
        residual = torch.randn(m, n, generator=generator).to(epilogue["residual"])
    spread = x_scale.double().reshape(-1, 1)
    if kind == "group":
        spread = x_scale.double().repeat_interleave(128, dim=1)[:, :k]
    scaled, absolute = x.double() * spread, x.double().abs() * spread
    linear = scaled @ (w.double() * scales.double()[:, None]).t()
    size = absolute @ (w.double().abs() * scales.double()[:, None]).t()
    if bias is not None:
        linear, size = linear + bias.double(), size + bias.double().abs()
    exact: Exact = finish(linear, size, 4, epilogue["activation"], residual)
    static, group = epilogue.get("static"), epilogue.get("group")
    out_scale = zero = None
    if static is not None:
        out_scale = torch.tensor(0.05) if static != "channel" else torch.rand(n, generator=generator) * 0.1 + 0.02
        zero = torch.tensor(-7.0) if static == "zero point" else None
    dtype = torch.int8 if static or group else epilogue["out_dtype"]
    out = guarded((m, n), dtype)
    outputs = (out, guarded((m, -(-n // 128)), torch.float32)) if group else out
    cuda.int8_linear(
        x,
        x_scale,
        packed(w, scales),
        Epilogue(
            bias=bias,
            activation=epilogue["activation"],
            residual=residual,
            out_scale=out_scale,
            out_zero_point=zero,
            out_group=group,
            out_dtype=epilogue.get("out_dtype", torch.float32),
        ),
        out=outputs,
        configuration=configuration,
    )
    if group:
        check_groups(*outputs, exact)
    elif static:
        check_codes(out, exact, out_scale, 0.0 if zero is None else float(zero))
    else:
        check_float(out, exact)


@pytest.mark.parametrize("chip", [80, 90])
def test_rows_that_are_not_finite_and_rows_of_zeros(chip: int, emulated: Emulated) -> None:
    """As in the reference: NaN and Inf reach a float result, and become code 0 and scale NaN; tiny rows get scale 1."""
    emulated.chip = chip
    generator = torch.Generator().manual_seed(1)
    x, w = codes(generator, 6, 40), codes(generator, 144, 40)
    x_scale = torch.tensor([1.0, float("nan"), float("inf"), 0.0, 1e-33, 1e-3])
    weight = packed(w, torch.rand(144, generator=generator) * 1e-3)
    for options in (
        {},
        {"out_group": 128},
        {"out_scale": torch.tensor(0.1)},
        {"out_scale": torch.tensor(0.0)},
        {"out_scale": torch.tensor(float("nan"))},
        {"out_dtype": torch.bfloat16, "activation": "quick_gelu"},
    ):
        got, want = (
            cuda.int8_linear(x, x_scale, weight, Epilogue(**options)),
            reference.int8_linear(x, x_scale, weight, Epilogue(**options)),
        )
        for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6, equal_nan=True)


def test_inputs_of_any_stride_and_empty_ones(emulated: Emulated) -> None:
    generator = torch.Generator().manual_seed(2)
    w = codes(generator, 33, 48)
    wide = codes(generator, 5, 3, 96)
    one = torch.ones(())
    for x in (
        wide[..., :48],
        wide[..., 1:49],
        wide[..., ::2],
        wide[:, :1, :48].expand(5, 3, 48),
        wide[..., :48][1:, ::2],
    ):
        got = cuda.int8_linear(x, one, packed(w))
        assert torch.equal(got.long(), x.long() @ w.long().t()) and got.shape == (*x.shape[:-1], 33)
    assert cuda.int8_linear(wide[:0, :, :48], one, packed(w)).shape == (0, 3, 33)
    assert cuda.supports("int8_linear", wide, one, packed(w)) == "runs on NVIDIA GPUs, and these tensors are on 'cpu'"
