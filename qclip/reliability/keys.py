"""What an embedding depends on: model, preprocessing, data, and what runs the arithmetic.

Meaning is versioned, code is not hashed: an edited comment voids nothing, a raised number voids its stage. Raise
`STAGES` where what is stored changes its meaning or, at equal weights and images, its numbers; kernels have a number of
their own, `qkernels.contract.NUMBERS`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import qkernels
from qkernels.contract import NUMBERS

STAGES = {"images": 2, "patches": 1, "texts": 2, "resampled": 1}
AFTERWARDS = ("logit_scale", "logit_bias")  # what embeddings are multiplied by, or added to, when they are compared


def model_fingerprint(model: nn.Module) -> str:
    """sha256 of what a model embeds with: every parameter and buffer but its logit scale and bias, and each module's
    class and plain settings.

    Quantized weights are hashed in the form that `state_dict` gives, so packing them for a kernel changes nothing.
    """
    digest = hashlib.sha256()
    tensors = dict(model.state_dict())
    tensors |= {f"buffer {name}": b for name, b in model.named_buffers() if name not in tensors}
    for name, tensor in sorted(tensors.items()):
        if name in AFTERWARDS:
            continue
        if isinstance(tensor, Tensor):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name}:{tensor!r}".encode())
    for name, module in model.named_modules():
        kind = type(module)
        settings = {k: _plain(v) for k, v in sorted(vars(module).items()) if _is_setting(k)}
        digest.update(f"{name}:{kind.__module__}.{kind.__qualname__}:{settings}".encode())
    return digest.hexdigest()


def _is_setting(name: str) -> bool:
    """Not the tensors (hashed above), not the train flag, not how a weight is packed, not where it came from."""
    return not name.startswith(("_", "qclip_")) and name not in ("training", "layout", "preprocess", "tokenizer")


def _plain(value: Any) -> str:
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (set, frozenset)):  # their order differs between processes
        value = sorted(map(repr, value))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def preprocess_fingerprint(preprocess: Callable[[Image.Image], Tensor]) -> str:
    """sha256 of what a transform does to three fixed pictures of different shapes: its settings may hide anywhere."""
    digest = hashlib.sha256()
    for height, width in ((28, 28), (32, 48), (301, 227)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        out = preprocess(Image.fromarray(pixels))
        digest.update(f"{out.dtype}:{tuple(out.shape)}".encode() + out.contiguous().numpy().tobytes())
    return digest.hexdigest()


def runtime(device: torch.device) -> dict[str, Any]:
    """Backend, tier, threads and versions: what beside the model decides the last bits of an embedding."""
    info = qkernels.info()
    facts: dict[str, Any] = {name: info[name] for name in ("backend", "tier", "bf16", "gpu_backend")}
    facts |= {"kernels": NUMBERS, "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"device": device.type, "processor": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    forced = ("QKERNELS_BACKEND", "QKERNELS_CPU_TIER")
    return facts | {name: os.environ[name] for name in forced if name in os.environ}
