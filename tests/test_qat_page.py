"""docs/qat.md is what its committed results say, and says of targets whether they are met."""

from __future__ import annotations

from typing import Any

from benchmarks.qat import PAGE, RECIPES, SETTINGS, results, slim
from benchmarks.qat_page import Values, page
from qclip import Results, recipes

GAIN = (0.02, 0.01, 0.03)


def test_the_page_is_that_of_its_results() -> None:
    assert PAGE.read_text() == page(*results()), "write it again: python -m benchmarks.qat write"


def test_what_is_studied_are_recipes_of_now_on_shipped_checkpoints() -> None:
    studies, rows = results()
    for found in studies.values():
        assert found.meta["model"] in SETTINGS and found.meta["recipe"] in RECIPES
        (held,) = {row["recipe_hash"] for row in found.where(model=found.meta["recipe"]) if row["recipe_hash"]}
        assert held == recipes.get(found.meta["recipe"]).hash, f"measure {found.meta['recipe']} again"
    for name in rows.get("accuracy", {"rows": []})["rows"]:
        assert name["recipe"] == "float" or recipes.get(name["recipe"])


def accuracy() -> list[dict[str, Any]]:
    rows = []
    for recipe, top1, error in (
        ("float", 0.75, 0.0),
        ("w4a4", 0.70, 0.020),
        ("w4a4-gptq", 0.73, 0.010),
        ("w4a4-lsq", 0.744, 0.004),
        ("w4a4-lsq", 0.746, 0.002),
    ):
        for metric, value in (("top1", top1), ("error", error)):
            row = {"model": "m", "recipe": recipe, "split": "dev", "metric": metric, "value": value, "steps": 9}
            rows.append(row)
    return rows


def test_shares_are_of_what_rounding_and_the_best_method_lose() -> None:
    values = Values(accuracy())
    assert abs(values.recovered("w4a4-lsq", "top1", "w4a4") - 0.9) < 1e-9
    assert abs(values.recovered("w4a4-lsq", "top1", "w4a4-gptq") - 0.75) < 1e-9
    assert abs(values.recovered("w4a4-lsq", "error", "w4a4") - 0.85) < 1e-9
    text = page({}, {"accuracy": {"rows": accuracy()}})
    assert "| `w4a4-lsq` | 74.5 (74.4-74.6) | 3.000 (2.000-4.000) | 90 % | 75 % | 85 % | 70 % | 9 |" in text
    assert text.count("- reached: `w4a4-lsq` on `m` (W4A4, dev) recovers") == 4
    worse = [
        row | {"value": 0.71} if row["recipe"] == "w4a4-lsq" and row["metric"] == "top1" else row for row in accuracy()
    ]
    assert page({}, {"accuracy": {"rows": worse}}).count("**missed**") == 2


def studied(differences: dict[tuple[str, str], tuple[float, float, float]]) -> Results:
    found = Results(meta={"model": "m", "cpu": "some"})
    for (name, against), (value, low, high) in differences.items():
        role = {"auroc": "ood", "mean_top1": "corrupted"}.get(name, "id")
        fields: dict[str, Any] = {"model": "r", "set": "s", "role": role, "reference": against, "n": 99}
        fields |= {"score": "mcm" if name == "auroc" else "", "corruption": "fog" if name == "mean_top1" else ""}
        found.add(metric=name, value=value, low=low, high=high, **fields)
        for p in ("difference_p", "difference_holm_p"):
            found.add(metric=p, value=0.01, axis="metric", at=name, **fields)
    return found


LESS = (-0.03, -0.04, -0.02)
GOOD = {("top1", "float"): (-0.001, -0.004, 0.002), ("ece_ts", "float"): LESS, ("auroc", "float"): GAIN}
GOOD |= {("mean_top1", "float"): GAIN, ("nll", "float"): LESS, ("nll_ts", "float"): (0.0001, -0.01, 0.01)}


def test_targets_of_reliability() -> None:
    text = page({"study-m-r": studied(GOOD)}, {})
    assert "- reached: `r` on `m` is better than float in 3 of four" in text
    assert "Explained by a temperature: NLL" in text
    fewer = {key: value for key, value in GOOD.items() if key[0] != "auroc"}
    assert "- **missed**: `r` on `m` is better than float in 2 of four" in page({"study-m-r": studied(fewer)}, {})
    lost = GOOD | {("top1", "float"): (-0.004, -0.006, -0.002)}
    assert "- **missed**: `r` on `m` is better than float in 3 of four" in page({"study-m-r": studied(lost)}, {})
    kept = slim(studied(GOOD))
    assert page({"study-m-r": Results(kept.rows, meta={"model": "m", "cpu": "some"})}, {}) == text


def test_the_ablation_and_the_cost_stand_there() -> None:
    rows = [
        {"model": "m", "recipe": "w4a8-lsq", "arm": o[:4], "objective": o, "seed": s, "split": "dev", "metric": "nll"}
        | {"value": v}
        for o, s, v in (("contrastive", 0, 0.1), ("contrastive", 1, 0.2), ("mse", 0, 0.05))
    ]
    ends = {"split": "dev, difference to float", "low": -0.3, "high": -0.1}
    rows += [row | ends | {"value": -0.2} for row in rows[2:]]
    cost = [{"model": "m", "recipe": "w4a8-lsq", "batch": 64, "float_step_s": 0.5, "rounded_step_s": 0.9}]
    cost[0] |= {
        "step_ratio": 1.8,
        "float_peak_mb": 10,
        "rounded_peak_mb": 20,
        "memory_ratio": 2.0,
        "memory_ratio_of_steps": 1.9,
    }
    text = page({}, {"ablation": {"rows": rows}, "cost": cost})
    assert "| cont | `contrastive` | 0.1500 (0.1000 to 0.2000) |  |" in text and "| mse | `mse` | 0.0500 |  |" in text
    assert "| mse | `mse` | **-0.2000 [-0.3000, -0.1000]** |  |" in text
    assert "| `m` | `w4a8-lsq` | 64 | 0.5 | 0.9 | 1.8 | 10 | 20 | 2.0 |" in text
    assert "- **missed**: a step of `w4a8-lsq` on `m` costs 1.80 times" in text
    assert "- reached: memory of `w4a8-lsq`" in text
