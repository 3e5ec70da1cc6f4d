"""How large variants are: what a deployment ships of them, and how many bits that is for each weight."""

from __future__ import annotations

import dataclasses

import pyarrow.compute as pc

from qclip import artifact

from .cells import CLEAN, Block, Grid, quantize_key
from .store import StudyStore


@dataclasses.dataclass(frozen=True)
class Size:
    """bytes: of the artifact's files; of a float model all its tensors as they are, which its checkpoint holds. None
    where the artifact is not at hand. bits: 8 x bytes over the model's weights; None where either is not known."""

    bytes: int | None
    bits: float | None


def sizes(grid: Grid, store: StudyStore) -> dict[tuple[str, str], Size]:
    """Of each variant, by model and label."""
    counts = _weights(grid, store)
    out: dict[tuple[str, str], Size] = {}
    for block in grid.blocks:
        name = block.variant.model, block.variant.label
        if name not in out:
            size, count = _bytes(grid, store, block), counts.get(block.variant.model)
            out[name] = Size(size, None if size is None or not count else 8 * size / count)
    return out


def _bytes(grid: Grid, store: StudyStore, block: Block) -> int | None:
    variant = block.variant
    if variant.is_float:
        return grid.facts.bytes.get(variant.model)
    if variant.artifact is not None:
        return artifact.bytes_of(variant.artifact) if artifact.is_artifact(variant.artifact) else None
    key = quantize_key(variant, grid.facts, grid.plan.measured.strict)
    for runtime in store.measured_under():  # codes of two runtimes may differ, their sizes do not
        folder = store.folder / "artifacts" / f"{key}-{runtime}"
        if artifact.is_artifact(folder) or store.files.bring(folder.name, folder):
            return artifact.bytes_of(folder)
    return None


def _weights(grid: Grid, store: StudyStore) -> dict[str, int]:
    """How many weights each model has: those of all sites of one of its variants."""
    clean = {block.cells[CLEAN]: block.variant.model for block in grid.blocks if not block.variant.is_float}
    rows = store.rows(clean, ["cell", "runtime", "metric", "n"])
    rows = rows.filter(pc.equal(rows["metric"], "site_macs")).unify_dictionaries()
    sums = rows.group_by(["cell", "runtime"]).aggregate([("n", "sum")]).to_pylist()
    return {clean[row["cell"]]: row["n_sum"] for row in sums if row["n_sum"]}
