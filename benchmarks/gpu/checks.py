"""Every op at many shapes against `oracle`, and what all of them must survive: a stream of its own, more than 2^31
elements. A part of the suite is one op on one backend.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

import qkernels
from qkernels import Int4Weight, Int8Weight

from . import check_products, check_rows, oracle
from .inputs import Case, Inputs
from .machine import Machine
from .oracle import WrongError


def streams_and_sizes(inputs: Inputs) -> Iterator[Case]:
    """A stream of its own with late inputs; more than 2^31 elements. On a GPU only."""
    if inputs.device.type != "cuda":
        return

    def late() -> None:
        weight = qkernels.pack(Int8Weight.quantize(inputs.randn(512, 768)))
        real, x = inputs.randn(300, 768), inputs.poison(300, 768)
        want = qkernels.int8_linear(*qkernels.quantize_per_token(real), weight)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some ten milliseconds, in which another stream would read the poison
            x.copy_(real)
            got = qkernels.int8_linear(*qkernels.quantize_per_token(x), weight)
        stream.synchronize()
        oracle.equal(got, want, "on a stream of its own")

    def many(op: Callable[..., Any], width: int = 1024, outputs: int = 1024, dtype: Any = torch.bfloat16) -> None:
        rows = 2**31 // outputs + 3
        if torch.cuda.mem_get_info()[0] < 5 * rows * max(width, outputs):
            raise qkernels.FallbackError("not enough free memory for more than 2^31 elements")
        x = torch.zeros(rows, width, dtype=dtype, device=inputs.device)
        x[-3:] = inputs.codes(3, width)
        for whole, part in zip(op(x), op(x[-3:].clone()), strict=True):
            oracle.equal(whole[-3:], part, "last rows")

    def linear(bits: int, **options: Any) -> Callable[[torch.Tensor], Any]:
        kind, op = (Int8Weight, qkernels.int8_linear) if bits == 8 else (Int4Weight, qkernels.int4_linear)
        weight = qkernels.pack(kind.quantize(inputs.randn(4096, 64)))

        def run(x: torch.Tensor) -> Any:
            y = op(x, 0.01, weight, **options)
            return y if isinstance(y, tuple) else (y,)

        return run

    yield "late inputs on a stream", late
    yield "quantize_per_token beyond 2^31", lambda: many(qkernels.quantize_per_token)
    yield "layer_norm_quantize beyond 2^31", lambda: many(lambda x: qkernels.layer_norm_quantize(x, None, None, 1e-5))
    yield "hadamard_transform beyond 2^31", lambda: many(lambda x: (qkernels.hadamard_transform(x),))
    yield "fake_quantize beyond 2^31", lambda: many(lambda x: (qkernels.fake_quantize(x, 0.1, None, -8, 7, "ste"),))
    for bits in (8, 4):
        for options in ({"out_dtype": torch.bfloat16}, {"out_group": 128}):
            yield (
                f"int{bits}_linear beyond 2^31 {options}",
                lambda b=bits, o=options: many(linear(b, **o), 64, 4096, torch.int8),
            )


OPS: dict[str, Callable[[Inputs], Iterator[Case]]] = {
    f.__name__: f
    for f in (
        check_products.int8_linear,
        check_products.int4_linear,
        check_products.attention,
        check_rows.layer_norm_quantize,
        check_rows.quantize_per_token,
        check_rows.quantize_patches,
        check_rows.fake_quantize,
        check_rows.channel_absmax,
        check_rows.smooth_scale,
        check_rows.hadamard_transform,
        streams_and_sizes,
    )
}


def run(machine: Machine, op: str, backend: str, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Every case of `op` on `backend`, the first `most` where given: one row. What the backend refuses in words is
    counted apart; anything else that is raised is a failure."""
    os.environ.update(QKERNELS_BACKEND=backend, QKERNELS_STRICT="1")
    row: dict[str, Any] = {"op": op, "backend": backend, "cases": 0, "failed": [], "refused": {}}
    for name, check in itertools.islice(OPS[op](Inputs(machine)), most):
        row["cases"] += 1
        try:
            check()
            machine.synchronize()
        except qkernels.FallbackError as error:
            row["refused"].setdefault(str(error)[:300], []).append(name)
        except WrongError as error:
            row["failed"].append(f"{name}: {error}")
        except Exception as error:
            row["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            machine.usable()  # raises where the device is lost, and with it the rest of this part
    yield row
