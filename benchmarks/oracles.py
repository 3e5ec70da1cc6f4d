"""Our metrics beside those of other packages, on the same random and adversarial samples.

    python -m benchmarks.oracles            (prints a table; exit 1 where something differs that should not)

Wants torchmetrics, netcal, uncertainty-calibration, pytorch-ood and scikit-learn; the ones that are not installed are
named. Their documented faults are shown as differences, and it is an error if one is gone: then the row is out of date.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from qclip import metrics

CASES, EXACT = 200, 1e-12
Case = tuple[np.ndarray, np.ndarray]
Fault = Callable[[], tuple[str, float, float]]  # what happens, theirs, ours


def labelled(ties: bool = False) -> Iterator[Case]:
    """Probabilities and labels, off the edges of bins; `ties`: with equal confidences, certain ones, all equal ones."""
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        n, classes = int(rng.integers(20, 200)), int(rng.choice([3, 5, 10, 1000 if seed % 20 == 0 else 4]))
        probs = rng.dirichlet(np.full(classes, rng.choice([0.1, 0.5, 2.0])), n)
        probs = 0.98 * probs + 0.02 / classes  # never 1, which torchmetrics puts into a bin of its own
        labels = rng.integers(0, classes, n)
        labels[:3] = 0, 1, 2  # netcal guesses the task from the labels that are present
        if ties and seed % 3 == 0:
            probs[: n // 2] = probs[0]
        if ties and seed % 3 == 1:
            probs[: n // 2] = np.eye(classes)[labels[: n // 2]]
        yield probs, labels


def scored(ties: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        ids, oods = rng.normal(0.7, 1, int(rng.integers(1, 200))), rng.normal(0, 1.3, int(rng.integers(1, 200)))
        yield (np.round(ids * 2) / 2, np.round(oods * 2) / 2) if ties and seed % 2 else (ids, oods)


def worst(cases: Iterator, ours: Callable[..., Any], theirs: Callable[..., Any]) -> float:
    return max(abs(float(ours(*case)) - float(theirs(*case))) for case in cases)


def top(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return probs.max(1), (probs.argmax(1) == labels).astype(float)


def torchmetrics_rows() -> Iterator[tuple[str, float]]:
    from torchmetrics.functional import classification as tm
    from torchmetrics.functional.classification.calibration_error import _ce_compute

    # The public function rounds confidences to float32, so what it calls is called with float64.
    def error(p: np.ndarray, y: np.ndarray, norm: str, debias: bool = False) -> float:
        confidence, hit = (torch.from_numpy(each) for each in top(p, y))
        return float(_ce_compute(confidence, hit, torch.arange(16, dtype=torch.float64) / 15, norm, debias))

    def accuracy(p: np.ndarray, y: np.ndarray) -> float:
        found = tm.multiclass_stat_scores(torch.from_numpy(p), torch.from_numpy(y), p.shape[1], average="micro")
        return int(found[0]) / int(found[4])

    for norm in ("l1", "l2", "max"):
        yield (
            f"ECE, {norm}",
            worst(
                labelled(),
                lambda p, y, norm=norm: metrics.ece(p, y, norm=norm),
                lambda p, y, norm=norm: error(p, y, norm),
            ),
        )
    yield (
        "debiased L2, equal width, squared, no bin of one sample",
        worst(
            ((np.repeat(p, 2, 0), np.repeat(y, 2)) for p, y in labelled()),
            lambda p, y: metrics.debiased_l2(p, y, binning="width") ** 2,
            lambda p, y: error(p, y, "l2", debias=True) ** 2,
        ),
    )
    yield "top-1", worst(labelled(True), metrics.top_k_accuracy, accuracy)


def torchmetrics_faults() -> Iterator[Fault]:
    from torchmetrics.functional import classification as tm
    from torchmetrics.functional.classification.calibration_error import _ce_compute

    def closed() -> tuple[str, float, float]:
        p, y = np.array([[0.95, 0.05], [1.0, 0.0]]), np.array([0, 1])
        theirs = tm.multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(y), 2, 15)
        return "confidence 1.0 lies in a sixteenth bin", float(theirs), float(metrics.ece(p, y))

    def saturated() -> tuple[str, float, float]:
        rng = np.random.default_rng(0)
        ids, oods = rng.normal(30, 1, 1000).astype(np.float32), rng.normal(28, 1, 1000).astype(np.float32)
        truth = torch.cat([torch.ones(1000), torch.zeros(1000)]).long()
        theirs = tm.binary_auroc(torch.from_numpy(np.concatenate([ids, oods])), truth)
        return "AUROC of energies near 30: a hidden sigmoid makes them equal", float(theirs), metrics.auroc(ids, oods)

    def guessed() -> tuple[str, float, float]:
        cosines = np.array([[0.31, 0.2, 0.1], [0.1, 0.3, 0.2]])
        y = np.array([0, 1])
        theirs = tm.multiclass_calibration_error(torch.from_numpy(cosines), torch.from_numpy(y), 3, 15)
        ours = metrics.ece(metrics.softmax(100 * cosines), y)
        return "cosines pass as probabilities, no softmax", float(theirs), float(ours)

    def single() -> tuple[str, float, float]:
        confidence, hit = torch.tensor([0.9], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        theirs = _ce_compute(confidence, hit, torch.arange(16, dtype=torch.float64) / 15, "l2", True)
        ours = metrics.debiased_l2(np.array([[0.9, 0.1]]), np.array([1]), binning="width")
        return "debiased L2: a bin of one sample counts, with a gap that is mostly chance", float(theirs), float(ours)

    yield closed
    yield single
    yield saturated
    yield guessed


def netcal_rows() -> Iterator[tuple[str, float]]:
    from netcal.metrics import ECE, MCE

    yield "ECE", worst(labelled(), metrics.ece, lambda p, y: ECE(15).measure(p, y))
    yield "maximum", worst(labelled(), lambda p, y: metrics.ece(p, y, norm="max"), lambda p, y: MCE(15).measure(p, y))


def netcal_faults() -> Iterator[Fault]:
    from netcal.metrics import ECE

    def two_classes() -> tuple[str, float, float]:
        rng = np.random.default_rng(0)
        p, y = rng.dirichlet(np.ones(2), 200), rng.integers(0, 2, 200)
        theirs = ECE(15).measure(p[:, 1], y)
        return "of two classes the second's probability, not the top label's", float(theirs), float(metrics.ece(p, y))

    def two_labels() -> tuple[str, float, float]:
        rng = np.random.default_rng(0)
        p, y = rng.dirichlet(np.ones(5), 50), rng.integers(0, 2, 50)
        try:
            theirs = float(ECE(15).measure(p, y))
        except RuntimeError:
            theirs = float("nan")
        return "two labels present of five classes: RuntimeError", theirs, float(metrics.ece(p, y))

    yield two_classes
    yield two_labels


def uncertainty_calibration_rows() -> Iterator[tuple[str, float]]:
    import calibration as uc

    yield "ECE", worst(labelled(True), metrics.ece, uc.get_ece)
    yield "adaptive ECE, no ties", worst(labelled(), metrics.adaptive_ece, uc.get_ece_em)
    for name, scheme, binning in (
        ("mass", uc.get_equal_bins, "mass"),
        ("width", uc.utils.get_equal_prob_bins, "width"),
    ):
        yield (
            f"debiased L2, equal {name}, squared",
            worst(
                labelled(),
                lambda p, y, binning=binning: metrics.debiased_l2(p, y, binning=binning) ** 2,
                lambda p, y, scheme=scheme: (
                    uc.lower_bound_scaling_ce(p, y, 2, True, 15, binning_scheme=scheme, mode="top-label") ** 2
                ),
            ),
        )


def uncertainty_calibration_faults() -> Iterator[Fault]:
    import calibration as uc

    def discrete() -> tuple[str, float, float]:
        rng = np.random.default_rng(0)
        top_p = rng.integers(34, 65, 2000) / 64 * 0.98
        p = np.stack([top_p, (1 - top_p) / 2, (1 - top_p) / 2], 1)
        y = np.where(rng.random(2000) < top_p, 0, 1)
        theirs = uc.get_calibration_error(p, y, p=1, debias=False, mode="top-label")
        return "a bin for each distinct value where there are few", float(theirs), float(metrics.ece(p, y))

    yield discrete


def pytorch_ood_rows() -> Iterator[tuple[str, float]]:
    from pytorch_ood.metrics import functional as po

    def both(ids: np.ndarray, oods: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.cat([torch.zeros(len(ids)), -torch.ones(len(oods))]).long()
        return torch.from_numpy(-np.concatenate([ids, oods])), labels  # higher = OOD there

    yield "AUROC", worst(scored(), metrics.auroc, lambda a, o: po.auroc(*both(a, o)))
    yield (
        "FPR95, OOD positive",
        worst(
            scored(),
            lambda a, o: metrics.fpr_at_tpr(a, o, positive="ood"),
            lambda a, o: po.fpr_at_tpr(*both(a, o), 0.95),
        ),
    )
    for side in ("id", "ood"):
        yield (
            f"AUPR by the trapezoid, {side.upper()} positive",
            worst(
                scored(),
                lambda a, o, side=side: metrics.aupr(a, o, side, "trapezoid"),
                lambda a, o, side=side: po.aupr(*both(a, o), side),
            ),
        )
    yield (
        "accuracy-coverage, no ties",
        worst(labelled(), metrics.aurra, lambda p, y: po.aurra(*(torch.from_numpy(each) for each in top(p, y)))),
    )


def scikit_learn_rows() -> Iterator[tuple[str, float]]:
    from sklearn import metrics as sk

    def truth(ids: np.ndarray, oods: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones(len(ids)), np.zeros(len(oods))])

    yield "AUROC", worst(scored(), metrics.auroc, lambda a, o: sk.roc_auc_score(truth(a, o), np.concatenate([a, o])))
    yield (
        "AUPR, ID positive",
        worst(scored(), metrics.aupr, lambda a, o: sk.average_precision_score(truth(a, o), np.concatenate([a, o]))),
    )
    yield (
        "AUPR, OOD positive",
        worst(
            scored(),
            lambda a, o: metrics.aupr(a, o, "ood"),
            lambda a, o: sk.average_precision_score(1 - truth(a, o), -np.concatenate([a, o])),
        ),
    )
    yield (
        "balanced accuracy",
        worst(labelled(), metrics.balanced_accuracy, lambda p, y: sk.balanced_accuracy_score(y, p.argmax(1))),
    )
    yield (
        "top-2, no ties",
        worst(
            labelled(),
            lambda p, y: metrics.top_k_accuracy(p, y, 2),
            lambda p, y: sk.top_k_accuracy_score(y, p, k=2, labels=range(p.shape[1])),
        ),
    )
    yield (
        "Brier score of the confidence",
        worst(
            labelled(True),
            lambda p, y: metrics.brier_parts(*top(p, y)).score,
            lambda p, y: sk.brier_score_loss(top(p, y)[1], top(p, y)[0], pos_label=1),
        ),
    )


def scikit_learn_faults() -> Iterator[Fault]:
    from sklearn import metrics as sk

    def ties() -> tuple[str, float, float]:
        p, y = np.full((6, 3), 1 / 3), np.array([0, 0, 0, 1, 1, 2])
        theirs = sk.top_k_accuracy_score(y, p, k=1)
        return "ties go to the last class", float(theirs), float(metrics.top_k_accuracy(p, y))

    yield ties


PACKAGES = {
    "torchmetrics": ("torchmetrics", torchmetrics_rows, torchmetrics_faults),
    "netcal": ("netcal.metrics", netcal_rows, netcal_faults),
    "uncertainty-calibration": ("calibration", uncertainty_calibration_rows, uncertainty_calibration_faults),
    "pytorch-ood": ("pytorch_ood.metrics", pytorch_ood_rows, None),
    "scikit-learn": ("sklearn.metrics", scikit_learn_rows, scikit_learn_faults),
}


def main() -> int:
    warnings.simplefilter("ignore")
    bad = 0
    for package, (module, rows, faults) in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as why:
            print(f"{package}: not compared, it cannot be imported ({why})")
            continue
        print(f"{package} {importlib.metadata.version(package)}, {CASES} cases each")
        for name, difference in rows():
            equal = difference <= EXACT
            bad += not equal
            print(f"  {'equal ' if equal else 'DIFFER'} {difference:8.1e}  {name}")
        for fault in faults() if faults else ():
            what, theirs, ours = fault()
            gone = abs(theirs - ours) <= EXACT
            bad += gone
            print(f"  {'GONE  ' if gone else 'fault '} {theirs:.4f}, ours {ours:.4f}: {what}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
