"""The sites of a model by what quantizing one alone did, as `qclip sensitivity --output` measured it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qclip.errors import InputError
from qclip.recipes import Treatment
from qclip.results import Results


def worst_first(path: Path, plans: Mapping[str, Treatment], source: str | None) -> list[str]:
    """The sites of `plans`, those with most damage first: at the site's own bits where these were measured, else at
    their worst. Sites of which the results say nothing come last, in their order.

    path: `results.json` of `qclip sensitivity`, or its folder. source: the hash of the float weights that the model was
    quantized from. Raises InputError where the file holds no sensitivities, or those of another model.
    """
    path = path / "results.json" if path.is_dir() else path
    results = Results.from_json(path)
    about = results.meta.get("sensitivity")
    rows = [row for row in results.where(metric="sensitivity", role="site") if row["value"] is not None]
    if not isinstance(about, dict) or not rows:
        raise InputError(f"{path}: no sensitivities; `qclip sensitivity --output` writes some")
    if about.get("source_sha256") != source:
        raise InputError(f"{path}: it was measured on other weights than those that the artifact was made from")
    damage: dict[str, list[tuple[bool, float]]] = {}
    for row in rows:
        if plan := plans.get(row["set"]):
            same = row["at"] == plan.weight_bits and about.get("activation_bits") == plan.activation_bits
            damage.setdefault(row["set"], []).append((same, row["value"]))
    if not damage:
        raise InputError(f"{path}: none of its rows is about a site of this artifact")
    # own bits come before others, however small their damage is
    worst = {site: max(measured)[1] for site, measured in damage.items()}
    return sorted(plans, key=lambda site: -worst[site] if site in worst else float("inf"))
