"""Speed of every op beside its rivals, each case checked before it is timed. A row holds the times of all contenders,
and under `asked` what is asked of them next to what was measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels
from qkernels import Int4Weight, Int8Weight

from . import oracle, timing
from .inputs import Inputs
from .machine import Machine

Row = dict[str, Any]
#: name, M, N, K, activation, asked share of the INT8 peak, asked ratio to bf16
GEMMS = [
    ("8k cube", 8192, 8192, 8192, None, 0.72, 1.7),
    ("4k cube", 4096, 4096, 4096, None, 0.72, 1.7),
    ("ViT-L/14 b64 qkv", 16448, 3072, 1024, None, 0.5, 1.4),
    ("ViT-L/14 b64 out", 16448, 1024, 1024, None, 0.5, 1.4),
    ("ViT-L/14 b64 fc1", 16448, 4096, 1024, "quick_gelu", 0.5, 1.4),
    ("ViT-L/14 b64 fc2", 16448, 1024, 4096, None, 0.5, 1.4),
    ("ViT-B/32 b256 qkv", 12800, 2304, 768, None, 0.4, 1.4),
    ("ViT-B/32 b256 out", 12800, 768, 768, None, 0.4, 1.4),
    ("ViT-B/32 b256 fc1", 12800, 3072, 768, "quick_gelu", 0.4, 1.4),
    ("ViT-B/32 b256 fc2", 12800, 768, 3072, None, 0.4, 1.4),
    ("ViT-L/14 b1 fc1", 257, 4096, 1024, "quick_gelu", None, None),
]
AUTOTUNED = ("4k cube", "ViT-L/14 b64 fc1")  # max-autotune takes half a minute per shape


def ask(what: str, asked: float, measured: float | None, unit: str = "x") -> Row:
    return {"what": what, "asked": asked, "measured": measured, "unit": unit}


def best(times: dict[str, Row], *names: str) -> float:
    """Seconds of the fastest of the named contenders; those that failed count as slow."""
    return min((times[n]["seconds"] for n in names if "seconds" in times.get(n, {})), default=float("inf"))


def ours(machine: Machine, call: Callable[[int], Any]) -> dict[str, Callable[[int], Any]]:
    """One contender per backend. The environment is read when the op is called, so also while it is captured."""

    def on(backend: str) -> Callable[[int], Any]:
        def run(number: int) -> Any:
            os.environ.update(QKERNELS_BACKEND=backend, QKERNELS_STRICT="1")  # no fall-back is timed
            return call(number)

        return run

    return {f"ours {name}": on(name) for name in machine.backends()}


def checked(machine: Machine, call: Callable[[int], Any], check: Callable[[Any], None]) -> dict[str, Callable]:
    """`ours`, without the backends whose result is wrong, that refuse or fail: their row says why."""
    found: dict[str, Callable] = {}
    for name, run in ours(machine, call).items():
        try:
            check(run(0))
            machine.synchronize()
            found[name] = run
        except Exception as error:
            machine.usable()  # raises where the device is lost
            found[name] = raiser(error)
    return found


def raiser(error: Exception) -> Callable[[int], Any]:
    def run(_: int) -> Any:
        raise error

    return run


# -- products --------------------------------------------------------------------------------------------------------


def gemms(machine: Machine, autotune: bool = False) -> Iterator[Row]:
    inputs = Inputs(machine)
    for name, m, n, k, activation, share, ratio in GEMMS:
        if autotune and name not in AUTOTUNED:
            continue
        if machine.tiny:
            m, n, k = m % 7 + 17, n % 5 + 16, 32
        count = timing.sets_for(machine, m * k + n * k + 2 * m * n)
        weights = [Int8Weight.quantize(inputs.randn(n, k)) for _ in range(count)]
        bias, scale = inputs.randn(n), inputs.rand(m) * 0.02
        x = [inputs.codes(m, k) for _ in range(count)]
        y = [inputs.poison(m, n, dtype=torch.bfloat16) for _ in range(count)]
        packed = [qkernels.pack(w) for w in weights]

        def call(i: int, x=x, y=y, packed=packed, scale=scale, bias=bias, activation=activation) -> Tensor:
            return qkernels.int8_linear(x[i], scale, packed[i], bias, activation, out_dtype=torch.bfloat16, out=y[i])  # type: ignore[return-value]

        def check(got: Tensor, x=x, scale=scale, w=weights[0], bias=bias, activation=activation) -> None:
            linear = oracle.linear8(x[0][:256], scale[:256], w.codes, w.scales, bias)
            oracle.near_floats(got[:256], *oracle.finish(*linear, activation, None), "int8_linear")

        contenders = checked(machine, call, check)
        halves = [(inputs.randn(m, k, dtype=torch.bfloat16), inputs.randn(n, k, dtype=torch.bfloat16)) for _ in x]
        half_bias = bias.bfloat16()
        contenders["bf16 F.linear"] = lambda i, h=halves, b=half_bias: F.linear(*h[i], b)

        def composed(
            x: Tensor, scale: Tensor, codes: Tensor, scales: Tensor, bias: Tensor, activation: str | None = activation
        ) -> Tensor:
            y = torch._int_mm(x, codes.t()).float() * scale[:, None] * scales + bias
            return oracle.activate(y, activation).bfloat16()

        if not machine.tiny:
            torch._dynamo.reset()
            mode = "max-autotune-no-cudagraphs" if autotune else None
            rival = torch.compile(composed, dynamic=False, mode=mode)
            contenders["max-autotune" if autotune else "_int_mm compiled"] = (
                lambda i, r=rival, x=x, s=scale, w=weights, b=bias: r(x[i], s, w[i].codes, w[i].scales, b)
            )
        else:
            contenders["_int_mm"] = lambda i, r=composed, x=x, s=scale, w=weights, b=bias: r(
                x[i], s, w[i].codes, w[i].scales, b
            )
        times = timing.compare(machine, contenders, count)
        mine, operations = best(times, *ours(machine, call)), 2.0 * m * n * k
        asked, peak = [], machine.int8_peak
        if share is not None:
            asked.append(
                ask(f"{name}: share of INT8 peak", share, operations / mine / peak if peak else None, "of peak")
            )
            asked.append(ask(f"{name}: over bf16 cuBLAS", ratio, times["bf16 F.linear"]["seconds"] / mine))
        rivals = [r for r in ("_int_mm compiled", "max-autotune") if r in times]
        if rivals:
            asked.append(ask(f"{name}: over {' / '.join(rivals)}", 1.1, best(times, *rivals) / mine))
        yield {
            "op": "int8_linear",
            "case": name,
            "shape": [m, n, k],
            "times": times,
            "asked": asked,
            "tops": {c: operations / t["seconds"] / 1e12 for c, t in times.items() if "seconds" in t},
        }


def autotuned(machine: Machine) -> Iterator[Row]:
    return gemms(machine, autotune=True)


def int4(machine: Machine) -> Iterator[Row]:
    """W4A16 at few rows against weights that no cache holds, and W4A8 beside it at more rows."""
    inputs, bandwidth = Inputs(machine), timing.copy_bandwidth(machine)
    n, k = (48, 64) if machine.tiny else (16384, 4096)
    count = timing.sets_for(machine, n * k // 2)
    weights = [Int4Weight.quantize(inputs.randn(n, k)) for _ in range(count)]
    packed = [qkernels.pack(w) for w in weights]
    halves = [w.dequantize().bfloat16() for w in weights]
    stored = n * k // 2 + 2 * weights[0].scales.numel()
    for m in (1, 4, 16, 64, 128, 256):
        x = inputs.randn(m, k, dtype=torch.bfloat16)
        codes, scale = qkernels.quantize_per_token(x)
        bound, scales = oracle.linear4(x, None, weights[0].dequantize().double(), 1, None), scale.clone()

        def w4a16(i: int, x=x) -> Tensor:
            return qkernels.int4_linear(x, None, packed[i], out_dtype=torch.bfloat16)  # type: ignore[return-value]

        def w4a8(i: int, codes=codes, scales=scales) -> Tensor:
            return qkernels.int4_linear(codes, scales, packed[i], out_dtype=torch.bfloat16)  # type: ignore[return-value]

        contenders = {
            f"W4A16 {c}": f
            for c, f in checked(
                machine, w4a16, lambda y, b=bound: oracle.near_floats(y, b[0], b[1] + 1e-6, "W4A16")
            ).items()
        }
        contenders |= {f"W4A8 {c}": f for c, f in ours(machine, w4a8).items()}
        contenders["bf16 F.linear"] = lambda i, x=x: F.linear(x, halves[i])
        times = timing.compare(machine, contenders, count)
        a16 = best(times, *(c for c in times if c.startswith("W4A16")))
        a8 = best(times, *(c for c in times if c.startswith("W4A8")))
        if m <= 16:
            asked = [
                ask(f"W4A16 M={m}: over bf16", 3.3, times["bf16 F.linear"]["seconds"] / a16),
                ask(f"W4A16 M={m}: weight bytes / copy bandwidth", 0.8, stored / a16 / bandwidth, "of copy"),
            ]
        else:
            asked = [ask(f"W4A8 M={m}: over W4A16", 1.2, a16 / a8)]
        yield {
            "op": "int4_linear",
            "case": f"M={m}",
            "shape": [m, n, k],
            "times": times,
            "asked": asked,
            "copy_bytes_a_second": bandwidth,
        }


# -- rows and attention ----------------------------------------------------------------------------------------------


def _eager_quantize(y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.float()
    scale = y.abs().amax(-1, keepdim=True) / 127
    return (y / scale).round().clamp(-127, 127).to(torch.int8), scale


def _eager_fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """LSQ as everybody writes it: rounding passes the gradient, the rest is autograd's."""
    v = (x.float() / scale).clamp(-8, 7)
    return (((v.round() - v).detach() + v) * scale).to(x.dtype)


def rows(machine: Machine) -> Iterator[Row]:
    """Ops bound by memory: as a share of the copy bandwidth of the same run, and beside eager torch."""
    inputs, bandwidth = Inputs(machine), timing.copy_bandwidth(machine)
    m = 32 if machine.tiny else 16448
    narrow, wide = (64, 128) if machine.tiny else (1024, 4096)

    def measured(
        case: str,
        bytes_a_call: int,
        mine: Callable[[int], Any],
        eager: Callable[[int], Any],
        sets: int,
        check: Callable[[Any], None],
        share: bool = True,
    ) -> Row:
        contenders = checked(machine, mine, check) | {"eager torch": eager}
        if not machine.tiny:
            torch._dynamo.reset()
        times = timing.compare(machine, contenders, sets)
        seconds = best(times, *ours(machine, mine))
        asked = [ask(f"{case}: over eager torch", 3.0, times["eager torch"]["seconds"] / seconds)]
        if share:
            asked.insert(0, ask(f"{case}: of copy bandwidth", 0.85, bytes_a_call / seconds / bandwidth, "of copy"))
        return {
            "op": case.split()[0],
            "case": case,
            "times": times,
            "asked": asked,
            "bytes": bytes_a_call,
            "copy_bytes_a_second": bandwidth,
        }

    def near(got: Any, want: tuple[Tensor, Tensor]) -> None:
        oracle.require(((got[0].double() - want[0].double()).abs() <= 1).all(), "codes are off by more than a step")

    for op, width in (("layer_norm_quantize", narrow), ("quantize_per_token", wide)):
        sets = timing.sets_for(machine, 3 * m * width)
        x = [inputs.randn(m, width, dtype=torch.bfloat16) for _ in range(sets)]
        gamma, beta = inputs.rand(width) + 0.5, inputs.randn(width)
        half = (gamma.bfloat16(), beta.bfloat16())
        if op == "layer_norm_quantize":
            mine = lambda i, x=x, g=gamma, b=beta: qkernels.layer_norm_quantize(x[i], g, b, 1e-5)  # noqa: E731
            eager = lambda i, x=x, h=half, w=width: _eager_quantize(F.layer_norm(x[i], (w,), *h))  # noqa: E731
            exact = _eager_quantize(F.layer_norm(x[0].float(), (width,), gamma, beta))
        else:
            mine = lambda i, x=x: qkernels.quantize_per_token(x[i])  # noqa: E731
            eager = lambda i, x=x: _eager_quantize(x[i])  # noqa: E731
            exact = _eager_quantize(x[0])
        case = f"{op} {m}x{width} bf16"
        yield measured(case, 3 * m * width + 4 * m, mine, eager, sets, lambda got, e=exact: near(got, e))

    sets = timing.sets_for(machine, 10 * m * narrow)
    x = [inputs.randn(m, narrow, dtype=torch.bfloat16).requires_grad_() for _ in range(sets)]
    grad = [inputs.randn(m, narrow, dtype=torch.bfloat16) for _ in range(sets)]
    scale = torch.tensor(0.2, device=machine.device, requires_grad=True)

    def lsq(i: int) -> Tensor:
        return qkernels.fake_quantize(x[i], scale, None, -8, 7, "lsq", grad_scale=0.01)

    def eager_lsq(i: int) -> Tensor:
        return _eager_fake_quantize(x[i], scale)

    def backward(f: Callable[[int], Tensor]) -> Callable[[int], Any]:
        return lambda i: torch.autograd.grad(f(i), (x[i], scale), grad[i])

    want = eager_lsq(0)
    yield measured(
        f"fake_quantize forward {m}x{narrow} bf16",
        4 * m * narrow,
        lsq,
        eager_lsq,
        sets,
        lambda y: oracle.require(((y - want).abs() <= 0.21).all(), "off by more than a step"),
    )
    yield measured(
        f"fake_quantize forward+backward {m}x{narrow} bf16",
        10 * m * narrow,
        backward(lsq),
        backward(eager_lsq),
        sets,
        lambda _: None,
    )
    plain = [t.detach() for t in x]
    yield measured(
        f"channel_absmax {m}x{narrow} bf16",
        2 * m * narrow,
        lambda i: qkernels.channel_absmax(plain[i]),
        lambda i: plain[i].abs().amax(0),
        sets,
        lambda y: oracle.equal(y, plain[0].abs().amax(0), "maxima"),
        share=False,
    )
    matrix = oracle.hadamard(narrow, machine.device)
    half_matrix = matrix.bfloat16()

    def near_transform(y: Tensor) -> None:
        want = plain[0].double() @ matrix.T
        oracle.require(((y.double() - want).abs() <= 0.02 * want.abs().amax()).all(), "off by more than 2 %")

    yield measured(
        f"hadamard_transform {m}x{narrow} bf16",
        4 * m * narrow,
        lambda i: qkernels.hadamard_transform(plain[i]),
        lambda i: plain[i] @ half_matrix,
        sets,
        near_transform,
        share=False,
    )


def attention(machine: Machine) -> Iterator[Row]:
    """int8 out beside scaled_dot_product_attention, which leaves bf16 and its quantization to others."""
    inputs = Inputs(machine)
    shapes = [(64, 257, 16, 64), (256, 50, 12, 64), (32, 577, 16, 64)]
    for batch, length, heads, d in [(2, 9, 2, 16)] if machine.tiny else shapes:
        sets = timing.sets_for(machine, 7 * batch * length * heads * d)
        q, k, v = ([inputs.randn(batch, length, heads, d, dtype=torch.bfloat16) for _ in range(sets)] for _ in range(3))

        def call(i: int, q=q, k=k, v=v) -> Any:
            return qkernels.attention(q[i], k[i], v[i], out_dynamic=True)

        def sdpa(i: int, q=q, k=k, v=v) -> Tensor:
            return F.scaled_dot_product_attention(*(t[i].transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

        def check(got: Any, sdpa=sdpa) -> None:
            want = sdpa(0).double()
            away = got[0].double() * got[1].double()[:, :, None, None] - want
            oracle.require(away.norm() <= 0.02 * want.norm(), "attention is off by more than 2 %")

        contenders: dict[str, Callable[[int], Any]] = dict(checked(machine, call, check))
        contenders["sdpa bf16"] = sdpa
        contenders["sdpa bf16 + eager quantization"] = lambda i, f=sdpa: _eager_quantize(f(i).flatten(2))
        yield {
            "op": "attention",
            "case": f"{batch}x{length}x{heads}x{d}",
            "asked": [],
            "times": timing.compare(machine, contenders, sets),
        }
