"""From per-image outputs of all models to rows with intervals and paired differences."""

from __future__ import annotations

import dataclasses
import functools
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qclip.metrics import mcnemar, metric, roc_curve_points
from qclip.metrics.calibration import diagram
from qclip.metrics.detection import Ranking
from qclip.metrics.resampled import Statistic, evaluate_on, mean_of
from qclip.results import Results

from .classification import LABELLED, Outputs, statistics
from .statistics import INTERVALS, Estimate, Resampling, seeded

SMALL_GROUP = 10  # a group of fewer images is flagged
MOST_GROUPS = 64
DETECTION = ("auroc", "fpr95", "fpr95_ood_positive")
ROC_GRID = np.unique(np.round(np.concatenate([np.arange(0, 0.1, 0.005), np.arange(0.1, 1.0001, 0.02), [1.0]]), 3))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the rows of one table have in common."""

    set: str
    role: str  # one of `qclip.results.ROLES`
    digest: str  # seeds the resampling: equal for all models, different between sets
    n: int  # images
    classes: int
    seed: int
    corruption: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of a set: a named subset of them, or a group."""

    subset: str = ""
    group: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        return {"axis": "group", "at": self.group} if self.group else {"subset": self.subset}


WHOLE = Part()
Drawn = dict[str, dict[tuple[Part, str], np.ndarray]]  # model -> (part, metric) -> resamples


@dataclasses.dataclass
class Table:
    """Writes the rows of one labelled set. `labels[0]` is the reference of the differences."""

    results: Results
    setting: Setting
    labels: list[str]
    replicates: int

    @functools.cached_property
    def resampling(self) -> Resampling:
        return Resampling.draw(self.setting.n, seeded(self.setting.seed, self.setting.digest), self.replicates)

    def _add(self, model: str, metric: str, **fields: Any) -> None:
        described = self.results.meta.get("models", {}).get(model, {})
        self.results.add(
            **{
                "model": model,
                "set": self.setting.set,
                "role": self.setting.role,
                "corruption": self.setting.corruption,
                "metric": metric,
                "seed": self.setting.seed,
            }
            | described
            | fields
        )

    def _curve(self, model: str, name: str, points: Mapping[str, Iterable[float | None]], **fields: Any) -> None:
        described = self.results.meta.get("models", {}).get(model, {})
        own: dict[str, Any] = {"model": model, "metric": name, "set": self.setting.set, "role": self.setting.role}
        own |= {"corruption": self.setting.corruption, "seed": self.setting.seed}
        self.results.add_curve(points, **described | own | fields)

    def _estimates(self, name: str, drawn: Mapping[str, np.ndarray], **fields: Any) -> None:
        """Rows of a metric for all models, and of the differences to the first."""
        interval = INTERVALS[metric(name).interval]
        reference = drawn[self.labels[0]]
        for label in self.labels:
            self._estimate(label, name, interval(drawn[label], self.replicates), **fields)
        for label in self.labels[1:]:
            difference = interval(drawn[label] - reference, self.replicates)
            self._estimate(label, name, difference, reference=self.labels[0], **fields)

    def _estimate(self, label: str, metric: str, estimate: Estimate, **fields: Any) -> None:
        self._add(label, metric, value=estimate.value, low=estimate.low, high=estimate.high, **fields)

    def metrics(self, outputs: dict[str, Outputs], groups: dict[str, np.ndarray]) -> None:
        """Every metric of `LABELLED` on all images and on each subset; worst group and gap where there are groups."""
        n = self.setting.n
        named = self._group_names(groups)
        parts = {WHOLE: np.ones(n, bool)}
        parts |= {Part(subset=k): values for k, values in groups.items() if values.dtype == bool and values.any()}
        by_group = {name: Part(group=name) for name in named}
        parts |= {part: groups["group"] == name for name, part in by_group.items()}
        drawn = self._draw(outputs, parts)
        for part, mask in parts.items():
            self._part(drawn, part, int(mask.sum()))
        if len(named) > 1:
            self._worst_group(
                {name: {label: drawn[label][p, "top1"] for label in self.labels} for name, p in by_group.items()}, n
            )

    def _part(self, drawn: Drawn, part: Part, n: int, **fields: Any) -> None:
        fields = part.fields | {"n": n} | fields
        for name in LABELLED:
            if all((part, name) in drawn[label] for label in self.labels):
                self._estimates(name, {label: drawn[label][part, name] for label in self.labels}, **fields)
            else:
                for label in self.labels:
                    self._add(label, name, value=None, **fields)
                if name == "top5":
                    self.results.note(f"{self.setting.set}: top5 is undefined with {self.setting.classes} classes")

    def _draw(self, outputs: dict[str, Outputs], parts: dict[Part, np.ndarray]) -> Drawn:
        wanted: dict[tuple[str, Part, str], Statistic] = {}
        for label in self.labels:
            for part, mask in parts.items():
                for name, statistic in statistics(outputs[label], mask).items():
                    wanted[label, part, name] = statistic
        values = evaluate_on(list(wanted.values()), self.resampling.counts)
        out: Drawn = {label: {} for label in self.labels}
        for (label, part, name), value in zip(wanted, values, strict=True):
            out[label][part, name] = value
        return out

    def _group_names(self, groups: dict[str, np.ndarray]) -> list[str]:
        if "group" not in groups:
            return []
        names, counts = np.unique(groups["group"], return_counts=True)
        if len(names) > MOST_GROUPS:
            self.results.note(
                f"{self.setting.set}: {len(names)} groups are too many for a table, only up to {MOST_GROUPS} are shown"
            )
            return []
        small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < SMALL_GROUP]
        if small:
            self.results.note(f"{self.setting.set}: groups of fewer than {SMALL_GROUP} images: {', '.join(small)}")
        return [str(name) for name in names]

    def _worst_group(self, top1: dict[str, dict[str, np.ndarray]], n: int) -> None:
        """Each model's worst and best group are fixed by the sample: the worst group of a replicate is biased low."""
        worst, gap, names = {}, {}, {}
        for label in self.labels:
            ranked = sorted(top1, key=lambda name: float(top1[name][label][0]))
            worst[label] = top1[ranked[0]][label]
            gap[label] = top1[ranked[-1]][label] - worst[label]
            names[label] = ranked[0]
        self._estimates("worst_group_top1", worst, n=n)
        self._estimates("group_gap", gap, n=n)
        shown = ", ".join(f"{label}: {name}" for label, name in names.items())
        self.results.note(f"{self.setting.set}: worst group of {shown}; its interval holds the group fixed")

    def severities(self, outputs: dict[int, dict[str, Outputs]]) -> None:
        """Metrics at each severity, and `mean_top1`, `mean_ece`, `mean_nll` over the severities above 0. One
        resampling serves all: they are the same images."""
        n = self.setting.n
        everything = {WHOLE: np.ones(n, bool)}
        drawn = {severity: self._draw(found, everything) for severity, found in outputs.items()}
        for severity, values in drawn.items():
            self._part(values, WHOLE, n, severity=severity)
        for name in ("top1", "ece", "nll"):
            means = {
                label: np.mean([drawn[s][label][WHOLE, name] for s in drawn if s], axis=0) for label in self.labels
            }
            self._estimates(f"mean_{name}", means, n=n)

    def temperatures(self, fitted: Mapping[str, float | None]) -> None:
        for label in self.labels:
            self._add(label, "temperature", value=fitted[label], n=self.setting.n)

    def agreement(self, vectors: dict[str, np.ndarray], outputs: dict[str, Outputs]) -> None:
        """Cosine between a model's image embeddings and the reference's, equal predictions, and McNemar's flips."""
        reference, n = self.labels[0], self.setting.n
        wanted: dict[tuple[str, str], Statistic] = {}
        for label in self.labels[1:]:
            wanted[label, "agreement"] = mean_of(outputs[label].predicted == outputs[reference].predicted)
            if vectors[label].shape == vectors[reference].shape:  # else their embeddings live in different spaces
                wanted[label, "cosine_mean"] = mean_of(np.einsum("ne,ne->n", vectors[label], vectors[reference]))
        drawn = evaluate_on(list(wanted.values()), self.resampling.bootstrap()) if wanted else []
        common: dict[str, Any] = {"reference": reference, "n": n}
        for (label, name), values in zip(wanted, drawn, strict=True):
            interval = INTERVALS[metric(name).interval]
            self._estimate(label, name, interval(values, self.replicates), **common)
        for label in self.labels[1:]:
            if (label, "cosine_mean") in wanted:
                self._add(label, "cosine_min", value=wanted[label, "cosine_mean"].sums[0].values.min(), **common)
            flips = mcnemar(outputs[reference].right, outputs[label].right)
            self._add(label, "flips_lost", value=flips.lost, **common)
            self._add(label, "flips_won", value=flips.won, **common)
            self._add(label, "mcnemar_p", value=flips.p, **common)

    def bins(self, outputs: dict[str, Outputs]) -> None:
        for label in self.labels:
            found = diagram(outputs[label].confidence, outputs[label].right)
            filled = np.flatnonzero(found.count)
            points = {"bin": filled} | {
                name: getattr(found, name)[filled] for name in ("accuracy", "confidence", "count")
            }
            self._curve(label, "reliability", points, n=self.setting.n)

    def speed(self, seconds: Mapping[str, float]) -> None:
        for label in self.labels:
            self._add(
                label,
                "ms_per_image",
                value=1000 * seconds[label] / self.setting.n,
                n=self.setting.n,
                seconds=seconds[label],
                host=self.results.meta["cpu"],
            )
        self.results.note(
            "ms_per_image was taken while embedding, beside whatever else ran: `qclip bench` measures speed"
        )


@dataclasses.dataclass
class DetectionTable:
    """Writes the rows of OOD detection, set by set, then their mean."""

    results: Results
    id_digest: str
    n_id: int
    labels: list[str]
    replicates: int
    seed: int
    id_scores: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    drawn: list[dict[tuple[str, str], dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def id_counts(self) -> np.ndarray:
        return Resampling.draw(self.n_id, seeded(self.seed, self.id_digest), self.replicates).bootstrap()

    def add(self, name: str, digest: str, kind: str, ood_scores: dict[str, dict[str, np.ndarray]]) -> None:
        """One OOD set: scores by model and score name."""
        n_ood = len(ood_scores[self.labels[0]]["mcm"])
        # the word keeps an OOD set that equals the ID set from being resampled like it
        ood_counts = Resampling.draw(n_ood, seeded(self.seed, f"ood {digest}"), self.replicates).bootstrap()
        role = f"ood-{kind}" if kind else "ood"
        table = Table(self.results, Setting(name, role, digest, n_ood, 0, self.seed), self.labels, self.replicates)
        definitions = {name: of for name in DETECTION if (of := metric(name).of) is not None}
        found = {}
        for label in self.labels:
            for score, values in ood_scores[label].items():
                ranking = Ranking(self.id_scores[label][score], values)
                drawn = ranking.on(list(definitions.values()), self.id_counts, ood_counts)
                found[label, score] = dict(zip(definitions, drawn, strict=True))
        self.drawn.append(found)
        self._rows(table, found, n=n_ood)
        for label, score in found:
            fpr, tpr = roc_curve_points(self.id_scores[label][score], ood_scores[label][score], ROC_GRID)
            table._curve(label, "roc", {"fpr": fpr, "tpr": tpr}, score=score, n=n_ood)

    def _rows(self, table: Table, found: dict[tuple[str, str], dict[str, np.ndarray]], **fields: Any) -> None:
        for score in dict.fromkeys(score for _, score in found):
            for name in DETECTION:
                values = {label: found[label, score][name] for label in self.labels}
                table._estimates(name, values, score=score, **fields)

    def means(self) -> None:
        """The mean over sets (not of pooled scores), where there are several."""
        if len(self.drawn) < 2:
            return
        mean = {
            key: {name: np.mean([found[key][name] for found in self.drawn], axis=0) for name in DETECTION}
            for key in self.drawn[0]
        }
        name = f"mean of {len(self.drawn)} OOD sets"
        self._rows(
            Table(self.results, Setting(name, "ood-mean", "", 0, 0, self.seed), self.labels, self.replicates), mean
        )


def about_model(results: Results, label: str, model: nn.Module) -> None:
    """What the model is: source and recipe for all its rows, coverage where it was quantized here, and size."""
    quantization = getattr(model, "qclip_quantization", None)
    described = {"source": str(getattr(model, "qclip_source", "") or "")}
    if quantization is not None:
        recipe = quantization.recipe
        described = {
            "source": quantization.source,
            "recipe": recipe.name,
            "method": recipe.method,
            "bits": recipe.bits,
            "recipe_hash": recipe.hash,
        }
    results.meta.setdefault("models", {})[label] = described
    tensors = {t.data_ptr() or id(t): t for t in (*model.parameters(), *model.buffers())}  # tied weights once
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    results.add(model=label, metric="model_bytes", role="model", value=size, **described)
    if quantization is None:
        return
    coverage = quantization.coverage
    for state, shares in coverage.shares().items():
        for name, counted in (("coverage_macs", "macs"), ("coverage_params", "parameters")):
            value = shares[counted]
            results.add(model=label, metric=name, role="model", axis="state", at=state, value=value, **described)
    for row in coverage.rows:
        activation = "float" if row.activation_bits in (None, 16) else row.activation_bits
        bits = "" if row.weight_bits is None else f"{row.weight_bits}/{activation}"
        results.add(
            **described
            | {
                "model": label,
                "metric": "site_macs",
                "set": row.site,
                "role": "site",
                "axis": "state",
                "at": row.state,
                "backend": row.backend,
                "bits": bits,
                "value": row.macs,
                "n": row.parameters,
            }
        )


def environment(seed: int, batch: int, replicates: int) -> dict[str, Any]:
    """What the numbers were made with."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    for package in ("qclip", "open_clip_torch", "timm", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "batch": batch,
        "replicates": replicates,
        "command": "qclip.evaluate",
        "platform": sys.platform,
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
