"""What is installed, what was built, and what will run here: for `qclip doctor`, and for a report of a problem."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "qclip",
    "torch",
    "torchvision",
    "triton",
    "open_clip_torch",
    "timm",
    "transformers",
    "numpy",
    "pyarrow",
    "safetensors",
    "openvino",
    "nncf",
    "onnxruntime",
    "torchao",
)
TRIAL = 60  # calls: shapes in turns get their programs after six each
OPTIONAL = {"triton", "transformers", "openvino", "nncf", "onnxruntime", "torchao"}


def examine() -> dict[str, Any]:
    """A JSON-able picture: `versions`, `processor`, `kernels`, `costs`, `programs`, `checkpoints` (each name -> value)
    and `problems`, a list of sentences that is empty where all is well.

    `int8_peak_gops` is measured: register-only INT8 multiply-adds on torch's threads, 10^9 operations per second, a
    multiply-add counted as two.
    """
    import torch

    import qkernels
    from qclip import zoo
    from qclip.machine import cpu_name

    problems: list[str] = []
    info = qkernels.info()
    kernels = {k: v for k, v in info.items() if k != "forced"} | dict(info.get("forced", {}))
    if info["built"]:
        from qkernels.cpu import peak_gops

        kernels["int8_peak_gops"] = round(peak_gops(), 1)
        kernels["agrees_with_reference"] = _agrees()
        if not kernels["agrees_with_reference"]:
            problems.append(
                "the native kernels disagree with the reference on this processor; set QKERNELS_BACKEND=reference, "
                "and report it"
            )
    else:
        problems.append(f"{info['reason']}; the slow reference backend runs")
    if info["gpu_backend"] == "reference":
        problems.append(f"on the GPU the slow reference backend runs: {info['gpu_reason']}")
    checkpoints = {name: card.get("data", "") for name, card in zoo.checkpoints().items()}
    if not checkpoints:
        problems.append("the shipped checkpoints are missing, so `qclip demo` cannot run; reinstall qclip")
    costs, programs = _trial(next(iter(checkpoints), None))
    processor = {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "processor": processor,
        "kernels": kernels,
        "costs": costs,
        "programs": programs,
        "checkpoints": checkpoints,
        "problems": problems,
    }


def _trial(name: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A shipped checkpoint at `w8a8`. First what happens once, in milliseconds: rounding and packing the weights, then
    the first three calls of its image tower with 16 images (by its modules; while it is recorded; replayed). Second
    what `qclip.program_counts` says after `TRIAL` calls of 1 to 5 images by turns."""
    if name is None:
        return {}, {}
    import torch

    from qclip import models, ptq, zoo
    from qclip.models import replay

    model = zoo.load_model(name)
    began = time.perf_counter()
    ptq.quantize_(model, "w8a8")
    found = {"model": name, "quantize_and_pack_ms": _since(began)}
    encoders = models.encoders(model)
    images = torch.zeros(16, 3, encoders.image_size, encoders.image_size)
    with torch.inference_mode():
        for what in ("first_call_ms", "recording_call_ms", "replaying_call_ms"):
            began = time.perf_counter()
            encoders.encode_image(images)
            found[what] = _since(began)
    tower = models.towers(model)["vision"]
    program = next(iter(replay.programs(tower.module)), None)
    if program is not None:
        found |= {f"program_{key}": value for key, value in program.describe().items()}
    with torch.inference_mode():
        for number in range(TRIAL):
            encoders.encode_image(images[: 1 + number % 5])
    counts = replay.counts(tower.module)
    return found, counts | {key: replay.process_counts()[key] for key in ("bytes", "limit")}


def _since(began: float) -> float:
    return round(1000 * (time.perf_counter() - began), 1)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed (optional)" if name in OPTIONAL else "not installed"
    return found


def _agrees() -> bool:
    """INT8 and INT4 linear layers of odd sizes against plain integer arithmetic in torch."""
    import torch

    import qkernels

    generator = torch.Generator().manual_seed(0)
    x, scale = qkernels.quantize_per_token(torch.randn(7, 200, generator=generator))
    weight = torch.randn(33, 200, generator=generator)
    eight, four = qkernels.Int8Weight.quantize(weight), qkernels.Int4Weight.quantize(weight)
    found = qkernels.int8_linear(x, scale, qkernels.pack(eight)), qkernels.int4_linear(x, scale, qkernels.pack(four))
    for values, y in zip((eight.dequantize(), four.dequantize()), found, strict=True):
        wanted = (x.double() * scale.double()[:, None]) @ values.double().T
        if not isinstance(y, torch.Tensor) or not torch.allclose(y.double(), wanted, rtol=1e-4, atol=1e-4):
            return False
    return True
