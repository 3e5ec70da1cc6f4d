"""Artifacts as somebody else would write them: changed, with every checksum made right again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qclip import artifact


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "qclip.json").read_text())


def seal(folder: Path, content: dict[str, Any]) -> Path:
    """Writes a description with the checksums of what stands in the folder."""
    tensors = folder / "model.safetensors"
    content["tensors_bytes"], content["tensors_sha256"] = tensors.stat().st_size, artifact.file_hash(tensors)
    content["description_sha256"] = artifact.description_hash(content)
    (folder / "qclip.json").write_text(json.dumps(content))
    return folder


def place(content: dict[str, Any], path: str) -> tuple[Any, Any]:
    """The object that holds `path` ("architecture/config/text_cfg/layers"), and the last key."""
    *above, last = path.split("/")
    for key in above:
        content = content[key]
    return content, last


def changed(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of an artifact in which these places of its description have other values."""
    shutil.copytree(source, folder)
    content = read(folder)
    for path, value in changes.items():
        owner, key = place(content, path)
        owner[key] = value
    return seal(folder, content)


def with_tensors(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of an artifact with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return seal(folder, read(folder))
