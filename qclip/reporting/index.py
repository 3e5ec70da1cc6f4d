"""A results table read once: which models were compared with which, what each set is for, and rows by their key."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from qclip.results import KEY, Curve, Results, Row
from qclip.spectral import CONTROLS

from .svg import finite

JUDGED = "mcm"
KINDS = {"ood-near": "near", "ood-far": "far"}


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of a set: all, a named subset, or a group."""

    subset: str = "all"
    group: str | float | None = None

    @property
    def key(self) -> dict[str, Any]:
        """The columns of a row that name this part."""
        return {"subset": self.subset} | ({} if self.group is None else {"axis": "group", "at": self.group})

    @property
    def name(self) -> str:
        named = [] if self.subset == "all" else [self.subset]
        return ", ".join(named + ([] if self.group is None else [str(self.group)]))


WHOLE = Part()


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Models compared with one reference. `reference` is "" for models that were compared with nothing."""

    reference: str
    variants: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return ((self.reference,) if self.reference else ()) + self.variants

    @property
    def label(self) -> str:
        """The cohort's own name: that of its reference, without the word "float" behind it."""
        return self.reference.removesuffix(" float")

    def short(self, model: str) -> str:
        """The model's label without the cohort's before it: "w8a8" for "scenes-clean w8a8"."""
        return model.removeprefix(f"{self.label} ") or model

    def chunks(self, size: int) -> list[Cohort]:
        """The same cohort in even portions of at most `size` variants, each with the reference."""
        parts = -(-len(self.variants) // size)
        if parts <= 1:
            return [self]
        ends = [round(k * len(self.variants) / parts) for k in range(parts + 1)]
        return [Cohort(self.reference, self.variants[a:b]) for a, b in itertools.pairwise(ends)]


class Index:
    """Rows of a `Results` by key, in constant time."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.meta = results.meta
        self._rows: dict[tuple[Any, ...], Row] = {}
        self.repeated = 0
        for row in results.rows:
            key = tuple(row[column] for column in KEY)
            self.repeated += key in self._rows
            self._rows[key] = row

    def row(
        self,
        model: str,
        metric: str,
        set: str = "",
        subset: str = "all",
        axis: str = "",
        at: float | str | None = None,
        corruption: str = "",
        severity: int = 0,
        score: str = "",
        reference: str = "",
    ) -> Row | None:
        """The row of this key (`KEY`); what is not named is the whole set, clean, absolute."""
        return self._rows.get((model, metric, set, subset, axis, at, corruption, severity, score, reference))

    def value(self, model: str, metric: str, **key: Any) -> float | None:
        """The value where it is there and finite: what can be drawn and reckoned with."""
        row = self.row(model, metric, **key)
        return row["value"] if row is not None and finite(row["value"]) else None

    @functools.cached_property
    def by_metric(self) -> dict[str, list[Row]]:
        """Rows of each metric, in the order of the table."""
        out: dict[str, list[Row]] = {}
        for row in self._rows.values():
            out.setdefault(row["metric"], []).append(row)
        return out

    def rows(self, *metrics: str) -> list[Row]:
        return [row for name in metrics for row in self.by_metric.get(name, [])]

    def curves(self, name: str) -> list[Curve]:
        return [curve for curve in self.results.curves if curve["metric"] == name]

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """What each set is for: the role of its clean rows."""
        return {row["set"]: row["role"] for row in self._rows.values() if row["set"] and not row["corruption"]}

    @functools.cached_property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row["model"] for row in self._rows.values() if row["model"]))

    @functools.cached_property
    def cohorts(self) -> list[Cohort]:
        """One for each reference, in order of appearance, then one for the models that were compared with nothing."""
        found: dict[str, dict[str, None]] = {}
        for row in self._rows.values():
            control = row["role"] in ("site", "tower") or row["reference"] in CONTROLS
            if row["model"] and not control and row["reference"] not in ("", row["model"]):
                found.setdefault(row["reference"], {})[row["model"]] = None
        cohorts = [Cohort(reference, tuple(variants)) for reference, variants in found.items()]
        placed = {model for cohort in cohorts for model in cohort.models}
        alone = tuple(model for model in self.models if model not in placed)
        return cohorts + ([Cohort("", alone)] if alone else [])

    @functools.cached_property
    def labelled_sets(self) -> list[str]:
        return list(dict.fromkeys(row["set"] for row in self.rows("top1") if row["set"]))

    @functools.cached_property
    def corrupted(self) -> list[tuple[str, str]]:
        """(set, corruption) pairs."""
        rows = self.rows("top1", "mean_top1")
        return list(dict.fromkeys((row["set"], row["corruption"]) for row in rows if row["corruption"]))

    @functools.cached_property
    def spurious_sets(self) -> list[str]:
        return list(dict.fromkeys(row["set"] for row in self.rows("worst_group_top1", "group_gap")))

    @functools.cached_property
    def id_sets(self) -> list[str]:
        """The first labelled set where no role is told."""
        found = [name for name in self.labelled_sets if self.roles.get(name) == "id"]
        return found or self.labelled_sets[:1]

    @functools.cached_property
    def shift_sets(self) -> list[str]:
        return [s for s in self.labelled_sets if s not in self.id_sets and s not in self.spurious_sets]

    @functools.cached_property
    def ood_sets(self) -> list[tuple[str, str]]:
        """(set, "near" | "far" | "") pairs; near ones first. The mean over sets is not among them."""
        found = {row["set"]: KINDS.get(row["role"], "") for row in self.rows("auroc") if row["role"] != "ood-mean"}
        order = {"near": 0, "far": 1}
        return sorted(found.items(), key=lambda pair: order.get(pair[1], 2))

    @functools.cached_property
    def ood_means(self) -> list[str]:
        """The name under which the mean over OOD sets stands."""
        return list(dict.fromkeys(row["set"] for row in self.rows("auroc") if row["role"] == "ood-mean"))

    @functools.cached_property
    def ood_scores(self) -> list[str]:
        return list(dict.fromkeys(row["score"] for row in self.rows("auroc")))

    @functools.cached_property
    def judged_score(self) -> str:
        """The OOD score that verdicts are about, named beforehand; the others stand in the tables."""
        return JUDGED if JUDGED in self.ood_scores else next(iter(self.ood_scores), "")

    def parts(self, name: str) -> list[Part]:
        """Subsets and groups of a labelled set."""
        found = dict.fromkeys(
            Part(row["subset"], row["at"] if row["axis"] == "group" else None)
            for row in self.rows("top1")
            if row["set"] == name and not row["corruption"]
        )
        return [part for part in found if part != WHOLE]

    def severities(self, name: str, corruption: str) -> list[int]:
        return sorted(
            {row["severity"] for row in self.rows("top1") if row["set"] == name and row["corruption"] == corruption}
        )

    def n(self, name: str, corruption: str = "", part: Part | None = None) -> int | None:
        """Images behind the rows of a set."""
        return self._sizes.get((name, corruption, part or WHOLE))

    @functools.cached_property
    def _sizes(self) -> dict[tuple[str, str, Part], int]:
        return {
            (r["set"], r["corruption"], Part(r["subset"], r["at"])): r["n"]
            for r in self.rows("mean_top1", "top1", "auroc")
            if r["n"]
        }

    @functools.cached_property
    def described(self) -> dict[str, dict[str, str]]:
        """source, recipe, method, bits and recipe_hash of each model, from its rows."""
        out: dict[str, dict[str, str]] = {model: {} for model in self.models}
        for row in self._rows.values():
            if row["model"] and row["metric"] != "site_macs":  # whose bits are the site's
                known = out[row["model"]]
                for column in ("source", "recipe", "method", "bits", "recipe_hash"):
                    if row[column]:
                        known.setdefault(column, row[column])
        return out

    def simulated(self, model: str) -> bool:
        """Whether some of the model's arithmetic is only simulated: then its time says nothing."""
        return bool(self.value(model, "coverage_macs", axis="state", at="simulated"))
