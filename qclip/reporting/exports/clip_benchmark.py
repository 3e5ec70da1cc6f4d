"""CLIP_benchmark (LAION-AI/CLIP_benchmark 1.6): a JSON per model, data set and task, and the CSV that its `build` makes
of them. Metrics have its names; its `pretrained` is our recipe."""

from __future__ import annotations

import collections
import csv
import io
import json
import math
from typing import Any

from qclip.results import Results

from . import apart, part_of_name

CLASSIFICATION = {"top1": "acc1", "top5": "acc5", "balanced_accuracy": "mean_per_class_recall"}
# Its "image retrieval" finds images by texts.
RETRIEVAL = {
    "text_to_image_recall": "image_retrieval_recall",
    "image_to_text_recall": "text_retrieval_recall",
}


class ClipBenchmark:
    name, label = "clip_benchmark", "CLIP_benchmark"

    def __call__(self, results: Results) -> dict[str, str]:
        records = [
            (model, found)
            for model in results.unique("model")
            for set_ in results.unique("set")
            for found in (_classification(results, model, set_), _retrieval(results, model, set_))
            if found
        ]
        if not records:
            return {}
        alike = collections.Counter(map(_named, (each for _, each in records)))
        told = [  # what has one source and one recipe is told apart by our name for it
            each | {"pretrained": f"{each['pretrained']} {model}"} if alike[_named(each)] > 1 else each
            for model, each in records
        ]
        texts = [json.dumps(each, indent=1) + "\n" for each in told]
        return dict(zip(apart(map(_file, told)), texts, strict=True)) | {"benchmark.csv": _csv(told)}


def _classification(results: Results, model: str, set_: str) -> dict[str, Any] | None:
    rows = results.where(model=model, set=set_, role=("id", "shift"), subset="all", axis="", reference="")
    found = {theirs: row for row in rows if not row["corruption"] and (theirs := CLASSIFICATION.get(row["metric"]))}
    return _record(found, set_, "zeroshot_classification") if found else None


def _retrieval(results: Results, model: str, set_: str) -> dict[str, Any] | None:
    rows = results.where(model=model, set=set_, reference="", metric=tuple(RETRIEVAL))
    found = {f"{RETRIEVAL[row['metric']]}@{row['at']}": row for row in rows}
    return _record(found, set_, "zeroshot_retrieval") if found else None


def _record(found: dict[str, Any], set_: str, task: str) -> dict[str, Any]:
    row = next(iter(found.values()))
    values = {name: math.nan if row["value"] is None else row["value"] for name, row in found.items()}
    return {
        "dataset": set_,
        "model": row["source"] or row["model"],
        "pretrained": row["recipe"] or "float",
        "task": task,
        "metrics": values,  # NaN as Python's json writes it: that is how CLIP_benchmark says that acc5 is undefined
        "language": "en",
    }


def _named(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[name] for name in ("dataset", "pretrained", "model", "language", "task"))


def _file(record: dict[str, Any]) -> str:
    parts = _named(record)
    return "_".join(map(part_of_name, parts)) + ".json"


def _csv(records: list[dict[str, Any]]) -> str:
    rows = [
        {**each["metrics"], **{k: v for k, v in each.items() if k != "metrics"}}
        | {"model_fullname": f"{each['model']} {each['pretrained']}"}
        for each in records
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
