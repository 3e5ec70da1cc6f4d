"""Win-win: how many variants improve on float in accuracy, calibration and detection at once, and how many would by
chance, from the outputs of every image that the store keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qclip.metrics import metric, predictions
from qclip.metrics.detection import Ranking
from qclip.metrics.resampled import evaluate_on
from qclip.reliability.statistics import Resampling
from qclip.reliability.wins import Wins, joint_wins
from qclip.seeds import generator

from .cells import CLEAN, Block
from .plan import Measured
from .store import StudyStore

METRICS = ("top1", "ece", "auroc")  # what a win is in
READ = ("predicted", "label", "rank", "confidence", "nll", "brier")


def joint(
    blocks: Sequence[Block], store: StudyStore, runtime: str, score: str, measured: Measured
) -> tuple[Wins, int] | None:
    """The joint wins of a model's variants on one evaluation, and of how many variants: those whose images were
    measured under that runtime. None where float or all of them are missing, or no OOD set has the score."""
    ordered = sorted(blocks, key=lambda block: not block.variant.is_float)
    tables = [store.samples(runtime, block.cells[CLEAN]) for block in ordered]
    there = [each for each in tables if each is not None]
    if not ordered or not ordered[0].variant.is_float or tables[0] is None or len(there) < 2:
        return None
    found = counted(there, score, measured)
    return None if found is None else (found, len(there) - 1)


def counted(samples: Sequence[pa.Table], score: str, measured: Measured) -> Wins | None:
    """The joint wins of variants over the first of these tables, float's; None where there is no OOD set with that
    score. Of several OOD sets it is the mean AUROC."""
    drawn = [_drawn(each, score, measured) for each in samples]
    if any(each is None for each in drawn):
        return None
    reference, *variants = (each for each in drawn if each is not None)
    sides = np.array([[1], [-1], [1]])
    return joint_wins({str(i): sides * (each - reference) for i, each in enumerate(variants)}, measured.replicates)


def _drawn(samples: pa.Table, score: str, measured: Measured) -> np.ndarray | None:
    """`METRICS` of one model on the sample and its bootstrap, `[3, 1 + replicates]`: the same resamples for all."""
    roles = pc.cast(samples["role"], pa.string())
    inside = samples.filter(pc.equal(roles, "id"))
    outside = samples.filter(pc.starts_with(roles, "ood"))
    column = f"score_{score}"
    if not len(outside) or not len(inside) or column not in samples.column_names:
        return None
    values = {name: inside[name].to_numpy() for name in READ}
    classes = int(max(values["label"].max(), values["predicted"].max())) + 1
    found = predictions.Predictions(
        classes=classes,
        predicted=values["predicted"],
        labels=values["label"],
        rank=values["rank"],
        confidence=values["confidence"],
        nll=values["nll"],
        brier=values["brier"],
        confidence_at={},
        nll_at={},
    )
    counts = _counts(len(inside), "inside", measured)
    labelled = predictions.definitions(found, METRICS[:2])
    top1, ece = evaluate_on([labelled[name] for name in METRICS[:2]], counts)
    auroc = metric(METRICS[2]).of
    assert auroc is not None
    sets = pc.cast(outside["set"], pa.string())
    areas = []
    for name in pc.unique(sets).to_pylist():
        scores = outside.filter(pc.equal(sets, name))[column].to_numpy()
        ranking = Ranking(inside[column].to_numpy(), scores)
        areas += ranking.on([auroc], counts, _counts(len(scores), f"outside {name}", measured))
    return np.stack([top1, ece, np.mean(areas, axis=0)])


def _counts(n: int, name: str, measured: Measured) -> np.ndarray:
    drawn = Resampling.draw(n, generator(measured.seed, f"study {name}"), measured.replicates)
    return drawn.bootstrap()
