"""Measures two models and holds the differences to requirements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from qclip import data as qdata
from qclip import models, reliability, rewrite
from qclip.errors import InputError, option
from qclip.metrics.record import OWN
from qclip.progress import Progress
from qclip.reliability import evaluate
from qclip.reliability.scores import SCORES
from qclip.results import Results

from .requirement import DETECTION, FITTED, NEIGHBOURS, Requirement, requirements

MODEL, REFERENCE = "quantized", "reference"
BATCH = 32  # images at once: two models are held, and 64 would cost ViT-B/32 a quarter of its weights more
SCORE = "mcm"  # of detection metrics, where no score is named


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One requirement on one set. value, low, high: in the metric's own unit; None where it is undefined."""

    requirement: Requirement
    where: str
    value: float | None
    low: float | None
    high: float | None
    passed: bool
    reason: str = ""  # why it failed, where the value alone does not say


@dataclasses.dataclass(frozen=True)
class Verdict:
    outcomes: list[Outcome]
    results: Results

    @property
    def passed(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)


def verify(
    model: nn.Module,
    against: nn.Module,
    require: str | Sequence[Requirement],
    data: Any,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Verdict:
    """Whether `model`, quantized, meets requirements on `data` in place of `against`, which it was made from.

    require: "top1>=-0.5, ece<=+1, index_recall@10>=0.98" (`requirement.py` says how it is read). Each is held to the
    bad end of the 95 % interval, on every set where it was measured.
    data: sets, by name, as `ImageSet` or `datasets.Dataset`. Those without labels or class names count for what needs
    none: cosines and the recall of neighbours. settings: more of `evaluate`'s (ood, shift, dev, train, corruptions,
    texts, cache ...); OOD scores are MCM and those that a requirement names.
    Raises InputError for a requirement that nothing given here can measure, and for a model that was not made from
    `against`.
    """
    check_source(model, against)
    return measure(model, against, require, data, progress=progress, **settings)


def measure(
    model: nn.Module,
    against: nn.Module,
    require: str | Sequence[Requirement],
    data: Any,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Verdict:
    """What `verify` does, for any two models whose embeddings can be compared."""
    wanted = requirements(require) if isinstance(require, str) else list(require)
    sets = [qdata.as_set(d, progress) for d in ([data] if qdata.is_set(data) else data)]
    settings = _completed(wanted, sets, settings)
    pair = {REFERENCE: against, MODEL: model}
    results = evaluate(pair, progress=progress, **settings)
    return Verdict(judge(results, wanted), results)


def check(require: Sequence[Requirement], sets: list[qdata.ImageSet], **settings: Any) -> None:
    """What `measure` would refuse of these requirements and sets whatever the models are: before any is loaded."""
    reliability.check(**_completed(require, sets, settings))


def _completed(wanted: Sequence[Requirement], sets: list[qdata.ImageSet], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `evaluate`. Raises InputError for what the given sets cannot answer."""
    labelled = [each for each in sets if each.labels is not None and each.classes]
    _measurable(wanted, sets, labelled, settings)
    defaults = {
        "neighbours": [each.at for each in wanted if each.at is not None] or [10],
        "scores": _scores(wanted),
        "corruptions": (),
        "batch": BATCH,
    }
    return {
        **defaults,
        **{name: value for name, value in settings.items() if value is not None},
        "data": labelled,
        "images": [each for each in sets if each.labels is None or not each.classes],
    }


# By the module of a metric: the measurements that can write it. Of other metrics any may.
_WRITERS = {
    "accuracy": ("clean", "groups", "corrupted"),
    "calibration": ("clean", "groups", "corrupted"),
    "detection": ("ood",),
    "precision": ("ood",),
    "neighbours": ("neighbours",),
    "agreement": ("agreement",),
}


def measurements(wanted: Requirement) -> list[str] | None:
    """Names of the measurements that a requirement needs: what a trial of it has to measure. None: all."""
    found = next((module for module, names in OWN.items() if wanted.metric in names), "")
    return list(_WRITERS[found]) if found in _WRITERS else None


def judge(
    results: Results, wanted: Sequence[Requirement], model: str = MODEL, reference: str = REFERENCE
) -> list[Outcome]:
    """Every requirement on every row that it is about. Raises InputError where there is none."""
    return [outcome for each in wanted for outcome in _outcomes(results, each, model, reference)]


def _outcomes(results: Results, wanted: Requirement, model: str, reference: str) -> list[Outcome]:
    rows = [row for row in results if row["model"] == model and row["metric"] == wanted.metric]
    compared = wanted.difference or any(row["reference"] for row in rows) and not any(not r["reference"] for r in rows)
    rows = [row for row in rows if row["reference"] == (reference if compared else "")]
    if wanted.at is not None:
        rows = [row for row in rows if row["at"] == wanted.at]
    if wanted.only:
        rows = [row for row in rows if wanted.only in _names(row)]
    else:
        plain = [row for row in rows if not row["corruption"] and row["subset"] == "all" and row["axis"] != "group"]
        rows = plain or rows
        scores = {row["score"] for row in rows} - {""}
        if scores:
            judged = SCORE if SCORE in scores else sorted(scores)[0]
            rows = [row for row in rows if row["score"] in ("", judged)]
    if not rows:
        beside = f" of {wanted.only!r}" if wanted.only else ""
        raise InputError(f"requirement {wanted.text!r}: {wanted.metric}{beside} was not measured on what was given")
    return [_outcome(wanted, row) for row in rows]


def _names(row: dict[str, Any]) -> set[str]:
    return {str(row[column]) for column in ("set", "score", "corruption", "subset", "at", "role")}


def _outcome(wanted: Requirement, row: dict[str, Any]) -> Outcome:
    parts = [row["set"], row["score"], row["corruption"], row["subset"] if row["subset"] != "all" else ""]
    if row["corruption"] and row["severity"]:
        parts.append(f"severity {row['severity']}")
    if row["axis"] == "group":
        parts.append(f"group {row['at']}")
    where = ", ".join(part for part in parts if part)
    value, low, high = row["value"], row["low"], row["high"]
    if value is None:
        return Outcome(wanted, where, None, None, None, False, "it is undefined there")
    passed = wanted.holds(value, low, high)
    open_ = not passed and wanted.holds(value, None, None)
    return Outcome(wanted, where, value, low, high, passed, "its interval reaches past the bound" if open_ else "")


def check_source(model: nn.Module, against: nn.Module) -> None:
    """Raises InputError unless `model` was quantized from the weights of `against`, or both from the same."""
    done = rewrite.quantization(model)
    if done is None:
        raise InputError("the model to verify is not quantized; give an artifact, made by `qclip quantize`")
    made_from = done.provenance.get("source_sha256")
    other = rewrite.quantization(against)
    if other is not None and other.plans:
        found = other.provenance.get("source_sha256")
    else:
        with models.explicit_form(against):
            found = rewrite.weight_hash(against)
    if made_from is None or made_from != found:
        raise InputError(
            f"the artifact was made from {done.source!r} with other weights than those it is compared with; name the "
            "model that it was quantized from"
        )


def _scores(wanted: Sequence[Requirement]) -> list[str]:
    """The OOD scores that requirements may be about: others would cost time for nothing."""
    return list(dict.fromkeys([SCORE, *(each.only for each in wanted if each.only in SCORES.names())]))


def _measurable(
    wanted: Sequence[Requirement], sets: list[qdata.ImageSet], labelled: list[qdata.ImageSet], settings: dict[str, Any]
) -> None:
    """Raises InputError, before any image is embedded, for what the given sets cannot answer."""
    if not sets:
        raise InputError(f"no images to verify on; name a set ({option('data')})")
    for each in wanted:
        if each.metric in NEIGHBOURS:
            needed = each.at if each.metric.startswith("text") else (each.at or 0) + 1
            for found in sets:
                if len(found) < (needed or 0):
                    raise InputError(
                        f"requirement {each.text!r} needs {needed} images or more, {found.spec} has {len(found)}"
                    )
        elif not labelled and each.metric not in ("cosine_mean", "cosine_min"):
            raise InputError(
                f"requirement {each.text!r} needs labelled images, and {sets[0].spec} has "
                f"{'no labels' if sets[0].labels is None else 'no class names (--classes FILE)'}"
            )
        if each.metric in DETECTION and not settings.get("ood"):
            raise InputError(f"requirement {each.text!r} needs images of other classes; name a set ({option('ood')})")
        if each.metric in FITTED and settings.get("dev") is None:
            raise InputError(
                f"requirement {each.text!r} needs images to fit temperatures on; name a set ({option('dev')})"
            )
        if each.metric.startswith("text") and not labelled and not settings.get("texts"):
            if any(found.captions is None for found in sets):
                raise InputError(f"requirement {each.text!r} needs texts to search by; give some ({option('texts')})")
