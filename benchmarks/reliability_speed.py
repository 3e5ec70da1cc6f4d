"""How long metrics take.

    python -m benchmarks.reliability_speed logits           50,000 x 1,000 logits, beside torchmetrics and pytorch-ood
    python -m benchmarks.reliability_speed bootstrap        two models, 10,000 samples, 10 classes, 1,000 replicates
    python -m benchmarks.reliability_speed again PARQUET    the second of two equal evaluations

Each prints JSON lines. Times are wall clock: run it alone. `logits` takes the packages where they are installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def seconds(what: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = what()
    return round(time.perf_counter() - start, 2), found


def peak() -> float:
    """Peak resident memory in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def now() -> float:
    """Resident memory in GB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e9


def example(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, classes), np.float32) * 2
    labels = rng.integers(0, classes, n)
    logits[np.arange(n), labels] += 6 if classes > 100 else 2
    return logits, labels


def detection(ids: np.ndarray, oods: np.ndarray, *counts: np.ndarray) -> dict[str, np.ndarray]:
    """Seven metrics of one score, on the sample or on every resample."""
    from qclip.metrics import metric
    from qclip.metrics.detection import Ranking

    names = ("auroc", "fpr95", "fpr95_ood_positive", "aupr_in", "aupr_out", "aupr_in_trapezoid", "aupr_out_trapezoid")
    of = [definition for name in names if (definition := metric(name).of) is not None]
    id_counts, ood_counts = counts or [np.ones((len(s), 1), np.uint8) for s in (ids, oods)]
    return dict(zip(names, Ranking(ids, oods).on(of, id_counts, ood_counts), strict=True))


def scores(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Five scores of bare logits, by blocks of rows."""
    from qclip.reliability.sample import Known, Sample
    from qclip.reliability.scores import SCORES

    wanted = ("msp", "maxlogit", "energy", "entropy", "gen")
    fitted = {name: SCORES.made(name).fit(Known(np.eye(logits.shape[1]), 1.0)) for name in wanted}

    def of(start: int) -> list[np.ndarray]:
        block = logits[start : start + 256].astype(np.float64)
        sample = Sample(block, block, 1.0)
        return [score(sample) for score in fitted.values()]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(of, range(0, len(logits), 256)))
    return dict(zip(wanted, (np.concatenate(each) for each in zip(*parts, strict=True)), strict=True))


THEIRS = ("ece", "ece_l2", "ece_max", "top1", "top5", "balanced_accuracy", "nll")


def ours(logits: np.ndarray, labels: np.ndarray, oods: np.ndarray, dev: slice | None) -> None:
    """Every metric, with the temperature of the dev rows; without them only those that the others have."""
    from qclip import metrics

    if dev is None:
        metrics.measure(logits, labels, names=THEIRS)
    else:
        metrics.measure(logits, labels, metrics.fit_temperature(logits[dev], labels[dev]).value)
    inside, outside = scores(logits), scores(oods)
    for name in inside:
        detection(inside[name], outside[name])


def theirs(logits: np.ndarray, labels: np.ndarray, oods: np.ndarray) -> list[str]:
    """ECE l1, l2 and max, top-1, top-5, balanced accuracy and NLL by torchmetrics and torch; five scores with AUROC,
    FPR and both AUPR by pytorch-ood. No adaptive, classwise or debiased ECE, Brier score, AURC or temperature."""
    import torch
    from pytorch_ood.detector import GEN, EnergyBased, Entropy, MaxLogit, MaxSoftmax
    from pytorch_ood.metrics import functional as po
    from torchmetrics.functional import classification as tm

    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    classes, p = z.shape[1], torch.softmax(z, 1)
    for norm in ("l1", "l2", "max"):
        tm.multiclass_calibration_error(p, y, classes, 15, norm)
    tm.multiclass_accuracy(z, y, classes, average="micro")
    tm.multiclass_accuracy(z, y, classes, top_k=5, average="micro")
    tm.multiclass_accuracy(z, y, classes, average="macro")
    torch.nn.functional.cross_entropy(z, y)
    detectors = {"msp": MaxSoftmax, "maxlogit": MaxLogit, "energy": EnergyBased, "entropy": Entropy, "gen": GEN}
    target = torch.cat([torch.zeros(len(z)), -torch.ones(len(oods))]).long()
    for detector in detectors.values():
        score = detector.score if detector is not MaxSoftmax else (lambda each: -torch.softmax(each, 1).amax(1))
        values = torch.cat([score(z), score(torch.from_numpy(oods))])
        po.auroc(values, target)
        po.fpr_at_tpr(values, target)
        for side in ("id", "ood"):
            po.aupr(values, target, side)
    return list(detectors)


def run_logits(n: int, classes: int) -> None:
    import qclip.reliability.scores  # noqa: F401 (imports are not timed)

    logits, labels = example(n, classes, 0)
    oods = np.random.default_rng(1).standard_normal((n // 5, classes), np.float32) * 2
    ours(logits[:500], labels[:500], oods[:500], slice(0, 100))
    before = now()
    took, _ = seconds(lambda: ours(logits, labels, oods, slice(0, n // 10)))
    print(json.dumps({"ours": took, "gb_beyond_logits": round(peak() - before, 3), "n": n, "classes": classes}))
    same, _ = seconds(lambda: ours(logits, labels, oods, None))
    try:
        theirs(logits[:500], labels[:500], oods[:500])
    except ImportError as why:
        print(json.dumps({"torchmetrics and pytorch-ood": f"not installed ({why})"}))
        return
    other, names = seconds(lambda: theirs(logits, labels, oods))
    print(json.dumps({"theirs": other, "ours_the_same": same, "scores": names, "times_faster": round(other / same, 1)}))


def run_bootstrap(n: int, classes: int) -> None:
    from qclip.metrics.predictions import DETAILED, LABELLED
    from qclip.reliability.outputs import Outputs, read_out
    from qclip.reliability.writer import Page, Writer
    from qclip.results import Results

    def outputs(seed: int) -> Outputs:
        rng = np.random.default_rng(0)
        classifier = np.linalg.qr(rng.normal(size=(64, classes)))[0].T
        labels = rng.integers(0, classes, n)
        vectors = classifier[labels] + rng.normal(size=(n, 64)) * 0.4
        vectors += np.random.default_rng(seed).normal(size=vectors.shape) * 0.02
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        temperatures = {"ts": 1.3, "proxy": 0.8}
        return read_out(vectors, classifier, 20.0, labels, temperatures)

    found = {"float": outputs(1), "other": outputs(2)}
    oods = {label: np.random.default_rng(i).normal(-0.5, 1, n) for i, label in enumerate(found)}

    def everything() -> Results:
        results = Results()
        writer = Writer(results, tuple(found), 0)
        page: Page = writer.page("set", "id", n, "digest")
        names = (*LABELLED, *DETAILED)
        page.labelled(page.draw(found, names=names), names=names)
        id_counts, ood_counts = (writer.resampling(name, n).bootstrap() for name in ("digest", "ood"))
        drawn = {label: detection(o.confidence, oods[label], id_counts, ood_counts) for label, o in found.items()}
        for name in drawn["float"]:
            page.estimates(name, {label: each[name] for label, each in drawn.items()}, score="msp")
        return results

    took, results = seconds(everything)
    rows = len({row["metric"] for row in results.rows})
    print(json.dumps({"bootstrap": took, "metrics": rows, "n": n, "classes": classes, "replicates": 1000}))


def run_again(path: str, model: str, recipe: str, cache: str | None) -> None:
    import qclip
    from qclip.reliability import evaluate

    def whole(cache: str) -> float:
        float_model = qclip.load_model(model)
        models = {"float": float_model, recipe: qclip.quantize(float_model, recipe)}
        return seconds(lambda: evaluate(models, f"parquet:{path}", cache=cache))[0]

    with tempfile.TemporaryDirectory() as folder:
        for turn in ("first", "second"):
            took, alone = seconds(lambda: whole(cache or folder))
            print(json.dumps({turn: took, "evaluate_alone": alone, "model": model, "recipe": recipe}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("logits", "bootstrap", "again"))
    parser.add_argument("path", nargs="?", default="cifar10_test.parquet")
    parser.add_argument("--model", default="photos")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--cache", help="a folder to be kept; default: a temporary one")
    parser.add_argument("--n", type=int)
    parser.add_argument("--classes", type=int)
    args = parser.parse_args()
    if args.what == "logits":
        run_logits(args.n or 50_000, args.classes or 1000)
    elif args.what == "bootstrap":
        run_bootstrap(args.n or 10_000, args.classes or 10)
    else:
        run_again(args.path, args.model, args.recipe, args.cache)


if __name__ == "__main__":
    main()
