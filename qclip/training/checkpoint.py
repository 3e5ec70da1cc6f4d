"""A run of training on disk: one safetensors file, written whole or not at all, from which it goes on to the bit.

Next to the tensors it holds, as JSON, what the run is made of; a run that differs in any of it does not go on from it.
Nor does any from a file whose checksum is another: a weight of which a bit has turned looks as good as before.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import InputError
from ..files import write_atomic
from ..rewrite import tensors_hash
from ..untrusted import open_regular, parse_json, read_header

NAME = re.compile(r"step-(\d{7})\.safetensors")
FACTS = "facts.json"  # the tensor that holds them, uint8
KEPT = 2  # the last one, and the one before
LIMIT = 64 << 20  # bytes of JSON


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or is of another run."""


def write(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Keep the state behind so many steps; only the last two files stay. Raises OutputError where it cannot be written;
    the earlier ones are then unharmed."""
    told = np.frombuffer(json.dumps(facts).encode(), np.uint8).copy()
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    held[FACTS] = torch.from_numpy(told)
    path = folder / f"step-{step:07d}.safetensors"
    write_atomic(path, safetensors.torch.save(held, {"sha256": tensors_hash(held)}))
    for old in _found(folder)[:-KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def forget(folder: Path) -> None:
    """Remove the checkpoints of a run that is over; its log stays."""
    for path in _found(folder):
        path.unlink(missing_ok=True)


def latest(folder: Path) -> Path | None:
    found = _found(folder)
    return found[-1] if found else None


def read(path: Path, made_of: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. Raises CheckpointError where it cannot be read, or is of another run."""
    try:
        tensors, facts = _content(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; remove it, and the run goes on from the checkpoint before it, or begins again"
        ) from None
    check_same(path.parent, facts["made_of"], made_of)
    return tensors, facts


def _content(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    read_header(path, CheckpointError)
    try:
        with open_regular(path, CheckpointError) as file:
            content = file.read()
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if header.get("__metadata__", {}).get("sha256") != tensors_hash(tensors):
            raise CheckpointError(f"{str(path)!r} is not what was written: its checksum is another")
        told = tensors.pop(FACTS).numpy().tobytes()
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is no checkpoint of training ({error})") from None
    facts = parse_json(told, str(path), CheckpointError, LIMIT)
    if not isinstance(facts, dict) or not isinstance(facts.get("made_of"), dict):
        raise CheckpointError(f"{str(path)!r} does not say what it is of")
    return tensors, facts


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises CheckpointError where the run in `folder` was made of something else than this one, naming the first
    difference."""
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            again = f"start it with as many {name} to go on, " if name in ("threads", "processes") else ""
            raise CheckpointError(
                f"{str(folder)!r} holds a run whose {name} is {_shown(before.get(name))}, and this one's is "
                f"{_shown(now.get(name))}; {again}name another output, or remove that folder"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.safetensors") if NAME.fullmatch(path.name))
