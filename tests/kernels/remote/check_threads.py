"""Every op on four threads, twice at once, under ThreadSanitizer: `make tsan`. A race ends the driver, and so the test.

Results are those of the ordinary build, bit for bit.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels
from qkernels import Int4Weight, Int8Weight, cpu
from tests.kernels import remote


def operands() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    w = floats(300, 200)
    return {
        "x": floats(413, 200),
        "codes": torch.randint(-127, 128, (413, 200), generator=generator, dtype=torch.int8),
        "rows": torch.rand(413, generator=generator) + 0.1,
        "groups": torch.rand(413, 2, generator=generator) + 0.1,
        "bias": floats(300),
        "residual": floats(413, 300),
        "w8": Int8Weight.quantize(w).pack("vnni64"),
        "w4": Int4Weight.quantize(w, 64, symmetric=False).pack("nibble64"),
        "image": floats(3, 3, 64, 96),
        "qkv": floats(3, 4, 67, 5, 32),
        "channels": floats(200).abs() + 0.1,
    }


def fake_quantized(x: torch.Tensor, scale: torch.Tensor, axis: int | None) -> tuple[torch.Tensor, ...]:
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = qkernels.fake_quantize(x, scale, None, -8, 7, "lsq", axis)
    (y * y.detach()).sum().backward()
    assert x.grad is not None and scale.grad is not None
    return y.detach(), x.grad, scale.grad


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int8_linear": lambda o: qkernels.int8_linear(o["codes"], o["rows"], o["w8"], o["bias"], "gelu", o["residual"]),
    "int8_linear in place": lambda o: qkernels.int8_linear(o["codes"], o["rows"], o["w8"]),
    "int8_linear to int8": lambda o: qkernels.int8_linear(o["codes"], o["rows"], o["w8"], out_scale=torch.tensor(3.0)),
    "int8_linear by groups": lambda o: qkernels.int8_linear(o["codes"], o["groups"], o["w8"], out_group=128),
    "int4_linear": lambda o: qkernels.int4_linear(o["codes"], o["rows"], o["w4"], o["bias"], "quick_gelu"),
    "int4_linear of floats": lambda o: qkernels.int4_linear(o["x"], None, o["w4"]),
    "int4_linear by groups": lambda o: qkernels.int4_linear(o["codes"], o["groups"], o["w4"], out_group=128),
    "quantize_per_token": lambda o: qkernels.quantize_per_token(o["x"], o["channels"]),
    "quantize_patches": lambda o: qkernels.quantize_patches(o["image"], 4),
    "layer_norm_quantize": lambda o: qkernels.layer_norm_quantize(o["x"], o["channels"], None, 1e-5),
    "channel_absmax": lambda o: qkernels.channel_absmax(o["x"]),
    "attention": lambda o: qkernels.attention(*o["qkv"].unbind(1)[:3], causal=True),
    "attention of bfloat16": lambda o: qkernels.attention(*o["qkv"].bfloat16().unbind(1)[:3]),
    "attention to int8": lambda o: qkernels.attention(*o["qkv"].unbind(1)[:3], out_dynamic=True),
    "fake_quantize": lambda o: fake_quantized(o["x"], torch.tensor(0.2), None),
    "fake_quantize by channel": lambda o: fake_quantized(o["x"], o["channels"], 1),
    "hadamard_transform": lambda o: qkernels.hadamard_transform(o["x"][:, :192].contiguous()),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_race(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := remote.missing("threads"):
        pytest.skip(why)
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")
    given = operands()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        cpu.use_tier(None)
        expected = CALLS[name](given)
        remote.install(monkeypatch, "threads")
        got = CALLS[name](given)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("planted", [False, True])
def test_tapes_played_tile_by_tile(planted: bool, tmp_path: Path) -> None:
    """Tiles that say that they are done before others may see what they wrote are found: the sanitizer does look."""
    if why := remote.missing("threads"):
        pytest.skip(why)
    csrc = shutil.copytree(remote.ROOT / "csrc/cpu", tmp_path / "csrc/cpu")
    if planted:
        text = (csrc / "program.h").read_text()
        assert text.count("memory_order_release") == 1
        (csrc / "program.h").write_text(text.replace("memory_order_release", "memory_order_relaxed"))
    flags = ["-std=c++17", "-O1", *remote.FLAGS["threads"], f"-I{csrc.parent}"]
    sources = [str(remote.HERE / "tape.cc"), str(csrc / "dispatch.cc")]
    subprocess.run(["g++", *flags, *sources, "-o", str(tmp_path / "tape")], check=True)
    environment = {"TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run([str(tmp_path / "tape")], env=environment, capture_output=True, text=True)
    assert ("data race" in run.stderr) == planted and (run.returncode != 0) == planted, run.stderr


def test_every_op_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the native module is asked for."""
    if why := remote.missing("threads"):
        pytest.skip(why)
    called: set[str] = set()
    given = operands()
    with cpu.native.noting(lambda name, arguments: called.add(name)):
        for call in CALLS.values():
            call(given)
    assert called == cpu.native.ops - {"peak_int8"}
