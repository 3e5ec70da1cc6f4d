from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from qclip.metrics import metric, roc_curve_points
from qclip.metrics.detection import Ranking
from qclip.reliability.measurements.ood import DETECTION, ROC_GRID
from qclip.reliability.statistics import Resampling
from qclip.seeds import generator


def fpr_by_definition(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Try every threshold: the largest one at which 95 % of the positives are accepted."""
    for threshold in np.unique(np.concatenate([positives, negatives]))[::-1]:
        if (positives >= threshold).sum() * 20 >= 19 * len(positives):
            return float((negatives >= threshold).mean())
    raise AssertionError


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", [(60, 41), (40, 200), (1, 1)])
def test_detection_equals_the_definition_on_every_resample(ties: bool, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    ids, oods = rng.normal(0.5, 1, sizes[0]), rng.normal(0, 1, sizes[1])
    if ties:
        ids, oods = np.round(ids * 2) / 2, np.round(oods * 2) / 2
    id_counts = Resampling.draw(sizes[0], generator(0, "id"), 150).bootstrap()
    ood_counts = Resampling.draw(sizes[1], generator(0, "ood"), 150).bootstrap()
    definitions = [metric(name).of for name in DETECTION]
    area, fpr, fpr_ood = Ranking(ids, oods).on(definitions, id_counts, ood_counts)
    for column in range(151):
        a, b = np.repeat(ids, id_counts[:, column]), np.repeat(oods, ood_counts[:, column])
        truth = np.r_[np.ones(len(a)), np.zeros(len(b))]
        assert area[column] == pytest.approx(roc_auc_score(truth, np.r_[a, b]), abs=1e-12)
        assert fpr[column] == pytest.approx(fpr_by_definition(a, b), abs=1e-12)
        assert fpr_ood[column] == pytest.approx(fpr_by_definition(-b, -a), abs=1e-12)


def test_roc_points_are_the_best_id_share_within_each_ood_share() -> None:
    rng = np.random.default_rng(2)
    ids, oods = np.round(rng.normal(1, 1, 300), 1), np.round(rng.normal(0, 1, 200), 1)
    points = roc_curve_points(ids, oods, ROC_GRID)
    assert points[0].tolist() == ROC_GRID.tolist() and points[1][-1] == 1
    for at, tpr in zip(*points, strict=True):
        within = [t for t in np.r_[ids, oods] if (oods >= t).mean() <= at + 1e-12]
        assert tpr == pytest.approx(max(((ids >= t).mean() for t in within), default=0.0))
