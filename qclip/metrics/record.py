"""What a metric is: its name, what it is called, its unit, which way is better, its interval, and its definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from qclip.registry import Registry

OWN = {
    "accuracy": ("top1", "top5", "balanced_accuracy", "worst_group_top1", "group_gap", "mean_top1", "error_ratio")
    + ("chance_top1",),
    "calibration": (
        "ece",
        "ece_ts",
        "ece_proxy",
        "ece_adaptive",
        "ece_max",
        "ece_max_n",
        "ece_l2",
        "ece_l2_square",
        "overconfidence",
        "underconfidence",
        "nll",
        "nll_ts",
        "nll_proxy",
        "signed_gap",
        "mean_confidence",
        "mean_ece",
        "mean_nll",
    ),
    "classwise": ("ece_classwise", "ece_classwise_likely"),
    "brier": ("brier", "brier_top", "brier_rel", "brier_res", "brier_unc", "brier_wbv", "brier_wbc"),
    "temperature": ("temperature", "temperature_proxy"),
    "detection": ("auroc", "fpr95", "fpr95_ood_positive", "tpr_transferred", "fpr_transferred"),
    "precision": ("aupr_in", "aupr_out", "aupr_in_trapezoid", "aupr_out_trapezoid"),
    "selective": ("aurc", "eaurc", "eaurc_approximate", "aurra", "coverage_transferred", "risk_transferred"),
    "relative": ("relative_drop", "relative_drop_auroc", "rsg", "vuln_add"),
    "agreement": ("agreement", "cosine_mean", "cosine_min", "kl")
    + tuple(f"sensitivity{of}" for of in ("", "_kl", "_top1", "_ece")),
    "paired": ("flips_lost", "flips_won", "flips_all", "mcnemar_p", "mcnemar_exact_p", "delong_p")
    + ("difference_p", "difference_holm_p")
    + tuple(f"{name}_{p}" for name in ("top1", "ece", "nll", "auroc") for p in ("wilcoxon_p", "wilcoxon_holm_p")),
    "wins": ("wins", "wins_clear", "wins_expected", "wins_p"),
    "neighbours": ("index_recall", "index_recall_reverse", "text_recall", "text_recall_reverse"),
    "groups": ("mean_worst_gap",),
    "human": ("human_nll", "entropy_correlation"),
    "retrieval": ("image_to_text_recall", "text_to_image_recall"),
    "pairwise": ("pair_ece", "pair_nll"),
    "probe": ("probe_top1", "probe_c"),
    "weights": (
        "gain",
        "gain_white",
        "sqnr",
        "sqnr_white",
        "level",
        "shape",
        "energy_removed",
        "principal_angle",
        "band_gap",
        "band_energy",
        "effective_rank",
        "stable_rank",
        "mean_shift",
        "band_top1",
        "band_top1_own",
        "band_top1_random",
        "band_top1_energy",
        "high_frequency",
        "grating_response",
        "grating_top1",
        "logit_factor",
    ),
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """better: 1 where higher is better, -1 where lower is, 0 where neither is said.
    unit: "share" (0..1, shown in percent), or what stands behind the number ("dB", "").
    digits: decimals of a printed value (of its percent). signed: its sign says something.
    interval: "bca" for a metric whose bootstrap adds its bias again (ECE), else "percentile".
    of: its definition: the outputs of a model on a set -> `Statistic`, None where it is undefined there; of a detection
    metric: a block of a `Ranking` -> `[resamples]`. A metric without one is measured in another way.
    classes: with fewer it is undefined. undefined: why else its value may be NaN.
    version: to be raised with every change of its numbers, which are kept between runs.
    """

    name: str
    label: str
    better: Literal[-1, 0, 1] = 0
    unit: str = ""
    digits: int = 4
    signed: bool = False
    interval: Literal["percentile", "bca"] = "percentile"
    of: Callable[[Any], Any] | None = None
    classes: int = 1
    undefined: str = ""
    version: int = 1

    def over_severities(self) -> Metric:
        """The mean of this metric over the severities of a corruption."""
        label = f"{self.label}, mean over severities"
        return dataclasses.replace(self, name=f"mean_{self.name}", label=label, of=None)


METRICS: Registry[Metric] = Registry(
    "metric",
    "qclip.metrics",
    {name: f"qclip.metrics.{module}:{name.upper()}" for module, names in OWN.items() for name in names},
    ("label", "better", "unit", "interval"),
)


def metric(name: str) -> Metric:
    """The record of a metric; one that nobody has described prints plain numbers under its name."""
    return METRICS.get(name) if name in METRICS else Metric(name, name.replace("_", " "))
