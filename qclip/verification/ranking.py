"""Sensitivity tables: what rounding one site alone does, as `qclip sensitivity` measured it.

A file is JSON: `{"schema": 1, "model": HASH, "rows": [{"site": "vision.blocks.0.mlp.fc1", "tower": "vision", "bits": 4,
"activation_bits": 8, "one_minus_cosine": 0.0031}, ...]}`. `model` is the hash of the float weights, `bits` those of the
weight, null where it stays float. Rows may say more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from qclip.errors import InputError
from qclip.recipes import Treatment
from qclip.typed import from_dict
from qclip.untrusted import read_json

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """Damage of one site alone at these bits. one_minus_cosine: of embeddings to those of the float model."""

    site: str
    one_minus_cosine: float
    tower: str = ""
    bits: int | None = None
    activation_bits: int | None = None


def worst_first(path: Path, plans: Mapping[str, Treatment], source: str | None) -> list[str]:
    """The sites of `plans`, those with most damage first: at the site's own bits where these were measured, else at
    their worst. Sites of which the table says nothing come last, in their order.

    source: the hash of the float weights that the model was quantized from. Raises InputError where the file is no such
    table, or one of another model.
    """
    found = read_json(path, InputError)
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise InputError(f"{path}: no sensitivity table; `qclip sensitivity` writes one (schema, model, rows)")
    if found.get("schema") != SCHEMA:
        raise InputError(f"{path}: a sensitivity table of schema {found.get('schema')!r}; this version reads {SCHEMA}")
    if found.get("model") != source:
        raise InputError(f"{path}: it was measured on other weights than those that the artifact was made from")
    known = {field.name for field in dataclasses.fields(Row)}
    damage: dict[str, list[tuple[bool, float]]] = {}
    for k, each in enumerate(found["rows"]):
        said = {name: value for name, value in each.items() if name in known} if isinstance(each, dict) else each
        row = from_dict(Row, said, f"{path}: row {k}", InputError)
        if row.site not in plans:
            continue
        plan = plans[row.site]
        same = (row.bits, row.activation_bits) == (plan.weight_bits, plan.activation_bits)
        damage.setdefault(row.site, []).append((same, row.one_minus_cosine))
    if not damage:
        raise InputError(f"{path}: none of its rows is about a site of this artifact")
    # own bits come before others, however small their damage is
    worst = {site: max(measured)[1] for site, measured in damage.items()}
    return sorted(plans, key=lambda site: -worst[site] if site in worst else float("inf"))
