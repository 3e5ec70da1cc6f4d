"""Every Eval Ever (evaleval/every_eval_ever, schema 0.3.0): a JSON per model, one result per number with its interval.

What has no place there (spectra, speed, what a model is) is left out; so is a value that is undefined, for the schema
wants a number. A difference to the reference is a result of its own, whose name says so.
"""

from __future__ import annotations

import json
import time
from typing import Any

from qclip.metrics import METRICS, metric
from qclip.results import Results

from . import apart, part_of_name

SCHEMA = "0.3.0"
WITHOUT = ("model", "site", "tower", "dev", "train")  # roles


class EveryEvalEver:
    name, label = "every_eval_ever", "Every Eval Ever"

    def __call__(self, results: Results) -> dict[str, str]:
        now = time.time()
        rows = {model: [row for row in results.where(model=model) if _fits(row)] for model in results.unique("model")}
        rows = {model: found for model, found in rows.items() if found}
        texts = [json.dumps(_record(results, *each, now), indent=1) + "\n" for each in rows.items()]
        return dict(zip(apart(f"{part_of_name(model)}.json" for model in rows), texts, strict=True))


def _fits(row: dict[str, Any]) -> bool:
    known = row["metric"] in METRICS and row["value"] is not None and abs(row["value"]) != float("inf")
    return known and row["set"] != "" and row["role"] not in WITHOUT


def _record(results: Results, model: str, rows: list[dict[str, Any]], now: float) -> dict[str, Any]:
    first, meta = rows[0], results.meta
    source = first["source"] or model
    details = {name: str(first[name]) for name in ("recipe", "method", "bits", "recipe_hash", "backend") if first[name]}
    return {
        "schema_version": SCHEMA,
        "evaluation_id": f"qclip/{part_of_name(source)}-{part_of_name(model)}/{now:.3f}",
        "retrieved_timestamp": f"{now:.3f}",
        "source_metadata": {
            "source_name": "qclip",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
            "additional_details": {name: str(meta[name]) for name in ("cpu", "threads", "command") if name in meta},
        },
        "eval_library": {"name": "qclip", "version": str(meta.get("qclip", "unknown"))},
        "model_info": {
            "name": model,
            "id": f"{part_of_name(source)}/{part_of_name(model)}",
            "inference_engine": {"name": "qclip", "version": str(meta.get("qclip", "unknown"))},
            "additional_details": {"deployment_type": "self_deployed", "model_availability": "unknown"} | details,
        },
        "evaluation_results": [_result(row, meta) for row in rows],
    }


def _result(row: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    of = metric(row["metric"])
    where = {name: row[name] for name in ("role", "subset", "axis", "at", "corruption", "severity", "score")}
    where = {name: str(value) for name, value in where.items() if value not in ("", None, 0, "all")}
    against = f" minus {row['reference']}" if row["reference"] else ""
    share = of.unit == "share"
    config: dict[str, Any] = {
        "evaluation_description": of.label,
        "metric_id": of.name,
        "metric_name": of.label + against,
        "metric_unit": "proportion" if share else of.unit or "points",
        "lower_is_better": of.better < 0,
        "score_type": "continuous",
        "min_score": (-1 if against or of.signed else 0) if share else "-Infinity",
        "max_score": 1 if share else "Infinity",
        "additional_details": where | ({"difference_to": row["reference"]} if row["reference"] else {}),
    }
    details: dict[str, Any] = {"score": row["value"]}
    uncertainty: dict[str, Any] = {} if row["n"] is None else {"num_samples": row["n"]}
    if row["low"] is not None and row["high"] is not None:
        method = "bootstrap, bias-corrected and accelerated" if of.interval == "bca" else "bootstrap, percentile"
        interval = {"lower": row["low"], "upper": row["high"], "confidence_level": 0.95, "method": method}
        uncertainty["confidence_interval"] = interval
        if isinstance(meta.get("replicates"), int):
            uncertainty["num_bootstrap_samples"] = meta["replicates"]
    if uncertainty:
        details["uncertainty"] = uncertainty
    place = " ".join([row["set"], *(f"{name}={value}" for name, value in where.items())])
    return {
        "evaluation_result_id": f"{of.name}{against} on {place}",
        "evaluation_name": place,
        "source_data": {"dataset_name": row["set"], "source_type": "other"},
        "metric_config": config,
        "score_details": details,
    }
