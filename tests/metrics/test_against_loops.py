"""Each metric equals a plain loop on 200 random and adversarial samples, to 1e-12."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from qclip import metrics
from tests.metrics import loops

EXACT = 1e-12


def cases(many: int = 200) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Probabilities and labels: rounded to few values, on bin edges, certain, equal, all right, few, with an empty
    class; a few of 1,000 classes."""
    for seed in range(many):
        rng = np.random.default_rng(seed)
        n, classes = int(rng.integers(1, 60)), int(rng.choice([2, 3, 5, 10]))
        kind = seed % 8
        if kind == 7 and seed < 40:
            n, classes = 12, 1000
        probs = rng.dirichlet(np.full(classes, rng.choice([0.1, 0.5, 2.0])), n)
        labels = rng.integers(0, classes, n)
        if kind == 1:  # ties
            probs = np.round(probs * 16) / 16
            probs[:, 0] = np.maximum(1 - probs[:, 1:].sum(1), 0)
            probs /= probs.sum(1, keepdims=True)
        elif kind == 2:  # certain
            probs = np.eye(classes)[rng.integers(0, classes, n)]
        elif kind == 3:  # all equal
            probs = np.full((n, classes), 1 / classes)
        elif kind == 4:  # confidences on the edges of bins
            top = rng.integers(1, 16, n) / 15
            probs = np.concatenate([top[:, None], np.tile(((1 - top) / (classes - 1))[:, None], classes - 1)], 1)
        elif kind == 5:
            labels = probs.argmax(1)
        elif kind == 6:
            labels = np.zeros(n, int)
        yield probs, labels


def test_calibration() -> None:
    for probs, labels in cases():
        confidence, hit = probs.max(1).tolist(), (probs.argmax(1) == labels).astype(float).tolist()
        square = loops.debiased(confidence, hit)
        expected = {
            "l1": loops.ece(confidence, hit),
            "l2": loops.ece(confidence, hit, norm="l2"),
            "max": loops.ece(confidence, hit, norm="max"),
            "adaptive": loops.ece(confidence, hit, binned=loops.mass_bins),
            "square": square,
            "root": math.sqrt(max(square, 0)),
            "wide": loops.debiased(confidence, hit, binned=loops.width_bins),
            "classwise": loops.classwise(probs, labels),
            "likely": loops.classwise(probs, labels, likely=True) if (probs > 1 / probs.shape[1]).any() else math.nan,
        }
        found = {norm: metrics.ece(probs, labels, norm=norm) for norm in ("l1", "l2", "max")} | {
            "adaptive": metrics.adaptive_ece(probs, labels),
            "square": metrics.debiased_l2(probs, labels, square=True),
            "root": metrics.debiased_l2(probs, labels),
            "wide": metrics.debiased_l2(probs, labels, binning="width", square=True),
            "classwise": metrics.classwise_ece(probs, labels),
            "likely": metrics.classwise_ece(probs, labels, likely=True),
        }
        root = found.pop("root")  # of a number near 0 it has half the digits
        assert root**2 == pytest.approx(expected.pop("root") ** 2, abs=EXACT)
        assert found == pytest.approx(expected, abs=EXACT, nan_ok=True)
        over, under = metrics.overconfidence(probs, labels), metrics.underconfidence(probs, labels)
        assert over + under == pytest.approx(found["l1"], abs=EXACT)
        assert over - under == pytest.approx(metrics.signed_gap(probs, labels), abs=EXACT)
        bins = [b for b in loops.width_bins(confidence) if b]
        largest = [len(b) for b in bins if abs(abs(loops.gap(confidence, hit, b)) - found["max"]) < EXACT]
        assert metrics.ece_max_n(probs, labels) in largest


def test_brier_and_its_parts() -> None:
    for probs, labels in cases():
        one_hot = np.eye(probs.shape[1])[labels]
        expected = math.fsum(((probs - one_hot) ** 2).ravel()) / len(labels)
        assert metrics.brier(probs, labels) == pytest.approx(expected, abs=EXACT)
        each_class = 0.0
        for k in range(min(probs.shape[1], 3)):
            f, a = probs[:, k], (labels == k).astype(float)
            parts = metrics.brier_parts(f, a)
            for name, value in loops.brier_parts(f.tolist(), a.tolist()).items():
                assert getattr(parts, name) == pytest.approx(value, abs=EXACT), name
            whole = parts.reliability - parts.resolution + parts.uncertainty
            assert whole + parts.within_variance - parts.within_covariance == pytest.approx(parts.score, abs=EXACT)
            each_class += parts.score
        if probs.shape[1] <= 3:
            assert each_class == pytest.approx(expected, abs=EXACT)


def test_selective_prediction() -> None:
    for probs, labels in cases():
        confidence, hit = probs.max(1).tolist(), (probs.argmax(1) == labels).astype(float).tolist()
        n, k = len(hit), int(len(hit) - sum(hit))
        area = loops.aurc(confidence, hit)
        best = loops.aurc(list(range(n, 0, -1)), [1.0] * (n - k) + [0.0] * k)
        rate = k / n
        published = rate + ((1 - rate) * math.log(1 - rate) if rate < 1 else 0)
        assert metrics.aurc(probs, labels) == pytest.approx(area, abs=EXACT)
        assert metrics.eaurc(probs, labels) == pytest.approx(area - best, abs=EXACT)
        assert metrics.eaurc(probs, labels) >= -EXACT
        assert metrics.eaurc(probs, labels, approximate=True) == pytest.approx(area - published, abs=EXACT)
        assert metrics.aurra(probs, labels) == pytest.approx(1 - area, abs=EXACT)
        coverage, risk, threshold = metrics.risk_coverage(confidence, hit)
        for c, r, t in zip(coverage, risk, threshold, strict=True):
            kept = [1 - h for h, value in zip(hit, confidence, strict=True) if value >= t]
            assert (c, r) == pytest.approx((len(kept) / n, sum(kept) / len(kept)), abs=EXACT)
        assert coverage[-1] == 1 and (np.diff(threshold) < 0).all()


def test_detection() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        ids, oods = rng.normal(0.7, 1, int(rng.integers(1, 40))), rng.normal(0, 1.3, int(rng.integers(1, 40)))
        if seed % 4 == 1:
            ids, oods = np.round(ids * 2) / 2, np.round(oods * 2) / 2
        elif seed % 4 == 2:
            ids, oods = np.round(ids), np.round(oods)
        elif seed % 40 == 3:
            ids, oods = np.ones(len(ids)), np.ones(len(oods))
        a, o = ids.tolist(), oods.tolist()
        mirrored = [-x for x in o], [-x for x in a]
        assert metrics.auroc(ids, oods) == pytest.approx(loops.auroc(a, o), abs=EXACT)
        assert metrics.fpr_at_tpr(ids, oods) == pytest.approx(loops.fpr(a, o), abs=EXACT)
        assert metrics.fpr_at_tpr(ids, oods, positive="ood") == pytest.approx(loops.fpr(*mirrored), abs=EXACT)
        for rule in ("steps", "trapezoid"):
            assert metrics.aupr(ids, oods, "id", rule) == pytest.approx(loops.average_precision(a, o, rule), abs=EXACT)
            expected = loops.average_precision(*mirrored, rule)
            assert metrics.aupr(ids, oods, "ood", rule) == pytest.approx(expected, abs=EXACT)
        for share in (0.05, 0.5, 0.95, 1.0):
            best = max(t for t in a if np.mean(ids >= t) >= share - 1e-12)
            assert metrics.threshold_at(ids, share) == best


def test_all_metrics_of_logits_are_those_of_the_plain_functions() -> None:
    """`measure` reads logits in blocks, with all probabilities at hand or without."""
    for n, classes in ((300, 6), (40, 1000), (1, 2)):
        rng = np.random.default_rng(n)
        labels = rng.integers(0, classes, n)
        logits = rng.normal(size=(n, classes)) * 3
        logits[np.arange(n), labels] += 4
        probs, half = metrics.softmax(logits), metrics.softmax(logits / 2)
        confidence, hit = probs.max(1), probs.argmax(1) == labels
        parts = metrics.brier_parts(confidence, hit)
        expected = {
            "top1": metrics.top_k_accuracy(logits, labels),
            "top5": metrics.top_k_accuracy(logits, labels, 5) if classes >= 5 else math.nan,
            "balanced_accuracy": metrics.balanced_accuracy(logits, labels),
            "ece": metrics.ece(probs, labels),
            "ece_ts": metrics.ece(half, labels),
            "ece_proxy": math.nan,
            "ece_adaptive": metrics.adaptive_ece(probs, labels),
            "ece_classwise": metrics.classwise_ece(probs, labels),
            "ece_classwise_likely": metrics.classwise_ece(probs, labels, likely=True),
            "ece_max": metrics.ece(probs, labels, norm="max"),
            "ece_max_n": metrics.ece_max_n(probs, labels),
            "ece_l2": metrics.debiased_l2(probs, labels),
            "ece_l2_square": metrics.debiased_l2(probs, labels, square=True),
            "overconfidence": metrics.overconfidence(probs, labels),
            "underconfidence": metrics.underconfidence(probs, labels),
            "signed_gap": metrics.signed_gap(probs, labels),
            "mean_confidence": metrics.mean_confidence(probs),
            "nll": metrics.nll(logits, labels),
            "nll_ts": metrics.nll(logits / 2, labels),
            "nll_proxy": math.nan,
            "brier": metrics.brier(probs, labels),
            "brier_top": parts.score,
            "brier_rel": parts.reliability,
            "brier_res": parts.resolution,
            "brier_unc": parts.uncertainty,
            "brier_wbv": parts.within_variance,
            "brier_wbc": parts.within_covariance,
            "aurc": metrics.aurc(probs, labels),
            "eaurc": metrics.eaurc(probs, labels),
            "eaurc_approximate": metrics.eaurc(probs, labels, approximate=True),
        }
        assert metrics.measure(logits, labels, 2.0) == pytest.approx(expected, abs=EXACT, nan_ok=True)


def test_blocks_of_rows_change_nothing(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(100, 80)) * 4, rng.integers(0, 80, 100)
    whole = metrics.measure(logits, labels, 2.0)
    monkeypatch.setattr("qclip.metrics.predictions.ENTRIES", 700)
    assert metrics.measure(logits, labels, 2.0) == pytest.approx(whole, abs=EXACT, nan_ok=True)
    before = logits.copy()
    metrics.read(logits, labels)
    assert (logits == before).all()  # blocks are overwritten, the caller's array is not


def test_one_class_leaves_calibration_undefined() -> None:
    found = metrics.measure(np.zeros((4, 1)), np.zeros(4, int))
    assert found["top1"] == 1 and found["aurc"] == 0
    for name in ("ece", "nll", "brier", "signed_gap", "ece_classwise", "ece_adaptive", "top5"):
        assert math.isnan(found[name]), name
