"""Metrics against independent tools (scikit-learn, scipy, torch) and plain loops over samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from qclip import metrics
from qclip.errors import InputError, NonFiniteError

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
optimize = pytest.importorskip("scipy.optimize", reason="needs scipy (extra test)")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def sample(rng) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, 6, 400)
    logits = rng.normal(size=(400, 6)) * 2
    logits[np.arange(400), labels] += 1.5
    return logits, labels


def loop_ece(probs, labels, bins):
    total = [[] for _ in range(bins)]
    for p, y in zip(probs, labels, strict=True):
        c, hit = float(max(p)), int(np.argmax(p)) == y
        for b in range(bins):
            if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0):
                total[b].append((c, hit))
    return total


def test_top_k_agrees_with_sklearn_and_ties_go_to_the_first_class(sample):
    logits, labels = sample
    for k in (1, 2, 5):
        assert metrics.top_k_accuracy(logits, labels, k) == pytest.approx(
            sklearn_metrics.top_k_accuracy_score(labels, logits, k=k)
        )
    tied = np.zeros((3, 4))
    assert metrics.top_k_accuracy(tied, np.array([0, 1, 3])) == pytest.approx(1 / 3)
    assert metrics.top_k_accuracy(tied, np.array([0, 1, 3]), k=2) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="top-5.*4 classes"):
        metrics.top_k_accuracy(tied, np.array([0, 1, 3]), k=5)


def test_balanced_accuracy_agrees_with_sklearn_where_a_class_is_absent(sample):
    logits, labels = sample
    labels = np.where(labels == 2, 3, labels)
    predicted = logits.argmax(1)
    keep = predicted != 2
    expected = sklearn_metrics.balanced_accuracy_score(labels[keep], predicted[keep])
    assert metrics.balanced_accuracy(logits[keep], labels[keep]) == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_agrees_with_a_loop(sample, bins):
    logits, labels = sample
    probs = metrics.softmax(logits)
    table = [b for b in loop_ece(probs, labels, bins) if b]
    gaps = [(len(b), abs(np.mean([h for _, h in b]) - np.mean([c for c, _ in b]))) for b in table]
    n = len(labels)
    assert metrics.ece(probs, labels, bins) == pytest.approx(sum(m * d for m, d in gaps) / n)
    assert metrics.ece(probs, labels, bins, norm="l2") == pytest.approx(math.sqrt(sum(m * d * d for m, d in gaps) / n))
    assert metrics.ece(probs, labels, bins, norm="max") == pytest.approx(max(d for _, d in gaps))


def test_bins_are_open_below_and_closed_above():
    probs = np.array([[0.6, 0.4], [0.6000001, 0.3999999], [1.0, 0.0], [0.5, 0.5]])
    found = metrics.reliability_bins(probs, np.zeros(4, int), bins=5)
    assert found.count.tolist() == [0, 0, 2, 1, 1]
    assert np.isnan(found.accuracy[0]) and found.confidence[2] == pytest.approx(0.55)
    assert found.accuracy[4] == 1


def test_edges_of_fifteen_bins_hold_their_own_value():
    for b in range(8, 16):  # two classes: confidences from 8/15 up
        c = b / 15
        found = metrics.reliability_bins(np.array([[c, 1 - c]]), np.array([0]))
        assert found.count[b - 1] == 1, b


def test_signed_gap_never_exceeds_ece(rng):
    for _ in range(50):
        probs = rng.dirichlet(np.ones(4), 30)
        labels = rng.integers(0, 4, 30)
        gap = metrics.signed_gap(probs, labels)
        assert abs(gap) <= metrics.ece(probs, labels) + 1e-12
        accuracy = metrics.top_k_accuracy(np.log(probs), labels)
        assert gap == pytest.approx(metrics.mean_confidence(probs) - accuracy)


def test_nll_and_brier_agree_with_torch_and_sklearn(sample):
    logits, labels = sample
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert metrics.nll(logits, labels) == pytest.approx(expected, rel=1e-12)
    probs = metrics.softmax(logits)
    assert metrics.brier(probs, labels) == pytest.approx(((probs - np.eye(6)[labels]) ** 2).sum(1).mean())
    binary = metrics.softmax(logits[:, :2])
    half = sklearn_metrics.brier_score_loss(labels % 2, binary[:, 1])
    assert metrics.brier(binary, labels % 2) == pytest.approx(2 * half)


def test_float16_input_is_cast_before_it_is_binned(sample):
    logits, labels = sample
    low = logits.astype(np.float16)
    assert metrics.nll(low, labels) == metrics.nll(low.astype(np.float64), labels)
    assert metrics.nll(np.array([[1000.0, 0.0]]), np.array([1])) == pytest.approx(1000)


# -- temperature ------------------------------------------------------------------------------------------------------


def test_temperature_agrees_with_scipy_and_satisfies_its_condition(sample):
    logits, labels = sample
    fitted = metrics.fit_temperature(logits, labels)
    found = optimize.minimize_scalar(
        lambda b: metrics.nll(logits * b, labels), bounds=(1e-3, 20), method="bounded", options={"xatol": 1e-10}
    )
    assert fitted.flag == "" and float(fitted) == pytest.approx(1 / found.x, rel=1e-5)
    probs = metrics.softmax(logits / fitted.value)
    assert (probs * logits).sum(1).mean() == pytest.approx(logits[np.arange(len(labels)), labels].mean(), abs=1e-9)
    assert metrics.fit_temperature(logits * 37, labels).value == pytest.approx(37 * fitted.value, rel=1e-9)
    assert metrics.fit_temperature(logits / 500, labels).value == pytest.approx(fitted.value / 500, rel=1e-9)


def test_temperature_with_counts_is_that_of_repeated_rows(sample, rng):
    logits, labels = sample
    counts = rng.integers(0, 3, len(labels))
    repeated = metrics.fit_temperature(np.repeat(logits, counts, 0), np.repeat(labels, counts))
    assert metrics.fit_temperature(logits, labels, counts).value == pytest.approx(repeated.value, rel=1e-9)


def test_temperature_flags():
    eye = np.eye(3)
    assert metrics.fit_temperature(eye, np.arange(3)).flag == "separable"
    worst = metrics.fit_temperature(-eye, np.arange(3))
    assert worst.flag == "no positive optimum" and worst.value == math.inf
    assert metrics.fit_temperature(np.ones((4, 3)), np.zeros(4, int)) == metrics.Temperature(1.0, "constant")
    assert metrics.fit_temperature(np.ones((4, 1)), np.zeros(4, int)).flag == "constant"


def test_a_temperature_from_blocks_of_rows_is_that_of_the_whole(sample, monkeypatch):
    whole = metrics.fit_temperature(*sample).value
    monkeypatch.setattr("qclip.metrics.temperature.ROWS", 40)
    assert metrics.fit_temperature(*sample).value == pytest.approx(whole, rel=1e-12)


def test_newton_finds_the_temperature_in_few_steps(sample, monkeypatch):
    from qclip.metrics.temperature import _Loss

    asked, slopes = [], _Loss.slopes
    monkeypatch.setattr(_Loss, "slopes", lambda self, beta: asked.append(beta) or slopes(self, beta))
    logits, labels = sample
    for scale in (1, 40, 1 / 300):  # what doubles the bracket, or halves it, counts too
        asked.clear()
        metrics.fit_temperature(logits * scale, labels)
        assert len(asked) <= 25, scale  # bisection alone needs 40 and more


def test_the_logit_scale_minimizes_the_contrastive_loss(rng):
    pairs = rng.normal(size=(30, 30)) + 2 * np.eye(30)

    def loss(beta):
        z, target = torch.from_numpy(pairs * beta), torch.arange(30)
        cross_entropy = torch.nn.functional.cross_entropy
        return ((cross_entropy(z, target) + cross_entropy(z.T, target)) / 2).item()

    found = optimize.minimize_scalar(loss, bounds=(1e-3, 50), method="bounded", options={"xatol": 1e-10})
    fitted = metrics.fit_logit_scale(pairs)
    assert fitted.flag == "" and fitted.value == pytest.approx(1 / found.x, rel=1e-5)
    assert metrics.fit_logit_scale(pairs * 5).value == pytest.approx(5 * fitted.value, rel=1e-9)
    few = metrics.fit_logit_scale(pairs[:5, :5]).value
    assert abs(few - fitted.value) > 0.01  # it depends on the number of pairs
    assert metrics.fit_logit_scale(np.eye(4)).flag == "separable"
    assert metrics.fit_logit_scale(np.ones((4, 4))) == metrics.Temperature(1.0, "constant")
    tied = np.eye(4)
    tied[0, 1] = 2  # in the row its caption is not the likeliest
    assert metrics.fit_logit_scale(tied).flag == ""
    with pytest.raises(InputError, match="N images by their N captions"):
        metrics.fit_logit_scale(np.ones((3, 4)))


def test_probabilities_of_zero_are_clipped_and_counted():
    probs = np.array([[0.25, 0.75], [1.0, 0.0], [1.0, 0.0]])
    value, clipped = metrics.nll_of_probs(probs, np.array([0, 1, 0]))
    assert clipped == 1
    assert value == pytest.approx((-math.log(0.25) - math.log(np.finfo(float).tiny)) / 3)


# -- detection --------------------------------------------------------------------------------------------------------


def scores(rng, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    inside, outside = rng.normal(1, 1, 150), rng.normal(0, 1.5, 90)
    return (np.round(inside * 2) / 2, np.round(outside * 2) / 2) if ties else (inside, outside)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_agrees_with_sklearn_and_reverses(rng, ties):
    inside, outside = scores(rng, ties)
    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    value = metrics.auroc(inside, outside)
    assert value == pytest.approx(sklearn_metrics.roc_auc_score(truth, np.r_[inside, outside]), abs=1e-12)
    assert value + metrics.auroc(-inside, -outside) == pytest.approx(1, abs=1e-12)


def brute_fpr(positives, negatives, tpr):
    best = max(t for t in positives if np.mean(positives >= t) >= tpr - 1e-12)
    return np.mean(negatives >= best)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95, 1.0])
def test_fpr_at_tpr_is_the_exact_rule(rng, ties, tpr):
    inside, outside = scores(rng, ties)
    assert metrics.fpr_at_tpr(inside, outside, tpr) == pytest.approx(brute_fpr(inside, outside, tpr))
    assert metrics.fpr_at_tpr(inside, outside, tpr, positive="ood") == pytest.approx(brute_fpr(-outside, -inside, tpr))


def test_fpr_threshold_is_the_ceil_of_the_share():
    for n in range(1, 121):  # the ceil(0.95 n)-th best positive, also where 0.95 n is whole
        positives = np.arange(n, 0, -1.0)
        threshold = positives[-(-19 * n // 20) - 1]
        negatives = np.arange(0.5, n + 1)
        assert metrics.fpr_at_tpr(positives, negatives) == pytest.approx(np.mean(negatives >= threshold)), n


@pytest.mark.parametrize(("percent", "n"), [(55, 20), (55, 100), (7, 100), (14, 50), (28, 25), (56, 50)])
def test_a_share_that_is_a_whole_number_of_samples_is_enough(percent, n):
    """0.55 * 20 is 11.000000000000002 in floating point, and 11 of 20 are 55 %."""
    positives, negatives = np.arange(n, 0, -1.0), np.arange(0.5, n + 1)
    threshold = positives[-(-percent * n // 100) - 1]
    assert metrics.fpr_at_tpr(positives, negatives, percent / 100) == np.mean(negatives >= threshold)
    assert metrics.fpr_at_tpr(-negatives, -positives, percent / 100, "ood") == np.mean(negatives >= threshold)


def test_an_empty_side_is_undefined_not_perfect():
    assert math.isnan(metrics.auroc([1.0], []))
    assert math.isnan(metrics.fpr_at_tpr([1.0], []))
    assert math.isnan(metrics.fpr_at_tpr([], [1.0]))
    with pytest.raises(InputError, match="both empty"):
        metrics.auroc([], [])


@pytest.mark.parametrize("ties", [False, True])
def test_roc_curve_agrees_with_sklearn(rng, ties):
    inside, outside = scores(rng, ties)
    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    fpr, tpr, _ = sklearn_metrics.roc_curve(truth, np.r_[inside, outside], drop_intermediate=False)
    ours = metrics.roc_curve_points(inside, outside)
    np.testing.assert_allclose(ours[0], fpr, atol=1e-12)
    np.testing.assert_allclose(ours[1], tpr, atol=1e-12)
    wanted = np.array([0.0, 0.1, 0.5, 1.0])
    _, read = metrics.roc_curve_points(inside, outside, wanted)
    assert read[0] == max(t for f, t in zip(fpr, tpr, strict=True) if f == 0)
    assert read[-1] == 1 and (np.diff(read) >= 0).all()


# -- selective prediction ---------------------------------------------------------------------------------------------


def loop_aurc(confidence, hit):
    order = sorted(range(len(hit)), key=lambda i: -confidence[i])
    risks = [np.mean([1 - hit[i] for i in order[: k + 1]]) for k in range(len(order))]
    return float(np.mean(risks))


def binary(confidence, hit):
    """Probabilities of two classes with this confidence; label 0 where right."""
    return np.stack([confidence, 1 - np.asarray(confidence)], 1), np.where(hit, 0, 1)


def test_aurc_agrees_with_a_loop_and_averages_over_ties(rng):
    confidence, hit = 0.5 + rng.random(60) / 2, rng.integers(0, 2, 60)
    assert metrics.aurc(*binary(confidence, hit)) == pytest.approx(loop_aurc(confidence, hit), abs=1e-12)
    tied, outcome = np.array([0.9, 0.8, 0.8, 0.8, 0.8, 0.7]), np.array([1, 0, 1, 1, 0, 1])
    orders = [
        loop_aurc(tied, [outcome[0], *(outcome[1 + i] for i in p), outcome[5]])
        for p in itertools.permutations(range(4))
    ]
    assert metrics.aurc(*binary(tied, outcome)) == pytest.approx(np.mean(orders), abs=1e-12)
    assert metrics.aurc(*binary(np.full(10, 0.75), rng.integers(0, 2, 10))) >= 0


# -- relative to something --------------------------------------------------------------------------------------------


def test_added_vulnerability_is_a_change_of_rsg_in_other_units(rng):
    names = "reference_common", "reference_counter", "other_common", "other_counter"
    for _ in range(50):
        a = dict(zip(names, rng.random(4), strict=True))
        assert metrics.relative_drop(0.8, 0.6) == pytest.approx(0.25)
        expected = metrics.delta_rsg(**a) * a["other_common"] / a["reference_counter"]
        assert metrics.vuln_add(**a) == pytest.approx(expected, rel=1e-9)
    assert metrics.rsg(0.8, 0.2) == pytest.approx(0.75)
    assert math.isnan(metrics.relative_drop(0.0, 0.1))
    assert np.isnan(metrics.relative_drop(np.array([0.5, 0.0]), np.array([0.25, 0.0]))).tolist() == [False, True]


def test_mce_is_for_imagenet_c_only():
    from qclip.metrics.relative import ALEXNET

    assert len(ALEXNET) == 15 and max(ALEXNET, key=ALEXNET.get) == "impulse_noise"
    own = {name: dict.fromkeys(range(1, 6), error) for name, error in ALEXNET.items()}
    assert metrics.corruption_errors(own, 1000) == pytest.approx(dict.fromkeys([*ALEXNET, "mce"], 1.0))
    half = own | {"fog": {s: ALEXNET["fog"] / 2 for s in range(1, 6)}}
    found = metrics.corruption_errors(half, 1000)
    assert found["fog"] == pytest.approx(0.5) and found["mce"] == pytest.approx(14.5 / 15)
    for bad, classes, words in (
        (own, 200, "200 classes"),
        ({k: v for k, v in own.items() if k != "fog"}, 1000, "missing: fog"),
        (own | {"frost_gen": own["frost"]}, 1000, "unknown: frost_gen"),
        (own | {"fog": {1: 0.5}}, 1000, r"severities \[1\]"),
        (own | {"fog": dict.fromkeys(range(1, 6), 50.0)}, 1000, "shares"),
    ):
        with pytest.raises(InputError, match=words):
            metrics.corruption_errors(bad, classes)


def test_a_transferred_threshold_moves_both_rates():
    from qclip.metrics.detection import Block, Ranking
    from qclip.metrics.selective import accepted, accepted_risk

    ids, oods = np.array([1.0, 2, 3, 4]), np.array([0.0, 2, 2, 5])
    block = Block(Ranking(ids, oods), np.ones((4, 1), int), np.ones((4, 1), int))
    assert block.id_share_at(2.0).tolist() == [0.75] and block.ood_share_at(2.0).tolist() == [0.75]
    assert block.id_share_at(4.5).tolist() == [0] and block.ood_share_at(4.5).tolist() == [0.25]
    right = np.array([0, 1, 1, 0])
    assert accepted(ids, 3.0).plain() == 0.5 and accepted_risk(ids, right, 3.0).plain() == 0.5
    assert math.isnan(accepted_risk(ids, right, 9.0).plain())  # nothing is accepted: not a risk of 0
    with pytest.raises(InputError, match="threshold needs scores"):
        metrics.threshold_at([], 0.95)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_counts_mean_repeated_samples(sample, rng):
    logits, labels = sample
    probs = metrics.softmax(logits)
    counts = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=5)
    tied = np.floor(probs * 8)  # whose confidences fall into few values
    tied[:, 0] += 8 - tied.sum(1)
    tied /= 8
    cases = [
        (metrics.top_k_accuracy, logits, {}),
        (metrics.top_k_accuracy, logits, {"k": 3}),
        (metrics.balanced_accuracy, logits, {}),
        (metrics.nll, logits, {}),
        (metrics.brier, probs, {}),
        (metrics.ece, probs, {}),
        (metrics.ece, probs, {"norm": "l2"}),
        (metrics.ece, probs, {"norm": "max"}),
        (metrics.signed_gap, probs, {}),
        (metrics.ece_max_n, probs, {}),
        (metrics.adaptive_ece, probs, {}),
        (metrics.adaptive_ece, tied, {}),
        (metrics.debiased_l2, probs, {"square": True}),
        (metrics.debiased_l2, probs, {"square": True, "binning": "width"}),
        (metrics.overconfidence, probs, {}),
        (metrics.underconfidence, probs, {}),
        (metrics.classwise_ece, probs, {}),
        (metrics.classwise_ece, probs, {"likely": True}),
        (metrics.eaurc, probs, {}),
        (metrics.eaurc, probs, {"approximate": True}),
        (metrics.aurra, probs, {}),
        (metrics.aurc, np.round(probs * 8) / 8 + 0, {}),
    ]
    for function, values, options in cases:
        if function is metrics.aurc:  # rounded confidences make ties between different samples too
            values, hit = np.round(probs.max(1) * 8) / 8, probs.argmax(1) == labels
            values, truth = binary(np.maximum(values, 0.625), hit)
        else:
            truth = labels
        found = function(values, truth, weights=counts, **options)
        assert found.shape == (5,)
        for row, value in zip(counts, found, strict=True):
            repeated = function(np.repeat(values, row, 0), np.repeat(truth, row), **options)
            assert value == pytest.approx(repeated, abs=1e-12), function.__name__
            assert function(values, truth, weights=row, **options) == pytest.approx(repeated, abs=1e-12)
    bins = metrics.reliability_bins(probs, labels, weights=counts[0])
    again = metrics.reliability_bins(np.repeat(probs, counts[0], 0), np.repeat(labels, counts[0]))
    np.testing.assert_allclose(bins.accuracy, again.accuracy)
    np.testing.assert_array_equal(bins.count, again.count)


@pytest.mark.parametrize("ties", [False, True])
def test_detection_counts_mean_repeated_scores(rng, ties, monkeypatch):
    monkeypatch.setattr("qclip.metrics.detection.BLOCK", 2)  # several blocks of two replicates
    inside, outside = scores(rng, ties)
    first, second = (rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size=5) for s in (inside, outside))
    wanted = {
        metrics.auroc: [{}],
        metrics.fpr_at_tpr: [{}, {"tpr": 0.8, "positive": "ood"}],
        metrics.aupr: [{"positive": p, "rule": r} for p in ("id", "ood") for r in ("steps", "trapezoid")],
    }
    for function, choices in wanted.items():
        for options in choices:
            both = function(inside, outside, id_weights=first, ood_weights=second, **options)
            one = function(inside, outside, id_weights=first, **options)
            for b in range(5):
                a, o = np.repeat(inside, first[b]), np.repeat(outside, second[b])
                assert both[b] == pytest.approx(function(a, o, **options), abs=1e-12)
                assert one[b] == pytest.approx(function(a, outside, **options), abs=1e-12)


def test_a_replicate_without_samples_is_nan(sample):
    logits, labels = sample
    counts = np.stack([np.zeros(len(labels)), np.ones(len(labels))])
    found = metrics.top_k_accuracy(logits, labels, weights=counts)
    assert math.isnan(found[0]) and found[1] == metrics.top_k_accuracy(logits, labels)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_non_finite_values_are_counted_and_located(sample):
    logits, labels = sample
    logits[17, 2], logits[40, 0] = np.nan, np.inf
    with pytest.raises(NonFiniteError, match=r"2 values that are NaN or infinite, the first at index \(17, 2\)"):
        metrics.nll(logits, labels)
    with pytest.raises(NonFiniteError, match="id_scores has 1 values.*index 1"):
        metrics.auroc([1.0, np.nan], [0.0])


def test_bad_shapes_labels_and_probabilities_are_refused(sample):
    logits, labels = sample
    with pytest.raises(InputError, match="no samples"):
        metrics.nll(np.empty((0, 3)), np.empty(0, int))
    with pytest.raises(InputError, match="label 6 at index 3"):
        metrics.nll(logits, np.where(np.arange(len(labels)) == 3, 6, labels))
    with pytest.raises(InputError, match="integers of shape"):
        metrics.nll(logits, labels[:-1])
    with pytest.raises(InputError, match="row 0 is no distribution"):
        metrics.ece(logits, labels)
    with pytest.raises(InputError, match="weights have shape"):
        metrics.nll(logits, labels, weights=np.ones(3))
    with pytest.raises(InputError, match="not negative"):
        metrics.nll(logits, labels, weights=-np.ones(len(labels)))
    with pytest.raises(InputError, match="whole numbers"):
        metrics.aurc(metrics.softmax(logits), labels, weights=np.full(len(labels), 0.5))


def test_one_class_has_no_calibration():
    probs, labels = np.ones((5, 1)), np.zeros(5, int)
    for value in (
        metrics.ece(probs, labels),
        metrics.signed_gap(probs, labels),
        metrics.brier(probs, labels),
        metrics.nll(probs, labels),
    ):
        assert math.isnan(value)


# -- records ----------------------------------------------------------------------------------------------------------


def test_every_record_loads_under_its_own_name_and_says_what_is_printed():
    for name, record in metrics.METRICS.items():
        assert record.name == name and record.label and record.better in (-1, 0, 1)
        biased_again = "ece" in name and name not in ("ece_max_n", "sensitivity_ece") and "wilcoxon" not in name
        assert record.interval == "bca" or (record.interval == "percentile" and not biased_again)
    unknown = metrics.metric("something_new")
    assert (unknown.label, unknown.better, unknown.unit) == ("something new", 0, "")


def test_a_metric_of_another_package_is_printed_by_its_record():
    from qclip.reporting import units

    metrics.METRICS.register(metrics.Metric("toy_share", "Toy share", 1, "share", 1))
    try:
        assert units.metric("toy_share").value(0.5) == "50.0 %" and units.metric("toy_share").name == "Toy share"
    finally:
        metrics.METRICS.unregister("toy_share")
