"""Words come from numbers: an interval clear of 0 decides, and nothing else does."""

from __future__ import annotations

import pytest

from qclip.reporting import page, table, units, verdicts
from qclip.reporting.index import Cohort, Index
from qclip.reporting.labelled import chance_ece
from qclip.reporting.sections import about, compare
from qclip.reporting.sections.retrieval import RetrievalSection
from qclip.reporting.sections.spectra import LEADS, SpectraSection
from qclip.reporting.verdicts import Verdict, judge
from qclip.results import Results
from qclip.spectral import judgements


@pytest.mark.parametrize(
    ("better", "value", "low", "high", "wanted"),
    [
        (1, 0.02, 0.01, 0.03, Verdict.BETTER),
        (1, -0.02, -0.03, -0.01, Verdict.WORSE),
        (-1, 0.02, 0.01, 0.03, Verdict.WORSE),
        (-1, -0.02, -0.03, -0.01, Verdict.BETTER),
        (1, 0.02, -0.001, 0.03, Verdict.OPEN),
        (1, 0.02, 0.0, 0.03, Verdict.OPEN),  # touching 0 is not clear of it
        (1, 0.02, None, None, Verdict.OPEN),  # no interval, no verdict
        (1, 0.02, float("nan"), 0.03, Verdict.OPEN),
        (0, 0.02, 0.01, 0.03, Verdict.UP),
        (0, -0.02, -0.03, -0.01, Verdict.DOWN),
        (1, 0.0, 0.0, 0.0, Verdict.SAME),
        (1, None, None, None, Verdict.MISSING),
    ],
)
def test_judge(better, value, low, high, wanted) -> None:
    assert judge(better, value, low, high) is wanted


@pytest.mark.parametrize(("n", "wanted"), [(12, Verdict.OPEN), (30, Verdict.BETTER), (None, Verdict.BETTER)])
def test_an_interval_without_width_on_a_few_images_decides_nothing(n, wanted) -> None:
    index, cohort = pair(
        {"metric": "top1", "value": 0.5, "n": n, "model": "float"},
        {"metric": "top1", "value": 0.6, "n": n},
        difference("top1", 0.1, 0.1, 0.1, n=n),
    )
    (by_model,) = compare(index, cohort).values()
    assert by_model["w8a8"].verdict is wanted


def test_sets_and_parts_of_few_images_are_named() -> None:
    index, _ = pair(
        {"metric": "top1", "value": 0.5, "n": 40},
        {"metric": "top1", "value": 0.5, "n": 12, "axis": "group", "at": "conflict"},
        {"metric": "auroc", "value": 0.5, "n": 1, "role": "ood-far", "set": "pictures", "score": "mcm"},
        difference("top1", 0.1, 0.0, 0.2, n=40),
    )
    said = verdicts.few_images(index)
    assert [line.split(";")[0] for line in said] == ["test, conflict: 12 images", "pictures: 1 image"]
    assert all(line in page.notes(index) for line in said) and f"note: {said[1]}" in table(index.results)


def pair(*rows: dict, reference: str = "float") -> tuple[Index, Cohort]:
    results = Results()
    for row in rows:
        base = {"set": "test", "model": "w8a8"}
        results.add(**base | row)
    index = Index(results)
    return index, next(cohort for cohort in index.cohorts if cohort.reference == reference)


def difference(metric: str, value: float, low: float | None, high: float | None, **more) -> dict:
    return {"metric": metric, "value": value, "low": low, "high": high, "reference": "float", **more}


def told(*rows: dict) -> str:
    index, cohort = pair(*rows)
    return " ".join(about(index, cohort, "w8a8", compare(index, cohort)))


def test_sentences_name_what_is_better_worse_and_open() -> None:
    said = told(
        {"metric": "top1", "value": 0.5},
        difference("top1", -0.012, -0.02, -0.004),
        difference("ece", -0.01, -0.02, -0.005),
        difference("auroc", 0.001, -0.01, 0.012, set="far", role="ood-far", score="mcm"),
    )
    assert "Worse in top-1 accuracy (−1.20 points [−2.00, −0.40])." in said
    assert "Better in calibration (−1.00 points [−2.00, −0.50])." in said
    assert "No difference shown in far OOD detection." in said
    assert "none was fitted" in said  # ECE moved and there is no ece_ts


def test_an_open_accuracy_says_how_large_a_loss_it_still_allows() -> None:
    said = told({"metric": "top1", "value": 0.5}, difference("top1", 0.001, -0.003, 0.004))
    assert "No difference to float is shown in top-1 accuracy." in said
    assert "beyond 0.30 points is unlikely" in said


@pytest.mark.parametrize(
    ("fitted", "wanted"),
    [
        ((-0.001, -0.004, 0.002), "can no longer be told"),
        ((-0.01, -0.02, -0.001), "stays"),
        ((0.01, 0.001, 0.02), "turns round"),
    ],
)
def test_whether_a_temperature_explains_the_change_of_ece(fitted, wanted) -> None:
    said = told({"metric": "top1", "value": 0.5}, difference("ece", -0.02, -0.03, -0.01), difference("ece_ts", *fitted))
    assert wanted in said


def test_several_ood_sets_are_told_apart_and_mean_rows_are_not_judged() -> None:
    rows = [difference("auroc", 0.1, 0.05, 0.2, set=name, role="ood-far", score="mcm") for name in ("dtd", "mnist")]
    mean = difference("auroc", 0.1, 0.05, 0.2, set="mean of 2 OOD sets", role="ood-mean", score="mcm")
    said = told(*rows, mean)
    assert "far OOD detection on dtd" in said and "far OOD detection on mnist" in said and "mean of" not in said


def test_noise_without_a_mean_row_has_a_difference_but_no_verdict() -> None:
    rows = [
        {"metric": "top1", "corruption": "gaussian_noise", "severity": s, "model": m, "value": v - 0.1 * s}
        for s in (1, 2)
        for m, v in (("float", 0.9), ("w8a8", 0.8))
    ]
    index, cohort = pair(*rows, difference("top1", -0.1, -0.2, -0.05))
    answers = {q.axis: a["w8a8"] for q, a in compare(index, cohort).items() if q.metric == "mean_top1"}
    answer = answers["Noise robustness"]
    assert answer.value == pytest.approx(-0.1) and answer.verdict is Verdict.OPEN


def test_multiplicity_counts_and_expects() -> None:
    rows = [difference(m, 0.02, 0.01, 0.03) for m in ("top1", "balanced_accuracy", "ece", "signed_gap")]
    index, cohort = pair({"metric": "top1", "value": 0.5}, *rows)
    said = verdicts.multiplicity([compare(index, cohort)])
    # the signed gap is told, not counted: neither side of it is better
    assert said.startswith("2 better and 1 worse among 3 comparisons.")
    assert "about 0.2 intervals" in said  # 0.05 * 3
    assert verdicts.multiplicity([{}]) == ""


@pytest.mark.parametrize(
    ("level", "shape", "finding"), [(0.99, -0.05, "damped"), (0.99, 0.0, "shrunk"), (1.0, 0.0, "open")]
)
def test_the_section_says_first_what_was_found(level: float, shape: float, finding: str) -> None:
    results = Results()
    tower = {"model": "w8a8", "set": "vision", "role": "tower", "n": 12}
    for band, start, gain in (("ranks 0-8", 0, 1.0), ("ranks 64-", 64, level)):
        spread = {"value": gain, "low": gain - 1e-3, "high": gain + 1e-3}
        results.add(metric="gain", subset=band, axis="band", at=start, **tower, **spread)
    for metric, value in (("level", level), ("shape", shape)):
        results.add(metric=metric, value=value, low=value - 1e-3, high=value + 1e-3, **tower)
        gap = value - (metric == "level")
        results.add(metric=metric, value=gap, low=gap - 1e-3, high=gap + 1e-3, reference="white", **tower)
    (found,) = judgements(results.rows)
    assert (found.finding, found.band) == (finding, "ranks 64-")
    assert SpectraSection().sentences(Index(results))[0].startswith(LEADS[finding] + " w8a8 (vision).")
    assert Index(results).cohorts == [Cohort("", ("w8a8",))]  # white noise is no model


def test_chance_ece_is_the_half_normal_mean() -> None:
    # docs/methods.md, Accuracy and calibration: one bin of 1,000 at accuracy 1/2: sqrt(2 * 0.25 / (pi * 1000))
    assert chance_ece([(1000, 0.5)]) == pytest.approx(0.012616, abs=1e-6)
    assert chance_ece([(10, 1.0), (10, 0.0)]) == 0 and chance_ece([]) == 0


def test_numbers_are_printed_with_their_sign_and_unit() -> None:
    top1, nll, gap = units.metric("top1"), units.metric("nll"), units.metric("signed_gap")
    assert top1.value(0.7125) == "71.2 %" and top1.difference(-0.00123) == "−0.12" and top1.difference(0) == "0.00"
    assert top1.difference_interval(-0.004, -0.00001) == "[−0.40, −0.00]"  # clear of 0, and it shows
    assert top1.value(None) == "–" and top1.interval(None, 0.5) == ""
    assert nll.value(float("inf")) == "∞" and nll.difference(0.0234) == "+0.023"
    assert gap.value(-0.031) == "−3.1"
    assert units.size(3_140_000) == "3.14 MB" and units.size(351_200_000) == "351 MB" and units.size(None) == "–"
    assert units.words(["a"]) == "a" and units.words(["a", "b", "c"]) == "a, b and c" and units.words([]) == ""
    assert units.metric("something_new").value(1.5) == "1.5000"


def test_two_directions_on_one_set_are_named_apart() -> None:
    results = Results()
    for metric in ("image_to_text_recall", "text_to_image_recall"):
        key = {"set": "pairs", "role": "captions", "metric": metric, "axis": "k", "at": 1, "n": 100}
        results.add(model="float", value=0.4, **key)
        results.add(model="w8a8", reference="float", value=-0.1, low=-0.12, high=-0.08, **key)
    index = Index(results)
    (cohort,) = index.cohorts
    asked = RetrievalSection().questions(index)
    (said,) = verdicts.about(cohort, "w8a8", verdicts.compare(index, cohort, asked))
    assert "image to text recall at 1 on pairs (" in said and "text to image recall at 1 on pairs (" in said
    assert "retrieval on pairs" not in said
