"""Embeddings on disk, under a hash of everything that they depend on.

What is in a file is proved by its own checksum, what it is for by the key in it: a truncated, edited or foreign file
is computed again, never used. Files are written whole or not at all, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from PIL import Image
from torch import Tensor, nn

from qclip.files import write_atomic

STAGE_VERSION = 1  # raise it when the meaning of what is stored changes
CODE = ("qkernels", "qclip.layers", "qclip.models", "qclip.data")  # whose code an embedding comes out of


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/qclip/embeddings`, or `~/.cache/qclip/embeddings`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qclip" / "embeddings"


def key_of(**parts: Any) -> str:
    """sha256 (hex) of JSON-able parts, by name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of arrays by key; `folder=None` keeps nothing."""

    folder: Path | None

    @classmethod
    def of(cls, cache: bool | str | os.PathLike[str] | None) -> Cache:
        """None or True: the default folder. False: nothing is kept. Else: that folder."""
        if cache is None or cache is True:
            return cls(default_folder())
        return cls(None if cache is False else Path(cache))

    def path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and facts stored under `key`; None where there are none or the file is not what it should be."""
        path = self.path(key)
        if path is None or not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (safetensors.SafetensorError, OSError):
            return None  # truncated or not a safetensors file: it is computed again and replaced
        facts = metadata.get("facts", "")
        if metadata.get("key") != key or metadata.get("sha256") != _checksum(arrays, facts):
            return None
        return arrays, json.loads(facts)

    def store(self, key: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        path = self.path(key)
        if path is None:
            return
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        text = json.dumps(facts)
        metadata = {"key": key, "facts": text, "sha256": _checksum(arrays, text)}
        write_atomic(path, safetensors.numpy.save(arrays, metadata), sync=False)  # a torn file fails its checksum


def _checksum(arrays: dict[str, np.ndarray], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        digest.update(f"{name}:{arrays[name].dtype}:{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """sha256 of what a model computes with: every parameter and buffer, and each module's class and plain settings.

    Quantized weights are hashed in the form that `state_dict` gives, so packing them for a kernel changes nothing.
    """
    digest = hashlib.sha256()
    tensors = dict(model.state_dict())
    tensors |= {f"buffer {name}": b for name, b in model.named_buffers() if name not in tensors}
    for name, tensor in sorted(tensors.items()):
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


@functools.cache
def code_fingerprint() -> str:
    """sha256 of the code that an embedding comes out of, compiled kernels included."""
    digest = hashlib.sha256(torch.__version__.encode())
    for package in CODE:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(place).rglob("*")):
                if path.suffix in (".py", ".so") and path.is_file():
                    digest.update(str(path.relative_to(place)).encode() + path.read_bytes())
    return digest.hexdigest()


def runtime() -> dict[str, Any]:
    """Backend, CPU tier, threads and code: what beside the model decides the last bits of an embedding."""
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "code": code_fingerprint(), "stage": STAGE_VERSION}
    if importlib.util.find_spec("qkernels"):
        import qkernels

        facts["kernels"] = str(sorted(qkernels.info().items()))
    forced = {name: os.environ[name] for name in ("QKERNELS_BACKEND", "QKERNELS_CPU_TIER") if name in os.environ}
    return facts | forced
