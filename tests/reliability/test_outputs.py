from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from qclip.metrics.bins import bin_of, diagram
from qclip.metrics.resampled import evaluate_on
from qclip.reliability.outputs import read_out, statistics
from qclip.reliability.scores.energy import ENERGY


def example(n: int = 400, classes: int = 7, scale: float = 8.0, temperature: float | None = 2.0):
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    labels = rng.integers(0, classes, n)
    classifier = unit(rng.normal(size=(classes, 12)))
    vectors = unit(classifier[labels] + 0.5 * rng.normal(size=(n, 12)))
    logits = torch.from_numpy(scale * vectors @ classifier.T)
    at = {} if temperature is None else {"ts": temperature}
    return read_out(vectors, classifier, scale, labels, at, {"energy": ENERGY}), logits, labels


def values(outputs, mask: np.ndarray | None = None) -> dict[str, float]:
    mask = np.ones(len(outputs), bool) if mask is None else mask
    found = statistics(outputs, mask)
    evaluated = evaluate_on(list(found.values()), np.ones((len(outputs), 1), np.uint16))
    return {name: float(value[0]) for name, value in zip(found, evaluated, strict=True)}


def ece_by_hand(confidence: np.ndarray, right: np.ndarray) -> float:
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("subset", ["all", "third", "a class is absent"])
def test_every_metric_equals_an_independent_computation(subset: str) -> None:
    outputs, logits, labels = example()
    mask = {"all": labels >= 0, "third": np.arange(len(labels)) % 3 == 0, "a class is absent": labels != 3}[subset]
    found = values(outputs, mask=mask)
    logits, labels = logits[mask], labels[mask]
    target, probabilities = torch.from_numpy(labels), logits.softmax(1)
    right = (logits.argmax(1) == target).numpy()
    confidence = probabilities.max(1).values.numpy()
    assert 0.5 < right.mean() < 0.99  # neither trivial nor hopeless
    top5 = (logits.topk(5).indices == target[:, None]).any(1).double().mean().item()
    one_hot = torch.nn.functional.one_hot(target, 7)
    expected = {
        "top1": right.mean(),
        "top5": top5,
        "balanced_accuracy": balanced_accuracy_score(labels, logits.argmax(1)),
        "ece": ece_by_hand(confidence, right),
        "ece_ts": ece_by_hand((logits / 2).softmax(1).max(1).values.numpy(), right),
        "nll": torch.nn.functional.cross_entropy(logits, target).item(),
        "brier": ((probabilities - one_hot) ** 2).sum(1).mean().item(),
        "signed_gap": confidence.mean() - right.mean(),
        "mean_confidence": confidence.mean(),
    }
    assert found == pytest.approx(expected, abs=1e-12)
    assert abs(found["signed_gap"]) <= found["ece"] + 1e-12


def test_ties_go_to_the_lowest_class_in_prediction_and_rank() -> None:
    classifier = np.tile([[1.0, 0.0]], (6, 1))  # six equal prompts
    outputs = read_out(np.array([[1.0, 0.0], [0.0, 1.0]]), classifier, 10.0, np.array([0, 5]))
    assert outputs.predicted.tolist() == [0, 0] and outputs.rank.tolist() == [0, 5]
    assert values(outputs)["top5"] == 0.5


def test_what_is_undefined_is_left_out() -> None:
    outputs, _, _ = example(classes=4, temperature=None)
    assert not {"top5", "ece_ts"} & set(values(outputs))


def test_bins_hold_their_upper_edge_and_zero() -> None:
    assert bin_of(np.array([0.0, 1 / 15, np.nextafter(1 / 15, 1), 0.2, 3 / 15, 1.0])).tolist() == [0, 0, 1, 2, 2, 14]


def test_the_diagram_adds_up_to_ece() -> None:
    outputs, _, labels = example()
    bins = diagram(outputs.confidence, outputs.right)
    assert bins.count.sum() == len(labels)
    gaps = np.nansum(bins.count * abs(bins.accuracy - bins.confidence))
    assert gaps / len(labels) == pytest.approx(values(outputs)["ece"])


def test_reading_in_parts_changes_nothing(monkeypatch) -> None:
    whole, _, _ = example()
    monkeypatch.setattr("qclip.reliability.outputs.ROWS", 64)
    parts, _, _ = example()
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-12)
    np.testing.assert_allclose(parts.ood["energy"], whole.ood["energy"], rtol=1e-12)
    taken = whole.take(np.array([5, 1]))
    assert taken.nll.tolist() == whole.nll[[5, 1]].tolist()
    assert taken.ood["energy"].tolist() == whole.ood["energy"][[5, 1]].tolist()
