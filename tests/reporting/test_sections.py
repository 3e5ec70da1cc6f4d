"""Each section says what its rows hold: every number under its own heading, and the right one speaks for the axis."""

from __future__ import annotations

from typing import Any

import pytest

from qclip.reporting.index import Index
from qclip.reporting.sections import SECTIONS, Section
from qclip.reporting.sections.paired import joint_wins
from qclip.results import Results

TEST = {"set": "test", "role": "id", "n": 1000}


def section(name: str) -> Section:
    return SECTIONS.get(name)()


def both(results: Results, metric: str, values: tuple[float, float], **where: Any) -> None:
    """`metric` of "float" and of "w4a8", and their difference."""
    for model, value in zip(("float", "w4a8"), values, strict=True):
        results.add(model=model, metric=metric, value=value, low=value - 0.01, high=value + 0.01, **where)
    gap = values[1] - values[0]
    results.add(model="w4a8", metric=metric, value=gap, low=gap - 0.01, high=gap + 0.01, reference="float", **where)


def paired(results: Results, metric: str, value: float | None, **where: Any) -> None:
    results.add(model="w4a8", metric=metric, value=value, reference="float", **where)


def told(name: str, results: Results, title: str) -> dict[str, dict[str, str]]:
    """Of the section's table with this title: model -> heading -> text."""
    (table,) = (each for each in section(name).tables(Index(results)) if each.title == title)
    heads = [f"{cell.text} {cell.small}".strip() for cell in table.head]
    return {row[0].text: dict(zip(heads[1:], (cell.text for cell in row[1:]), strict=True)) for row in table.rows}


def leading(name: str, results: Results) -> list[tuple[str, str]]:
    return [(q.metric, q.set) for q in section(name).questions(Index(results)) if q.leading]


def test_retrieval_is_read_both_ways_at_each_k() -> None:
    results, base = Results(), {"image_to_text_recall": 0.3, "text_to_image_recall": 0.2}
    for metric, start in base.items():
        for k in (10, 1, 5):
            value = start + k / 100
            both(results, metric, (value, value - 0.1), set="captioned", role="captions", n=1000, axis="k", at=k)
    found = told("retrieval", results, "captioned")
    assert list(found["float"].values()) == ["31.0 %", "35.0 %", "40.0 %", "21.0 %", "25.0 %", "30.0 %"]
    assert list(found["w4a8"]) == [
        f"Recall at {k} {way}" for way in ("image to text", "text to image") for k in (1, 5, 10)
    ]
    asked = [q for q in section("retrieval").questions(Index(results)) if q.leading]
    assert {(q.metric, q.k) for q in asked} == {(metric, 1) for metric in base}


def test_the_probe_of_the_id_set_speaks_for_it() -> None:
    results = Results()
    both(results, "top1", (0.9, 0.8), **TEST)
    both(results, "probe_top1", (0.7, 0.6), **TEST)
    both(results, "probe_top1", (0.5, 0.4), set="later", role="shift")
    assert leading("probe", results) == [("probe_top1", "test")]
    (head,) = told("probe", results, "later")["w4a8"]
    assert told("probe", results, "later")["w4a8"][head] == "40.0 %"
    assert list(told("probe", results, "test")["float"].values()) == ["70.0 %"]


@pytest.mark.parametrize(
    ("name", "metrics", "speaks"),
    [
        ("human", {"human_nll": 0.5, "entropy_correlation": 0.25}, ["human_nll"]),
        ("pairwise", {"pair_ece": 0.125, "pair_nll": 0.75}, []),
    ],
)
def test_each_number_stands_under_its_own_name(name: str, metrics: dict[str, float], speaks: list[str]) -> None:
    from qclip.reporting import units

    results = Results()
    for metric, value in metrics.items():
        both(results, metric, (value, value / 2), **TEST)
    for model, factor in (("float", 1), ("w4a8", 0.5)):
        wanted = [units.metric(metric).value(value * factor) for metric, value in metrics.items()]
        assert list(told(name, results, "test")[model].values()) == wanted
    assert leading(name, results) == [(metric, "test") for metric in speaks]


def test_agreement_tells_lost_from_won() -> None:
    results = Results()
    both(results, "top1", (0.5, 0.5), **TEST)
    for metric, value in (("agreement", 0.9), ("flips_all", 100), ("flips_lost", 30), ("flips_won", 20)):
        paired(results, metric, value, **TEST)
    found = told("agreement", results, "test")["w4a8"]
    assert found["Lost right to wrong"] == "30" and found["Won wrong to right"] == "20"
    assert found["Changed predictions"] == "100" and found["Same prediction"] == "90.0 %"
    index = Index(results)
    (axis,) = section("agreement").overview(index, index.cohorts[0], {})
    assert axis.marks["w4a8"].size == pytest.approx(0.1)  # what sorts variants: how much is lost


def test_corrected_and_uncorrected_probabilities_are_told_apart() -> None:
    results = Results()
    both(results, "auroc", (0.9, 0.8), set="far", role="ood-far", score="mcm")
    for score, p in (("mcm", 0.25), ("energy", 0.125)):
        paired(results, "delong_p", p, set="far", role="ood-far", score=score)
    assert told("paired", results, "DeLong, far")["w4a8"] == {"p MCM": "0.250", "p Energy": "0.125"}
    recipe = {"axis": "recipe", "at": "w4a8", "set": "test", "n": 7}
    for name, p in (("top1_wilcoxon_p", 0.03), ("top1_wilcoxon_holm_p", 0.12)):
        results.add(metric=name, value=p, **recipe)
    (row,) = told("paired", results, "One recipe over several models").values()
    assert (row["Wilcoxon p"], row["Holm p, corrected"]) == ("0.030", "0.120")


@pytest.mark.parametrize(("p", "said"), [(0.049, "more than chance."), (0.051, "no more than chance gives.")])
def test_joint_wins_are_more_than_chance_below_a_twentieth(p: float, said: str) -> None:
    results = Results()
    both(results, "auroc", (0.9, 0.8), set="far", role="ood-far", score="mcm")
    key = {"set": "far", "score": "mcm", "reference": "float", "n": 9}
    for metric, value in (("wins", 4), ("wins_clear", 1), ("wins_expected", 2.0), ("wins_p", p)):
        results.add(metric=metric, value=value, **key)
    (line,) = joint_wins(Index(results), Index(results).cohorts[0])
    assert line.endswith(said)


def test_an_index_is_judged_at_the_most_neighbours_where_ten_were_not_asked() -> None:
    results = Results()
    both(results, "top1", (0.5, 0.5), **TEST)
    names = ("index_recall", "index_recall_reverse", "text_recall", "text_recall_reverse")
    for k in (1, 7):
        for place, name in enumerate(names):
            paired(results, name, 0.9 - place / 10 - k / 100, axis="neighbours", at=k, **TEST)
    assert list(told("neighbours", results, "The 7 nearest, test")["w4a8"].values()) == [
        "83.0 %",
        "73.0 %",
        "63.0 %",
        "53.0 %",
    ]
    assert list(told("neighbours", results, "The nearest, test")["w4a8"])[:2] == [
        "New images ask the old index",
        "Old images ask a new index",
    ]
    index = Index(results)
    (axis,) = section("neighbours").overview(index, index.cohorts[0], {})
    assert axis.basis == "The 7 nearest kept, test" and axis.marks["w4a8"].said == "83.0 %"


def test_risk_is_drawn_over_coverage_for_each_model() -> None:
    results = Results()
    both(results, "aurc", (0.1, 0.2), **TEST)
    for model, risk in (("float", 0.1), ("w4a8", 0.3)):
        points = {"coverage": [1.0, 0.25, 0.5], "risk": [risk, 0.0, risk / 2], "threshold": [0, 1, 2]}
        results.add_curve(points, model=model, metric="risk_coverage", **TEST)
    (panel,) = section("selective").panels(Index(results))
    (figure,) = panel.figures
    lines = figure.data.split()[1:]
    assert lines[:3] == ["float,0.25,0", "float,0.5,0.05", "float,1,0.1"] and lines[-1] == "w4a8,1,0.3"
    drawn = {part.split('"')[0] for part in str(figure.svg).split('points="')[1:]}
    assert len(drawn) == 2  # a line for each


def test_sensitivities_stand_at_their_sites_in_the_order_of_the_tower() -> None:
    results = Results()
    sites = ("vision.blocks.0.attn.q", "vision.blocks.0.attn.k", "vision.blocks.0.mlp.fc1", "text.projection")
    for place, site in enumerate(sites):
        shared = sites[0] if place == 1 else site
        for bits in (8, 2):
            where = {"role": "site", "set": site, "subset": shared, "axis": "bits", "at": bits}
            results.add(metric="sensitivity", model="m", value=(place + 1) / bits, **where)
    index = Index(results)
    (panel,) = section("sensitivity").panels(index)
    vision, text = panel.figures
    assert vision.data.split()[1:] == [
        f"{place},{site},{bits},{value:g}"
        for place, (site, k) in enumerate(((sites[0], 1), (sites[2], 3)))
        for bits, value in ((2, k / 2), (8, k / 8))
    ]
    assert f"{sites[2]}, 2 bits: 1.5" in str(vision.svg) and "text.projection, 8 bits: 0.5" in str(text.svg)
    (table,) = section("sensitivity").tables(index)
    assert [row[0].text for row in table.rows] == list(sites)  # all of them, also those that share an input
    assert [cell.text for cell in table.head[1:]] == ["2 bits", "8 bits"]
    assert table.rows[1][1].text.startswith("1.0") and table.rows[1][2].text.startswith("0.25")


def test_shift_and_groups_are_led_by_accuracy_and_measured_beside_the_reference() -> None:
    results = Results()
    both(results, "top1", (0.9, 0.8), **TEST)
    for metric, values in (("top1", (0.6, 0.5)), ("ece", (0.1, 0.2))):
        both(results, metric, values, set="art", role="shift", n=1000)
    for where, value in ((TEST, 0.125), ({"set": "art", "role": "shift"}, 0.25)):
        paired(results, "relative_drop", value, **where)
    assert leading("shift", results) == [("top1", "art")]
    drops = told("shift", results, "Relative drop of accuracy")["w4a8"]
    assert (
        drops["test"] == "+12.5"
        and drops["art"] == "+25.0"
        and "float" not in told("shift", results, "Relative drop of accuracy")
    )
    birds = {"set": "birds", "role": "shift", "n": 1000}
    for metric, values in (("worst_group_top1", (0.5, 0.4)), ("group_gap", (0.3, 0.4)), ("rsg", (0.25, 0.5))):
        both(results, metric, values, **birds)
    paired(results, "vuln_add", 0.75, **birds)
    assert leading("groups", results) == [("worst_group_top1", "birds")]
    gaps = told("groups", results, "Spurious gaps, birds")
    assert list(gaps["float"].values()) == ["+25.0", "\N{EN DASH}"] and list(gaps["w4a8"].values()) == [
        "+50.0",
        "+75.0",
    ]


def test_interventions_stand_beside_the_controls_of_their_own_metric() -> None:
    results = Results()
    for metric, own, control, by_hand in (("top1", 0.5, 0.4, 0.6), ("ece", 0.1, 0.2, 0.3)):
        both(results, metric, (0.9, own), **TEST)
        for axis, at, value in (("control", "white", control), ("intervention", "weights", by_hand)):
            results.add(model="w4a8", metric=metric, axis=axis, at=at, value=value, **TEST)
    (table,) = section("interventions").tables(Index(results))
    assert [[cell.text for cell in row[1:]] for row in table.rows] == [
        ["itself", "50.0 %", "10.0 %"],
        ["white", "40.0 %", "20.0 %"],
        ["weights", "60.0 %", "30.0 %"],
    ]
