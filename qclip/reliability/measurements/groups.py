"""Subsets and groups of labelled sets, the worst group, and the gap between groups."""

from __future__ import annotations

import numpy as np

from qclip.metrics import rsg, vuln_add
from qclip.metrics.resampled import evaluate_on, mean_of

from ..embedded import Embeddings
from ..request import Condition, EvalSet, Request
from ..writer import Page, Part, Writer

SMALL = 10  # a group of fewer images is flagged
MOST = 64
UNNAMED = "(no name)"
COMMON_COUNTER = (("common", "counter"), ("aligned", "conflict"))  # names of groups: CounterAnimal's, those of scenes
Accuracy = dict[str, np.ndarray]  # model -> top-1 on each resample


class Groups:
    name, label = "groups", "Subsets and groups"

    def wants(self, request: Request) -> list[Condition]:
        """A `group` column makes groups, every bool column a subset of its true rows."""
        return [
            Condition(each)
            for each in request.of("id", "shift")
            if any(name == "group" or values.dtype == bool for name, values in each.data.groups.items())
        ]

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        for condition in self.wants(request):
            kept = embedded.indices(condition)
            of = condition.set
            columns = {_own(name): values[kept] for name, values in of.data.groups.items()}
            if "group" in columns:
                columns["group"] = np.array([str(name) or UNNAMED for name in columns["group"]])
            groups = _names(of, columns, out)
            if (
                gone := sorted(
                    {str(name) or UNNAMED for name in np.unique(of.data.groups.get("group", []))} - set(groups)
                )
                if groups
                else []
            ):
                out.note(f"{of.name}: groups without an image that can be read: {', '.join(map(str, gone))}")
            parts = {Part(subset=k): v for k, v in columns.items() if v.dtype == bool and v.any()}
            parts |= {Part(group=name): columns["group"] == name for name in groups}
            if none := [k for k, v in columns.items() if v.dtype == bool and not v.any()]:
                out.note(f"{of.name}: no image belongs to {', '.join(none)}, so that nothing is said of it")
            if not parts:
                continue
            page = out.page(of.name, of.role, len(kept), of.data.digest)
            outputs = embedded.outputs(condition)
            drawn = page.draw(outputs, parts)
            for part, mask in parts.items():
                page.labelled(drawn, part, n=int(mask.sum()))
            if len(groups) > 1:
                top1 = {
                    name: {model: drawn[model][Part(group=name), "top1"] for model in page.models} for name in groups
                }
                means = evaluate_on([mean_of(outputs[model].right) for model in page.models], page.counts())
                _worst(page, top1, dict(zip(page.models, means, strict=True)))
                _spurious(page, top1)


def _own(name: str) -> str:
    """The name of a subset that is not that of the whole set."""
    return {"": UNNAMED, "all": "all (a column)"}.get(name, name)


def _spurious(page: Page, top1: dict[str, Accuracy]) -> None:
    """The relative spurious gap, where groups are called what makes them common and counter images."""
    for common, counter in COMMON_COUNTER:
        if common not in top1 or counter not in top1:
            continue
        reference, *others = page.models
        page.estimates("rsg", {model: rsg(top1[common][model], top1[counter][model]) for model in page.models})
        for model in others:
            four = (top1[name][each] for each in (reference, model) for name in (common, counter))
            page.estimate(model, "vuln_add", vuln_add(*four), reference=reference)


def _names(of: EvalSet, columns: dict[str, np.ndarray], out: Writer) -> list[str]:
    if "group" not in columns:
        return []
    names, counts = np.unique(columns["group"], return_counts=True)
    if len(names) > MOST:
        out.note(f"{of.name}: {len(names)} groups are too many for a table, only up to {MOST} are shown")
        return []
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < SMALL]
    if small:
        out.note(f"{of.name}: groups of fewer than {SMALL} images: {', '.join(small)}")
    return [str(name) for name in names]


def _worst(page: Page, top1: dict[str, Accuracy], mean: Accuracy) -> None:
    """Each model's worst and best group are fixed by the sample: the worst group of a replicate is biased low. mean:
    top-1 of all images."""
    worst, gap, behind, names = {}, {}, {}, {}
    for model in page.models:
        ranked = sorted(top1, key=lambda name: float(top1[name][model][0]))
        worst[model] = top1[ranked[0]][model]
        gap[model] = top1[ranked[-1]][model] - worst[model]
        behind[model] = mean[model] - worst[model]
        names[model] = ranked[0]
    page.estimates("worst_group_top1", worst)
    page.estimates("group_gap", gap)
    page.estimates("mean_worst_gap", behind)
    shown = ", ".join(f"{model}: {name}" for model, name in names.items())
    page.writer.note(f"{page.set}: worst group of {shown}; its interval holds the group fixed")
