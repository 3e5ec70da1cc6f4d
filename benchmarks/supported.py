"""Which of open_clip's names are quantized, looked at without memory: every model is built on the meta device.

    python -m benchmarks.supported write      # qclip/models/open_clip_names.json, and the table in README.md
    python -m benchmarks.supported write NAME ...  # these names again, the others as the file has them
    python -m benchmarks.supported look NAME  # one name, printed

`qclip models --supported` prints the file; `tests/test_supported.py` looks again at some names, with `--full` at all.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import open_clip
import timm
from torch import nn

from qclip import models, recipes, rewrite
from qclip.errors import ModelError
from qclip.files import write_atomic
from qclip.models import open_clip_names as names
from qclip.models.tower import Tower
from qclip.ptq.driver import states

RECIPE = recipes.parse("w8a8")
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- supported names: python -m benchmarks.supported write -->\n", "<!-- end of supported names -->"


def look(name: str) -> names.Entry:
    """What `qclip models --supported` says of an open_clip name."""
    try:
        model = models.create_from_config(open_clip.get_model_config(name), device="meta").eval()
        image, text = _kind(getattr(model.visual, "trunk", model.visual)), _kind(getattr(model, "text", model))
        with models.explicit_form(model) as towers:
            real, macs, size = _counted(model, towers)
    except ModelError as error:
        return names.Entry(refused=str(error))
    parameters = sum(p.numel() for p in model.parameters())
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if isinstance(model, open_clip.CoCa):
        text += ", with a decoder that stays float"
    return names.Entry(image, text, round(real / macs, 4), parameters, size, stored)


def _kind(tower: nn.Module) -> str:
    """Library and class of a tower; a text tower may be spread over the model itself."""
    name = "TextTransformer" if isinstance(tower, open_clip.CLIP) else type(tower).__name__
    return f"{type(tower).__module__.split('.')[0]} {name}"


def _counted(model: nn.Module, towers: dict[str, Tower]) -> tuple[int, int, int]:
    """MACs on kernels, all MACs, bytes of the tensors of an artifact, at `RECIPE`."""
    planned = states(RECIPE, towers)
    rows = rewrite.coverage(model).rows
    held = {name: t.numel() * t.element_size() for name, t in model.state_dict().items()}
    size = sum(held.values())
    for state in planned.values():
        weight = state.float_weight()
        size += weight.numel() + 4 * len(weight) - 4 * weight.numel()  # codes and scales instead of float32
    return sum(row.macs for row in rows if row.site in planned), sum(row.macs for row in rows), size


def everything() -> dict[str, names.Entry]:
    found = {}
    for name in open_clip.list_models():
        found[name] = look(name)
        print(name, found[name].refused or f"{found[name].real:.1%}", file=sys.stderr)
    return found


def table(found: dict[str, names.Entry]) -> str:
    """The README's table: a row for each pair of towers, and the reasons of those that are refused."""
    kinds: dict[tuple[str, str], list[names.Entry]] = {}
    for entry in found.values():
        if entry.refused is None:
            kinds.setdefault((entry.image, entry.text), []).append(entry)
    lines = [
        "| image tower | text tower | names | MACs on INT8 kernels | artifact of float32 |",
        "|---|---|---|---|---|",
    ]
    for (image, text), entries in sorted(kinds.items(), key=lambda item: -len(item[1])):
        real = _range([100 * e.real for e in entries], 0)
        part = _range([e.bytes / e.float_bytes for e in entries], 2)
        lines.append(f"| {image} | {text} | {len(entries)} | {real} % | {part} |")
    refused: dict[str, list[str]] = {}
    for name, entry in found.items():
        if entry.refused is not None:
            refused.setdefault(entry.refused, []).append(name)
    told = [f"- refused: {', '.join(those)}: {why}" for why, those in refused.items()]
    count = sum(map(len, kinds.values()))
    head = (
        f"{count} of open_clip {open_clip.__version__}'s {len(found)} names (timm {timm.__version__}) are quantized; "
        "`qclip models --supported` shows each. At `w8a8`:"
    )
    return "\n".join([head, "", *lines, "", *told]) + "\n"


def _range(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def readme(text: str, found: dict[str, names.Entry]) -> str:
    """README.md with the table as it ought to be."""
    return re.sub(f"(?s){re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table(found) + END, text)


def write(only: list[str]) -> None:
    found = names.supported()[0] | {name: look(name) for name in only} if only else everything()
    versions = {"open_clip": open_clip.__version__, "timm": timm.__version__}
    write_atomic(names.FILE, names.written(found, versions).encode())
    write_atomic(README, readme(README.read_text(), found).encode())


def main(arguments: list[str]) -> Any:
    if arguments[:1] == ["write"]:
        return write(arguments[1:])
    if len(arguments) == 2 and arguments[0] == "look":
        return print(json.dumps(look(arguments[1]).to_dict(), indent=1))
    raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
