"""The page's data: what is told better or worse, how it is shaded, which variants no other beats, what is missing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from benchmarks.study_report import PLAN, synthetic
from qclip.study.found import Asked, Found, find
from qclip.study.sizes import Size
from qclip.study.views import front, views

TEXT = PLAN.replace('["rtn", "smoothquant", "repq-vit", "gptq", "awq", "rotation", "svdquant"]', '["rtn"]')
TEXT = TEXT.replace("[8, 6, 4, 3, 2]", "[8, 4]").replace("[8, 6, 4, 16]", "[8]").replace(', "scenes-noisy"', "")
METRICS = ("top1", "ece", "auroc", "signed_gap")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return find(*synthetic(tmp_path_factory.mktemp("views"), TEXT), Asked((*METRICS, "model_bytes", "ms_per_image")))


def shown(found: Found, change: Any = lambda line: {}, **more: Any) -> dict[str, Any]:
    lines = [line | change(line) for line in found.lines]
    return views(dataclasses.replace(found, lines=lines, **more), METRICS, {}, {})


def one(
    name: str, gap: float, low: float | None, high: float | None, model: str = "photos", variant: str = "w4a8"
) -> Any:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        if (line["metric"], line["role"], line["model"], line["variant"]) == (name, "id", model, variant):
            return {"difference": gap, "difference_low": low, "difference_high": high}
        same = line["metric"] == name and line["role"] == "id" and line["variant"] != "float"
        return {"difference": 0.01, "difference_low": -0.5, "difference_high": 0.5} if same else {}

    return change


@pytest.mark.parametrize(
    ("name", "ends", "side"),
    [
        ("top1", (0.02, 0.01, 0.03), "better"),
        ("top1", (-0.02, -0.03, -0.01), "worse"),
        ("ece", (0.02, 0.01, 0.03), "worse"),
        ("ece", (-0.02, -0.03, -0.01), "better"),
        ("ece", (-0.02, -0.03, 0.0), ""),
        ("top1", (0.02, None, None), ""),
        ("signed_gap", (0.02, 0.01, 0.03), ""),
    ],
)
def test_a_side_is_told_where_the_interval_is_clear_of_0(found: Found, name: str, ends: tuple, side: str) -> None:
    first, second = shown(found, one(name, *ends))["parts"]
    assert first["cells"][f"{name}|id"][2][3:] == [side, 100]
    assert first["cells"][f"{name}|id"][1][3:] == ["", 50]
    assert second["cells"][f"{name}|id"][2][3:] == ["", 50]  # shades compare models with each other


def test_places_are_the_same_for_all_models(found: Found) -> None:
    data = shown(found)
    (top1,) = (each for each in data["metrics"] if each["name"] == "top1")
    assert top1["places"] == [
        "id",
        "on scenes-style-shift",
        "on scenes-spurious-test",
        "under gaussian_noise",
        "under defocus_blur",
        "under fog",
        "under jpeg_compression",
    ]
    groups = {key: each["group"] for key, each in data["places"].items()}
    assert groups["id"] == "Sets as they are" and groups["on scenes-style-shift"] == "Shifted sets"
    assert groups["ood-mean"] == groups["on scenes-near-ood"] == "OOD sets" and groups["under fog"] == "Corruptions"
    assert data["places"]["on scenes-near-ood"]["label"] == "scenes-near-ood, near"
    assert [each["name"] for each in data["metrics"]] == list(METRICS)
    assert all(len(each["cells"]) == len(data["parts"][0]["cells"]) for each in data["parts"])


def test_what_is_undefined_or_was_not_measured_is_said(found: Found) -> None:
    def undefined(line: dict[str, Any]) -> dict[str, Any]:
        return {"value": math.nan, "reason": "of one class"} if line["variant"] == "w4a8" else {}

    part = shown(found, undefined)["parts"][0]
    assert part["cells"]["top1|id"][2] == [None, "undefined", "w4a8: of one class", "", 0]
    assert part["variants"][2]["memory"] is None  # and no NaN, which is no JSON
    block = next(each for each in found.grid.blocks if each.variant.label == "w4a8")
    cells = set(block.cells.values())
    there = dataclasses.replace(found, lines=[line for line in found.lines if line["cell"] not in cells])
    assert shown(there, missing=cells)["parts"][0]["variants"][2]["lost"] == "missing"
    lost = shown(there, failed=dict.fromkeys(cells, {}))["parts"][0]
    assert lost["variants"][2]["lost"] == "failed" and lost["cells"]["top1|id"][2] is None


def test_costs_are_in_megabytes_and_milliseconds(found: Found) -> None:
    sizes = {("photos", "w8a8"): Size(3_000_000, 8.0)}
    part = views(found, METRICS, sizes, {id(found.grid.blocks[1]): "w8a8.html"})["parts"][0]
    line = {(each["variant"], each["metric"]): each["value"] for each in found.lines if each["model"] == "photos"}
    assert part["variants"][1]["size"] == 3 and part["variants"][0]["size"] is None
    assert part["variants"][1]["memory"] == line["w8a8", "model_bytes"] / 1e6
    assert part["variants"][1]["time"] == line["w8a8", "ms_per_image"]
    assert [each["page"] for each in part["variants"]] == ["", "w8a8.html", ""]
    assert part["fronts"]["top1|id"]["size"] == [1]
    assert part["fronts"]["top1|id"]["memory"][0] == 2  # the smallest


def test_a_front_is_what_no_other_beats_in_both() -> None:
    costs, values = [1, 2, 2, 3, 4, None, 5], [0.5, 0.6, 0.7, 0.6, 0.7, 0.9, math.nan]
    assert front(costs, values, 1) == [0, 2]
    assert front(costs, values, -1) == [0]
    assert front([2, 1], [0.1, 0.2], -1) == [1, 0]


def test_under_a_corruption_the_mean_over_severities_is_shown(found: Found) -> None:
    means = [line for line in found.lines if line["metric"] == "mean_top1"]
    single = [line | {"metric": "top1", "severity": 3, "value": 0.123} for line in means]
    data = shown(dataclasses.replace(found, lines=[*found.lines, *single]))
    assert data["parts"][0]["cells"] == shown(found)["parts"][0]["cells"]
