"""What is known of open_clip's names without building a model: written by `python -m benchmarks.supported write`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("open_clip_names.json")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name at `w8a8`. Either `refused` says why not, or: classes of the image and text tower, `real`: share of
    multiply-accumulates on integer kernels, parameters, bytes of an artifact's tensors and of the float model's."""

    image: str = ""
    text: str = ""
    real: float = 0.0
    parameters: int = 0
    bytes: int = 0
    float_bytes: int = 0
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"refused": self.refused} if self.refused is not None else dataclasses.asdict(self) | {"refused": None}


def supported() -> tuple[dict[str, Entry], dict[str, str]]:
    """Every name that was looked at, and the versions of the libraries that it was looked at with."""
    content = json.loads(FILE.read_text())
    return {name: Entry(**fields) for name, fields in content["names"].items()}, content["versions"]


def written(found: dict[str, Entry], versions: dict[str, str]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(entry.to_dict())}" for name, entry in found.items()]
    return f'{{"versions": {json.dumps(versions)},\n "names": {{\n' + ",\n".join(lines) + "\n }}\n"
