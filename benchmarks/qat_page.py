"""docs/qat.md, from results: what training recovers, what its gains are due to, what each term of an objective does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qclip import Results, recipes
from qclip.controls import CONTROLS
from qclip.reporting.controlled import SAID, Controlled, Difference
from qclip.reporting.index import Index
from qclip.reporting.verdicts import Question, Verdict

from .findings_page import table

Row = Mapping[str, Any]
HEAD = """# Quantization-aware training, measured
What `qclip train` recovers, and what its gains are due to, on the shipped checkpoints. Written by `python -m
benchmarks.qat write` from `benchmarks/results/qat/`; `python -m benchmarks.qat measure --data DIR` compares
again ({hosts}). These are small models of ours, trained for few steps. Settings and objectives were chosen on dev
splits and captions that are held out, never on the sets of these tables; where a table is of a dev split it says so.
The comparisons of `w4a8-reliable` are second ones: first ones, by a tighter objective with fewer pairs and steps, had
been better than float in two of the four on the same tests, which is why others were looked for.
"""
METRICS = {
    "top1": (100, 1, "top-1, %"),
    "error": (1e3, 3, "error x 1000"),
    "ece": (100, 2, "ECE, %"),
    "nll": (1, 4, "NLL"),
}
#: Of the ablation: the four that a recipe is judged by, and what must not fall; the file has more.
SHOWN = {
    "top1": (100, 2, "top-1, %"),
    "ece_ts": (100, 2, "ECE, temperature fitted, %"),
    "nll": (1, 4, "NLL"),
    "auroc mean mcm": (100, 2, "AUROC (MCM), %"),
    "mean_top1": (100, 2, "top-1 under noise, %"),
}
#: What was wanted of recipes that aim at reliability: better in three of these four, and no worse in top-1.
FOUR = ("ece_ts", "nll", "auroc", "mean_top1")
LOSS = 0.003  # of top-1


def page(studies: Mapping[str, Results], rows: Mapping[str, Any]) -> str:
    hosts = ", ".join(dict.fromkeys(str(r.meta.get("cpu", "unknown processor")) for r in studies.values()))
    parts = [HEAD.format(hosts=hosts or "no comparison is there yet")]
    told = [each for each in studies.items() if Controlled(Index(each[1]))]
    parts += ["## What is reached\n" + "\n".join(_targets(dict(told), rows)) + "\n"]
    parts += _accuracy(rows.get("accuracy", {}))
    parts += ["## Recipes beside their controls\n" + ABOUT] if told else []
    for name, results in told:
        parts += _study(name, results)
    parts += _ablation(rows.get("ablation", {}))
    parts += _cost(rows.get("cost", []))
    return "\n".join(parts)


ABOUT = (
    "Each arm was trained with the same pairs in the same order, for the same steps; differences are means over seeds, "
    "in percentage points for shares, with 95 % intervals that hold images and seeds (`qclip/reliability/runs.py`; of "
    "one seed images alone), "
    "**bold** where they exclude 0; *p* is Holm's, over one table. The temperature of every arm is refitted on the dev "
    "split for *ECE, temperature fitted* and *NLL, temperature fitted*.\n\n"
    + "\n".join(f"- `{name}`: {about}." for name, about in CONTROLS.items())
    + "\n"
)


# -- what training recovers --------------------------------------------------------------------------------------------


class Values:
    """Rows {model, recipe, seed, split, metric, value} of one model and split, by recipe and metric."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.found: dict[tuple[str, str], list[float]] = {}
        self.steps: dict[str, Any] = {}
        for row in rows:
            self.found.setdefault((row["recipe"], row["metric"]), []).append(float(row["value"]))
            self.steps[row["recipe"]] = row.get("steps")

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(recipe for recipe, _ in self.found))

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for _, metric in self.found))

    def mean(self, recipe: str, metric: str) -> float | None:
        values = self.found.get((recipe, metric))
        return None if not values else sum(values) / len(values)

    def recovered(self, recipe: str, metric: str, start: str) -> float | None:
        """Share of what `start` loses to float that the recipe has not lost."""
        now, before = self.mean(recipe, metric), self.mean(start, metric)
        whole = 0.0 if metric == "error" else self.mean("float", metric)
        if now is None or before is None or whole is None or before == whole:
            return None
        return (now - before) / (whole - before)


def kind(recipe: str) -> str:
    """ "float", "rtn", "ptq" or "trained"."""
    if recipe == "float":
        return "float"
    found = recipes.get(recipe)
    return "trained" if found.trained is not None else "ptq" if found.steps else "rtn"


def grouped(rows: Sequence[Row], *columns: str) -> dict[tuple, list[Row]]:
    out: dict[tuple, list[Row]] = {}
    for row in rows:
        out.setdefault(tuple(row.get(column, "") for column in columns), []).append(row)
    return out


def _accuracy(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    parts = [
        "## What training recovers of low widths\nMeans over seeds, with the extremes in brackets. *error*: 1 - mean "
        "cosine of image embeddings to float's. *of rtn*, *of PTQ*: the share recovered of what rounding to nearest "
        "loses, and of what the best post-training method there still loses.\n"
    ]
    for (model, bits, split), rows in _by_bits(found["rows"]).items():
        values = Values(rows)
        names = [name for name in values.recipes if name != "float"]
        start, best = _starts(values)
        body = [["float", *(_number(values, "float", metric) for metric in values.metrics), *[""] * 5]]
        for name in names:
            of = [(metric, from_) for metric in ("top1", "error") for from_ in (start, best)]
            shares = [_share(values.recovered(name, m, s)) if s and kind(name) == "trained" else "" for m, s in of]
            steps = values.steps.get(name)
            body.append([f"`{name}`", *(_number(values, name, m) for m in values.metrics), *shares, str(steps or "")])
        head = ["recipe", *(METRICS.get(m, (1, 3, m))[2] for m in values.metrics)]
        head += ["top-1 of rtn", "top-1 of PTQ", "error of rtn", "error of PTQ", "steps"]
        parts.append(f"### `{model}`, {bits}, {split}\n" + "\n".join(table(head, body)))
    return parts


def _by_bits(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """By model, widths and split; float is in all of a model's."""
    out: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["recipe"] != "float":
            key = row["model"], recipes.get(row["recipe"]).default.name.upper(), row["split"]
            out.setdefault(key, []).append(row)
    for (model, _, split), members in out.items():
        members[:0] = [r for r in rows if r["recipe"] == "float" and (r["model"], r["split"]) == (model, split)]
    return out


def _starts(values: Values) -> tuple[str, str]:
    """Rounding to nearest, and the post-training method of the least error; "" where there is none."""
    metric = "error" if "error" in values.metrics else values.metrics[0]
    sign = 1 if metric == "error" else -1
    rtn = next((name for name in values.recipes if kind(name) == "rtn"), "")
    methods = [name for name in values.recipes if kind(name) == "ptq" and values.mean(name, metric) is not None]
    return rtn, min(methods, key=lambda name: sign * (values.mean(name, metric) or 0), default="")


def _number(values: Values, recipe: str, metric: str) -> str:
    factor, digits, _ = METRICS.get(metric, (1, 3, metric))
    found = values.found.get((recipe, metric))
    if not found:
        return ""
    text = f"{factor * sum(found) / len(found):.{digits}f}"
    if len(found) > 1:
        text += f" ({factor * min(found):.{digits}f}-{factor * max(found):.{digits}f})"
    return text


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


# -- studies -----------------------------------------------------------------------------------------------------------


def _study(name: str, results: Results) -> list[str]:
    study = Controlled(Index(results))
    model = results.meta.get("model", name)
    against = [study.reference, *study.controls]
    body = [
        [f"{q.name}, {q.place}", *(_cell(study.difference(q, study.recipe, other)) for other in against)]
        for q in study.questions
    ]
    lines = [f"{note}.\n" for note in results.notes if re.match(r"\d+ arms", note)]
    lines += [f"- {said}." for question in study.questions if (said := study.sentence(question))]
    lines += _other_scores(results, study.recipe, study.reference)
    head = ["metric", *(f"to {other}" for other in against)]
    return [
        f"### `{study.recipe}` of `{model}`\n" + "\n".join(lines) + "\n",
        *table(head, body),
    ]


def _other_scores(results: Results, recipe: str, reference: str) -> list[str]:
    """Detection by scores that the comparison does not judge by: a term that rewards one may cost another."""
    found = results.where(metric="auroc", role=("ood-mean", "ood"), model=recipe, reference=reference, subset="all")
    lines = []
    for row in found:
        if row["score"] != "mcm" and row["value"] is not None and row["low"] is not None:
            value, low, high = (f"{100 * row[name]:+.2f}".replace("-", "−") for name in ("value", "low", "high"))
            what = f"AUROC by {row['score']}, mean of OOD sets, by which no recipe is judged"
            lines.append(f"- {what}: {value} points [{low}, {high}].")
    return lines


def _cell(found: Difference | None) -> str:
    if found is None:
        return ""
    text = f"{found.compared.difference} {found.compared.interval}"
    clear = found.verdict in (Verdict.BETTER, Verdict.WORSE)
    return (f"**{text}**" if clear else text) + ("" if found.p is None else f" p {found.p:.3f}")


# -- the ablation, and the cost ----------------------------------------------------------------------------------------


def _ablation(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    parts = [
        "## What each term of the objective does\nMeans over seeds on a dev split or held-out captions, from which the "
        "objective of the recipes was chosen; of differences to float, of one seed, 95 % intervals, **bold** where "
        "they exclude 0. An arm's note says where it differs in more than its objective. The file has more metrics.\n"
    ]
    for (model, recipe, split), rows in grouped(found["rows"], "model", "recipe", "split").items():
        metrics = [metric for metric in SHOWN if any(row["metric"] == metric for row in rows)]
        body = []
        signed = "difference" in split
        for (arm, objective), mine in grouped(rows, "arm", "objective").items():
            cells = [_mean([row for row in mine if row["metric"] == each], signed, *SHOWN[each]) for each in metrics]
            notes = list(dict.fromkeys(row["note"] for row in mine if row.get("note")))
            body.append([arm, f"`{objective}`", *cells, "; ".join(notes)])
        steps = "/".join(dict.fromkeys(str(row.get("steps", "")) for row in rows))
        head = ["arm", "objective", *(SHOWN[metric][2] for metric in metrics), "note"]
        title = f"### `{model}`, `{recipe}`, {split}" + (f", {steps} steps" if steps else "")
        parts.append(f"{title}\n" + "\n".join(table(head, body)))
    return parts


def _mean(rows: Sequence[Row], signed: bool, factor: float, digits: int, _: str) -> str:
    """A mean over seeds with the extremes; of one seed's difference the interval where there is one."""
    found = [row for row in rows if row["value"] is not None]
    if not found:
        return ""
    values, form = [factor * float(row["value"]) for row in found], ("+" if signed else "") + f".{digits}f"
    text = f"{sum(values) / len(values):{form}}"
    if len(found) > 1:
        return f"{text} ({min(values):{form}} to {max(values):{form}})"
    low, high = found[0].get("low"), found[0].get("high")
    if not signed or low is None or high is None:
        return text
    text = f"{text} [{factor * low:{form}}, {factor * high:{form}}]"
    return text if low <= 0 <= high else f"**{text}**"


COST = {
    "batch": "batch",
    "float_step_s": "float step, s",
    "rounded_step_s": "rounded step, s",
    "step_ratio": "times as long",
    "float_peak_mb": "float, MB",
    "rounded_peak_mb": "rounded, MB",
    "memory_ratio": "times the memory",
    "memory_ratio_of_steps": "times that of the steps",
}


def _cost(found: Sequence[Row]) -> list[str]:
    if not found:
        return []
    body = [[f"`{row['model']}`", f"`{row['recipe']}`", *(str(row[key]) for key in COST)] for row in found]
    about = "A step with rounding beside the same step without (`python -m benchmarks.qat_cost`)"
    about += "; memory is the most that a process of two steps held, and the last column without what it held before.\n"
    return [f"## What training costs\n{about}" + "\n".join(table(["model", "recipe", *COST.values()], body))]


# -- targets -----------------------------------------------------------------------------------------------------------


def _targets(studies: Mapping[str, Results], rows: Mapping[str, Any]) -> list[str]:
    lines = _recovered(rows.get("accuracy", {}))
    for row in rows.get("cost", []):
        for key, most, what in (("step_ratio", 1.6, "a step"), ("memory_ratio", 2.5, "memory")):
            word = "reached" if row[key] <= most else "**missed**"
            lines.append(
                f"- {word}: {what} of `{row['recipe']}` on `{row['model']}` costs {row[key]:.2f} times that of float "
                f"training; at most {most:g} times were wanted."
            )
    lines += _reliable(studies, "float", "is better than float")
    lines += _reliable(studies, "lsq-authors", f"is better than {SAID['lsq-authors']}")
    if not studies:
        lines.append(
            "- **not shown**: recipes that aim at reliability beside float and their controls, three seeds; nothing of "
            "that is measured yet but the dev split below."
        )
    return lines


def _recovered(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for (model, bits, split), rows in _by_bits(found.get("rows", [])).items():
        values = Values(rows)
        start, best = _starts(values)
        trained = [name for name in values.recipes if kind(name) == "trained"]
        for metric, title in (("top1", "top-1"), ("error", "error")):
            for origin, least, of in ((start, 0.7, "rounding to nearest"), (best, 0.5, "the best PTQ")):
                if not origin or not trained:
                    continue
                shares = {n: s for n in trained if (s := values.recovered(n, metric, origin)) is not None}
                if shares:
                    name = max(shares, key=lambda n: shares[n])
                    word = "reached" if shares[name] >= least else "**missed**"
                    lines.append(
                        f"- {word}: `{name}` on `{model}` ({bits}, {split}) recovers {100 * shares[name]:.0f} % of "
                        f"what {of} loses in {title}; at least {100 * least:.0f} % were wanted."
                    )
    return lines


def _reliable(studies: Mapping[str, Results], against: str, what: str) -> list[str]:
    """Of each studied recipe: in how many of the four it is better, and whether top-1 holds."""
    lines = []
    for name, results in studies.items():
        study = Controlled(Index(results))
        if against not in (study.reference, *study.controls):
            continue
        better, temperature = [], []
        for question in study.questions:
            found = study.difference(question, study.recipe, against)
            if question.metric in FOUR and found is not None and found.verdict is Verdict.BETTER:
                better.append(question)
                if against == study.reference and any("temperature" in due for due in study.due(question)):
                    temperature.append(question)
        kept = [q for q in better if q not in temperature]
        reached = len({q.metric for q in kept}) >= 3
        text, holds = "", True
        top1 = next((q for q in study.questions if q.metric == "top1"), None)
        if against == study.reference and top1 is not None:
            found = study.difference(top1, study.recipe, against)
            if found is not None and found.compared.value is not None:
                holds = found.compared.value >= -LOSS
                text = f" Top-1 {found.compared.said}; not below by more than 0.3 points was wanted."
        word = "reached" if reached and holds else "**missed**"
        named = ", ".join(_short(q) for q in kept) or "none"
        text += f" Explained by a temperature: {', '.join(map(_short, temperature))}." if temperature else ""
        lines.append(
            f"- {word}: `{study.recipe}` on `{results.meta.get('model', name)}` {what} in "
            f"{len({q.metric for q in kept})} of four ({named}); three were wanted.{text}"
        )
    return lines


def _short(question: Question) -> str:
    return f"{question.name}, {question.place}"
