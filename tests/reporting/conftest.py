"""A made-up table of results with the shape of a real one. The numbers are drawn, not measured: tests only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qclip.results import Results
from tests.reporting import made_up_spectra

RECIPES = {
    "w8a8": ("8/8", "rtn", 0.0),
    "w8a8-smoothquant": ("8/8", "smoothquant", 0.001),
    "w4a8": ("4/8", "rtn", 0.012),
    "w4a4": ("4/4", "rtn", 0.06),
}
MORE = {
    f"{bits}-{method}": (f"{bits[1]}/{bits[3:]}", method, harm)
    for bits, harm in (("w8a16", 0.0), ("w6a8", 0.001), ("w6a6", 0.009), ("w4a16", 0.014), ("w3a8", 0.09))
    for method in ("rtn", "smoothquant", "gptq")
}
ALL = RECIPES | MORE  # with the reference, twenty models
BANDS = {"ranks 0-8": 0, "ranks 8-64": 8, "ranks 64-": 64}  # name -> first rank


class Maker:
    """Adds rows for one reference and its variants."""

    def __init__(self, results: Results, reference: str, labels: dict[str, str], source: str, seed: int) -> None:
        self.results, self.reference, self.labels, self.source = results, reference, labels, source
        self.draw = np.random.default_rng(seed)

    def all(self) -> None:
        self.labelled("scenes-test", "id", 2000, 0.88, 0.035, bins=True)
        self.labelled("style-shift", "shift", 1500, 0.61, 0.11, bins=True)
        self.labelled("spurious-test", "shift", 1500, 0.72, 0.08)
        spurious = {"set": "spurious-test", "role": "shift"}
        for group, top1 in (("aligned", 0.85), ("conflict", 0.59)):
            self.metric("top1", top1, -0.5, **spurious, axis="group", at=group, n=750)
        self.metric("worst_group_top1", 0.59, -0.9, **spurious, n=1500)
        self.metric("group_gap", 0.26, 0.5, **spurious, n=1500)
        self.detection("near-ood", "near", 0.81)
        self.detection("far-ood", "far", 0.94)
        self.noise("scenes-test", 0.88)
        self.agreement("scenes-test")
        self.about()
        self.spectra()

    def describe(self, model: str) -> dict:
        recipe = self.labels[model]
        if not recipe:
            return {"model": model, "source": self.source}
        bits, method, _ = ALL[recipe]
        return {
            "model": model,
            "source": self.source,
            "recipe": recipe,
            "method": method,
            "bits": bits,
            "recipe_hash": f"{len(recipe):012x}",
        }

    def harm(self, model: str) -> float:
        return ALL[self.labels[model]][2] if self.labels[model] else 0.0

    def metric(self, name: str, base: float, effect: float, **fields) -> None:
        """`effect` times the recipe's harm is added to the base."""
        width = 0.6 / np.sqrt(fields.get("n", 1000))
        for model in self.labels:
            change = effect * self.harm(model) + (self.draw.normal(0, width / 12) if self.labels[model] else 0)
            value = base + change
            self.results.add(
                **self.describe(model),
                metric=name,
                value=value,
                low=value - width,
                high=value + width,
                seed=0,
                **fields,
            )
            if model != self.reference:
                half = width / 4 + 0.15 * abs(change)
                self.results.add(
                    **self.describe(model),
                    metric=name,
                    value=change,
                    low=change - half,
                    high=change + half,
                    reference=self.reference,
                    seed=0,
                    **fields,
                )

    def labelled(self, name: str, role: str, n: int, top1: float, gap: float, bins: bool = False) -> None:
        where = {"set": name, "role": role, "n": n}
        self.metric("top1", top1, -1, **where)
        self.metric("top5", min(0.995, top1 + 0.1), -0.3, **where)
        self.metric("balanced_accuracy", top1 - 0.004, -1, **where)
        self.metric("ece", abs(gap), -0.3, **where)
        self.metric("ece_ts", 0.018, 0.02, **where)
        self.metric("nll", 1.6 * (1 - top1), 2, **where)
        self.metric("brier", 1.4 * (1 - top1), 1, **where)
        self.metric("signed_gap", gap, -0.3, **where)
        self.metric("mean_confidence", top1 + gap, -1.3, **where)
        for model in self.labels:
            self.results.add(**self.describe(model), metric="temperature", value=1.2 - self.harm(model), **where)
            if bins:
                self.bins(model, where, n, gap)
        if name == "scenes-test":
            for model in self.labels:
                time = 0.9 if self.labels[model] else 2.4
                self.results.add(
                    **self.describe(model),
                    metric="ms_per_image",
                    value=time,
                    **where,
                    seconds=1.0,
                    host="An ordinary CPU",
                )

    def bins(self, model: str, where: dict, n: int, gap: float) -> None:
        share = np.exp(np.linspace(0, 4, 15))
        points: dict[str, list[float]] = {"bin": [], "accuracy": [], "confidence": [], "count": []}
        for b, count in enumerate((n * share / share.sum()).astype(int)):
            if count:
                confidence = (b + 0.55) / 15
                accuracy = float(np.clip(confidence - gap + self.draw.normal(0, 0.4 / np.sqrt(count)), 0, 1))
                for column, value in zip(points, (b, accuracy, confidence, count), strict=True):
                    points[column].append(value)
        self.results.add_curve(points, **self.describe(model), metric="reliability", **where)

    def detection(self, name: str, kind: str, auroc: float) -> None:
        for score, worse in (("mcm", 0.0), ("maxlogit", 0.02), ("energy", 0.04)):
            where = {"set": name, "role": f"ood-{kind}", "score": score, "n": 1500}
            self.metric("auroc", auroc - worse, 0.4 if kind == "near" else -0.6, **where)
            self.metric("fpr95", 2.4 * (1 - auroc) + worse, -0.5, **where)
            for model in self.labels:
                power = (1 - auroc + worse + 0.3 * self.harm(model)) / (auroc - worse)
                fpr = np.unique(np.round([*np.arange(0, 0.1, 0.005), *np.arange(0.1, 1.001, 0.02), 1.0], 3))
                self.results.add_curve({"fpr": fpr, "tpr": fpr**power}, **self.describe(model), metric="roc", **where)

    def noise(self, name: str, top1: float) -> None:
        where = {"set": name, "role": "corrupted", "corruption": "gaussian_noise", "n": 1000}
        for severity in range(6):
            self.metric("top1", top1 - 0.09 * severity, -1 + 0.35 * severity, severity=severity, **where)
            self.metric("ece", 0.035 + 0.03 * severity, -0.4, severity=severity, **where)
        self.metric("mean_top1", top1 - 0.27, 0.05, **where)
        self.metric("mean_ece", 0.125, -0.4, **where)

    def agreement(self, name: str) -> None:
        for model in list(self.labels)[1:]:
            where = {"set": name, "role": "id", "n": 2000, "reference": self.reference, **self.describe(model)}
            harm = 0.002 + self.harm(model)
            for name_, share in (("cosine_mean", 0.2), ("agreement", 1.5)):
                value, half = 1 - share * harm, 0.1 * share * harm
                self.results.add(metric=name_, value=value, low=value - half, high=value + half, **where)
            self.results.add(metric="cosine_min", value=1 - 2 * harm, **where)
            self.results.add(metric="flips_lost", value=round(1300 * harm), **where)
            self.results.add(metric="flips_won", value=round(900 * harm), **where)
            self.results.add(metric="mcnemar_p", value=0.4 if harm < 0.01 else 0.0002, **where)

    def more(self) -> None:
        """What is measured only where somebody asks for it."""
        test = {"set": "scenes-test", "role": "id", "n": 2000}
        for name, base, effect in (
            *(("aurc", 0.031, 0.5), ("eaurc", 0.024, 0.4), ("aurra", 0.97, -0.5), ("ece_adaptive", 0.036, -0.3)),
            *(("ece_max", 0.21, 0.4), ("ece_l2", 0.05, 0.2), ("ece_classwise", 0.011, 0.1), ("nll_ts", 0.31, 0.9)),
            *(("brier_rel", 0.004, 0.1), ("brier_res", 0.3, -0.4), ("overconfidence", 0.03, -0.2)),
            *(("human_nll", 0.52, 1.1), ("entropy_correlation", 0.41, -0.6), ("probe_top1", 0.93, -0.7)),
            *(("pair_ece", 0.02, 0.3), ("pair_nll", 0.09, 0.4), ("coverage_transferred", 0.81, -0.9)),
        ):
            self.metric(name, base, effect, **test)
        captions = {"set": "captioned", "role": "captions", "n": 1000, "axis": "k"}
        for k, base in ((1, 0.42), (5, 0.7), (10, 0.81)):
            self.metric("image_to_text_recall", base, -0.9, at=k, **captions)
            self.metric("text_to_image_recall", base - 0.1, -0.8, at=k, **captions)
        for model in self.labels:
            coverage = np.linspace(0.01, 1, 60)
            points = {"coverage": coverage, "risk": (0.12 + self.harm(model)) * coverage**1.8, "threshold": coverage}
            self.results.add_curve(points, **self.describe(model), metric="risk_coverage", **test)
        for group, effect in (("noise", 0.2), ("blur", -0.4), ("weather", -0.8), ("digital", -0.5)):
            where = {"set": "scenes-test", "role": "corrupted", "corruption": group, "n": 1000}
            self.metric("mean_top1", 0.6 + 0.05 * effect, effect, **where)
            self.metric("mean_ece", 0.11, -0.2, **where)
        for name, step in (("gaussian_blur", 0.08), ("fog", 0.05), ("contrast", 0.1), ("jpeg_compression", 0.04)):
            where = {"set": "scenes-test", "role": "corrupted", "corruption": name, "n": 1000}
            for severity in range(6):
                self.metric("top1", 0.88 - step * severity, -0.8, severity=severity, **where)
                self.metric("ece", 0.035 + 0.02 * severity, -0.2, severity=severity, **where)
            self.metric("mean_top1", 0.88 - 3 * step, -0.8, **where)
            self.metric("mean_ece", 0.1, -0.2, **where)
        spurious = {"set": "spurious-test", "role": "shift", "n": 1500}
        self.metric("rsg", 0.31, 0.4, **spurious)
        for score in ("mcm", "energy"):
            near = {"set": "near-ood", "role": "ood-near", "score": score, "n": 1500}
            for name in ("aupr_in", "aupr_out", "tpr_transferred", "fpr_transferred"):
                self.metric(name, 0.8, -0.2, **near)
            self.metric("auroc", 0.79, -0.3, axis="fitted_on", at=self.reference, **near)
        for model in list(self.labels)[1:]:
            self.pairs(model)
        wins = {"set": "near-ood", "role": "ood-near", "score": "mcm", "reference": self.reference}
        for name, value in (("wins", 3), ("wins_clear", 1), ("wins_p", 0.31)):
            self.results.add(metric=name, value=value, n=len(self.labels) - 1, **wins)
        self.results.add(metric="wins_expected", value=2.1, low=0, high=8, n=len(self.labels) - 1, **wins)
        recipe = {"axis": "recipe", "at": "w8a8", "recipe": "w8a8", "set": "scenes-test", "n": 7}
        for name, p in (("top1_wilcoxon_p", 0.03), ("top1_wilcoxon_holm_p", 0.12)):
            self.results.add(metric=name, value=p, **recipe)

    def pairs(self, model: str) -> None:
        harm = 0.002 + self.harm(model)
        common = {"reference": self.reference, "n": 1000, **self.describe(model)}
        for k in (1, 10):
            where = {"set": "scenes-test", "role": "id", "axis": "neighbours", "at": k}
            for name, share in (
                *(("index_recall", 2.5), ("index_recall_reverse", 2.6)),
                *(("text_recall", 1.9), ("text_recall_reverse", 2.0)),
            ):
                value = 1 - share * harm
                self.results.add(
                    metric=name, value=value, low=value - harm / 4, high=value + harm / 4, **where, **common
                )
        for far, name in ((-1.5, "blur"), (0, "gaussian_blur"), (0.5, "fog"), (2, "contrast")):
            where = {"set": "scenes-test", "role": "corrupted", "corruption": name}
            value = 1 + harm * far
            self.results.add(metric="error_ratio", value=value, low=value - harm, high=value + harm, **where, **common)
        for name in ("scenes-test", "style-shift"):
            where = {"set": name, "role": "id" if name == "scenes-test" else "shift"}
            self.results.add(metric="relative_drop", value=harm, low=0.0, high=2 * harm, **where, **common)
        for name, sign in (("far-ood", -1), ("near-ood", 1)):
            where = {"set": name, "role": f"ood-{name[:-4]}", "score": "mcm"}
            value = sign * harm
            self.results.add(
                metric="relative_drop_auroc", value=value, low=value - harm, high=value + harm, **where, **common
            )
        self.results.add(metric="delong_p", value=0.3 if harm < 0.02 else 0.0001, **where, **common)

    def about(self) -> None:
        for model, recipe in self.labels.items():
            size = {"": 10.4e6, "w8a8": 3.1e6, "w8a8-smoothquant": 3.1e6}.get(recipe, 1.9e6)
            self.results.add(**self.describe(model), metric="model_bytes", role="model", value=size)
            if not recipe:
                continue
            shares = {"real": 0.97, "float": 0.03}
            if recipe == "w4a4":
                shares = {"real": 0.06, "simulated": 0.91, "float": 0.03}
            for state, share in shares.items():
                where = {"role": "model", "axis": "state", "at": state}
                self.results.add(**self.describe(model), metric="coverage_macs", **where, value=share)
                self.results.add(**self.describe(model), metric="coverage_params", **where, value=share)
            for site in sites():
                state = "simulated" if recipe == "w4a4" else "real"
                self.results.add(
                    **self.describe(model) | {"bits": ALL[recipe][0]},
                    metric="site_macs",
                    set=site,
                    role="site",
                    axis="state",
                    at=state,
                    backend="cpu:avx512vnni",
                    value=192 * 192 * 64,
                    n=192 * 192,
                )

    def spectra(self) -> None:
        ranks = sorted({int(k) for k in np.round(np.geomspace(1, 192, 24)) - 1})
        for site in sites():
            for model in self.labels:
                points = {"rank": ranks, "value": [6 * (k + 1) ** -0.7 + 3 * self.harm(model) for k in ranks]}
                self.results.add_curve(points, model=model, metric="singular_values", set=site, role="site")
                if model != self.reference:
                    for band in BANDS:
                        self.gain(model, site, band)
        for tower in ("vision", "text"):
            where = {"set": tower, "role": "tower"}
            for model in self.labels:
                self.results.add(model=model, metric="effective_rank", **where, value=90 + 40 * self.harm(model))
                self.results.add(model=model, metric="stable_rank", **where, value=11.0)
                for band, share in zip(BANDS, (0.5, 0.4, 0.1), strict=True):
                    self.results.add(model=model, metric="band_energy", **where, **in_band(band), value=share)
                if model != self.reference:
                    for band in BANDS:
                        self.gain(model, tower, band)

    def gain(self, model: str, where: str, band: str) -> None:
        harm = 0.004 + self.harm(model)
        value, half = 1 - 0.02 * harm * self.draw.normal(1, 0.2), 0.02 * harm
        ends = {"low": value - half, "high": value + half} if "." not in where else {}
        role = "site" if "." in where else "tower"
        common = {"model": model, "set": where, "role": role, "n": 8} | in_band(band)
        self.results.add(metric="gain", value=value, **ends, **common)
        self.results.add(metric="gain_white", value=1, low=1 - half, high=1 + half, **common)
        loss = 10 * list(BANDS).index(band) + 100 * harm
        self.results.add(metric="sqnr", value=40 - loss, **common)
        self.results.add(metric="sqnr_white", value=40.4 - loss, low=40 - loss, high=41 - loss, **common)
        if ends and band == "ranks 0-8":
            for claim, number in (("level", value), ("shape", 0.0)):
                spread = {"value": number, "low": number - half, "high": number + half}
                self.results.add(metric=claim, model=model, set=where, role="tower", n=8, **spread)
                spread = {"value": number - (claim == "level"), "low": -half, "high": half}
                self.results.add(metric=claim, model=model, set=where, role="tower", n=8, reference="white", **spread)
        if ends:
            self.results.add(
                metric="gain", reference="white", value=value - 1, low=value - 1 - half, high=value - 1 + half, **common
            )


def in_band(name: str) -> dict:
    return {"subset": name, "axis": "band", "at": BANDS[name]}


def sites() -> list[str]:
    return [f"vision.blocks.{k}.{site}" for k in range(3) for site in ("attn.q", "attn.out", "mlp.fc1", "mlp.fc2")]


def made_up(cohorts: tuple[str, ...] = ("scenes-clean", "scenes-noisy")) -> Results:
    """One cohort of models for each name, all recipes of `RECIPES`."""
    versions = {"python": "3.12.3", "torch": "2.14.1", "qclip": "0.1.0"}
    meta = {
        "versions": versions,
        "cpu": "An ordinary CPU",
        "threads": 2,
        "seed": 0,
        "replicates": 1000,
        "command": "qclip demo",
    }
    results = Results(meta=meta, notes=["temperatures were fitted on scenes-dev (1000 images), one for each model"])
    for k, cohort in enumerate(cohorts):
        prefix = f"{cohort} " if len(cohorts) > 1 else ""
        labels = {f"{prefix}float": "", **{f"{prefix}{recipe}": recipe for recipe in RECIPES}}
        Maker(results, f"{prefix}float", labels, cohort, seed=k).all()
    return results


def twenty() -> Results:
    """One reference and nineteen variants, of which everything was measured."""
    results = made_up(cohorts=())
    labels = {"float": "", **{recipe: recipe for recipe in ALL}}
    maker = Maker(results, "float", labels, "local-dir:photos", seed=0)
    maker.all()
    maker.more()
    for tower in ("vision", "text"):
        made_up_spectra.claims(maker, {"set": tower, "role": "tower", "n": 8})
    made_up_spectra.features(maker)
    made_up_spectra.interventions(maker)
    for place, site in enumerate(("vision.blocks.0.mlp.fc1", "vision.projection", "text.projection")):
        for bits in (2, 4, 8):
            where = {"role": "site", "set": site, "subset": site, "axis": "bits", "at": bits}
            results.add(metric="sensitivity", model="float", value=10.0 ** -(place + bits / 2), **where)
    return results


@pytest.fixture
def make_twenty() -> Callable[[], Results]:
    return twenty


@pytest.fixture
def make_results() -> Callable[..., Results]:
    return made_up
