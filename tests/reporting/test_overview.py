"""The overview: a word for each axis, from the intervals and from nothing else."""

from __future__ import annotations

import re
from html import unescape

import pytest

from qclip.reporting import html, table
from qclip.reporting.chance import at_chance
from qclip.reporting.index import Cohort, Index
from qclip.reporting.overview import Axis, sentences
from qclip.reporting.sections import all_sections, compare, overview_of
from qclip.reporting.verdicts import Verdict
from qclip.results import Results

ALWAYS = [
    *("Accuracy", "Calibration", "Near OOD detection", "Far OOD detection", "Noise and other corruptions"),
    *("Covariate shift", "Worst group", "Agreement", "Float index", "Size", "Speed"),
]


def overview(results: Results) -> tuple[Index, Cohort, dict[str, Axis]]:
    index = Index(results)
    cohort = index.cohorts[0]
    return index, cohort, {axis.name: axis for axis in overview_of(index, cohort, compare(index, cohort))}


def compared(*differences: tuple[str, float, float, float, dict]) -> Results:
    """`w8a8` against `float`: (metric, value, low, high, key)."""
    results = Results()
    results.add(model="float", metric="top1", value=0.8, set="test", role="id")
    for metric, value, low, high, key in differences:
        key = {"set": "test", "role": "id"} | key
        results.add(model="w8a8", reference="float", metric=metric, value=value, low=low, high=high, **key)
    return results


def test_every_axis_has_a_line_and_says_where_nothing_was_measured() -> None:
    index, cohort, axes = overview(compared(("top1", -0.02, -0.03, -0.01, {})))
    assert list(axes) == ALWAYS
    said = {name: axis.marks["w8a8"].verdict for name, axis in axes.items()}
    assert said.pop("Accuracy") is Verdict.WORSE
    assert set(said.values()) == {Verdict.MISSING}
    page = html(index.results)
    section = page.split('<section id="overview">')[1].split("</section>")[0]
    table = section.split("<table")[1].split("</table>")[0]
    assert [table.count(word) for word in (">worse<", ">not measured<", ">better<")] == [1, len(ALWAYS) - 1, 0]
    assert sentences(index, cohort, list(axes.values()), compare(index, cohort))[-1].startswith(
        "Not measured: calibration, near OOD detection"
    )


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-0.03, -0.01, "better"), (0.01, 0.03, "worse"), (-0.01, 0.03, "no difference shown")]
)
def test_the_word_is_that_of_the_interval(low: float, high: float, word: str) -> None:
    *_, axes = overview(compared(("ece", (low + high) / 2, low, high, {})))
    assert axes["Calibration"].marks["w8a8"].verdict.word == word


def test_sets_that_disagree_are_both_named() -> None:
    shift = {"role": "shift"}
    results = compared(
        ("top1", 0.02, 0.01, 0.03, shift | {"set": "paintings"}), ("top1", -0.05, -0.06, -0.04, shift | {"set": "toys"})
    )
    *_, axes = overview(results)
    mark = axes["Covariate shift"].marks["w8a8"]
    assert mark.verdict is Verdict.MIXED and mark.whole == "−5.00 points [−6.00, −4.00] on toys"


def test_size_is_exact_and_a_time_without_an_interval_is_no_verdict() -> None:
    results = compared(("top1", 0.0, -0.01, 0.01, {}))
    for model, size, time in (("float", 100, 4.0), ("w8a8", 27, 2.0)):
        results.add(model=model, metric="model_bytes", role="model", value=size)
        results.add(model=model, metric="ms_per_image", set="test", role="id", value=time)
    *_, axes = overview(results)
    assert (axes["Size"].marks["w8a8"].verdict, axes["Size"].marks["w8a8"].said) == (Verdict.BETTER, "0.27×")
    assert (axes["Speed"].marks["w8a8"].verdict, axes["Speed"].marks["w8a8"].said) == (Verdict.NOTED, "2.0× as fast")
    results.add(model="w8a8", metric="coverage_macs", role="model", axis="state", at="simulated", value=0.5)
    *_, axes = overview(results)
    assert axes["Speed"].marks["w8a8"].verdict is Verdict.MISSING  # a simulated model's time says nothing


def test_a_float_index_is_kept_or_changed() -> None:
    key = {"axis": "neighbours", "n": 100}
    results = compared(
        ("index_recall", 0.98, 0.97, 0.99, key | {"at": 10}), ("index_recall", 1.0, 1.0, 1.0, key | {"at": 1})
    )
    index, _, axes = overview(results)
    mark = axes["Float index"].marks["w8a8"]
    assert (mark.verdict, mark.whole) == (Verdict.CHANGED, "98.0 % [97.0, 99.0]")  # at 10, not at 1
    assert "The 10 nearest kept, test: w8a8 98.0" in html(index.results).replace("\N{NO-BREAK SPACE}", " ")


def test_the_verdict_names_who_is_not_shown_to_be_worse() -> None:
    results = Results()
    results.add(model="float", metric="top1", value=0.8, set="test", role="id")
    for model, low, high, size in (("a", -0.01, 0.01, 30), ("b", -0.01, 0.01, 20), ("c", -0.09, -0.05, 10)):
        common = {"metric": "top1", "set": "test", "role": "id", "value": (low + high) / 2}
        results.add(model=model, reference="float", low=low, high=high, **common)
        results.add(model=model, metric="model_bytes", role="model", value=size)
    results.add(model="float", metric="model_bytes", role="model", value=100)
    index, cohort, axes = overview(results)
    said = sentences(index, cohort, list(axes.values()), compare(index, cohort))
    assert said[0].startswith("2 of 3 variants are not shown to be worse on any line below: a and b; ")
    assert "the smallest of them is b, 0.20× the size" in said[0] and "does not prove" in said[0]
    assert said[1] == "Worse in accuracy in 1 of 3 (c, −7.00 points)."


def test_harm_that_makes_no_line_is_counted() -> None:
    """Top-1 and ECE are open, NLL is worse: no line of the overview says so, so a sentence does."""
    results = compared(("top1", 0.0, -0.01, 0.01, {}), ("ece", 0.0, -0.01, 0.01, {}), ("nll", 0.2, 0.1, 0.3, {}))
    index, cohort, axes = overview(results)
    said = sentences(index, cohort, list(axes.values()), compare(index, cohort))
    assert said[1].endswith("found below: w8a8 (1).")
    index, cohort, axes = overview(compared(("top1", 0.0, -0.01, 0.01, {}), ("nll", 0.2, -0.1, 0.3, {})))
    assert "found below" not in " ".join(sentences(index, cohort, list(axes.values()), compare(index, cohort)))


def test_a_reference_that_guesses_is_named_first() -> None:
    results = compared(("top1", 0.02, 0.01, 0.03, {}), ("auroc", 0.0, -0.1, 0.1, {"set": "far", "score": "mcm"}))
    for metric, low, value, high, key in (
        ("top1", 0.09, 0.11, 0.13, {"set": "easy"}),
        ("top1", 0.11, 0.13, 0.15, {"set": "hard"}),
        ("auroc", 0.45, 0.49, 0.53, {"set": "far", "score": "mcm"}),
        ("auroc", 0.4, 0.45, 0.49, {"set": "far", "score": "energy"}),  # of a score that is not judged
        ("mean_top1", 0.05, 0.08, 0.11, {"set": "hard", "corruption": "fog"}),
        ("image_to_text_recall", 0.0, 0.02, 0.04, {"set": "captioned", "axis": "k", "at": 1, "n": 50}),
    ):
        results.add(model="float", metric=metric, value=value, low=low, high=high, **{"role": "id"} | key)
    index, cohort, _ = overview(results)
    assert "top-1" not in " ".join(at_chance(index, cohort)).lower()  # in how many classes is not told
    for name in ("easy", "hard"):
        results.add(metric="chance_top1", set=name, role="id", value=0.1)
    index, cohort, _ = overview(results)
    (said,) = at_chance(index, cohort)
    assert "on easy (Top-1 accuracy 11.0 % [9.0, 13.0], by guessing 10.0 %)" in said and "on hard (" not in said
    assert "far (AUROC 49.0 % [45.0, 53.0], by guessing 50.0 %)" in said and said.count("AUROC") == 1
    assert "hard under fog (" in said and "captioned (" in said and "by guessing 2.0 %" in said
    page = unescape(html(results))
    assert page.split('<section id="overview">')[1].split("<li>")[1].split("</li>")[0].startswith("float itself is not")
    assert "float itself is not shown to be better than guessing" in " ".join(table(results).split())
    assert at_chance(index, Cohort("", ("float",))) == []


def test_joint_wins_stand_beside_chance() -> None:
    results = compared(("top1", 0.0, -0.01, 0.01, {}), ("auroc", 0.0, -0.1, 0.1, {"set": "far", "score": "mcm"}))
    key = {"set": "far", "score": "mcm", "reference": "float", "n": 19}
    for metric, value in (("wins", 3), ("wins_clear", 1), ("wins_p", 0.31)):
        results.add(metric=metric, value=value, **key)
    results.add(metric="wins_expected", value=2.1, low=0, high=8, **key)
    page = html(results)
    assert "3 of 19 variants are better than float in accuracy, ECE and AUROC" in page
    assert "2.1 (0 to 8) would be by chance, p = 0.310: no more than chance gives." in page


def test_twenty_models_are_counted_sorted_and_filtered(make_twenty) -> None:
    page = html(make_twenty())
    overview = page.split('<section id="overview">')[1].split("</section>")[0]
    assert "Of 19 variants" in overview and '<input id="filter"' in overview
    table = overview.split('<table class="grid matrix sortable">')[1].split("</table>")[0]
    assert len(re.findall(r'<tr data-model="[^"]+"><th scope="row">', table)) == 19
    # without a script nothing of it is hidden, but the filter that needs one
    assert re.findall(r"<[^>]* hidden[ >]", page) == ['<p class="filter" hidden>']


def test_every_section_without_its_data_says_so_or_has_no_line() -> None:
    page = html(compared(("top1", -0.02, -0.03, -0.01, {})))
    for section in all_sections():
        if section.name != "accuracy":
            title = section.title if section.title.endswith("?") else f"{section.title}."
            said = f'<p class="absent" id="{section.name}"><b>{title}</b> {section.absent}</p>'
            assert said in page.split('<section id="unmeasured">')[1], section.name
            assert f'<section id="{section.name}">' not in page, section.name
    assert "Linear probe</th>" not in page  # of what only some ask for, the overview has no line


def test_every_section_with_its_data_shows_it(make_twenty) -> None:
    page = html(make_twenty())
    for section in all_sections():
        if section.name == "controls":  # which needs trained models: test_controlled.py
            continue
        body = page.split(f'<section id="{section.name}">')[1].split("</section>")[0]
        assert section.absent not in body and ("<figure" in body or "<table" in body), section.name


def test_what_is_measured_beside_the_verdicts_stands_in_tables(make_twenty) -> None:
    page = html(make_twenty())
    for title in (
        *("AUPR, near-ood", "At the reference&#39;s threshold, near-ood", "Scores that learned from float, near-ood"),
        *("Relative drop of AUROC, MCM", "Relative drop of accuracy", "Controls through the model, near-ood"),
        *(
            "Spurious gaps, spurious-test",
            "Error over the reference&#39;s, scenes-test",
        ),
        *(
            "Calibration in detail, scenes-test",
            "McNemar, scenes-test",
            "DeLong, near-ood",
            "The 10 nearest, scenes-test",
        ),
        *("One recipe over several models", "Joint wins in accuracy, ECE and AUROC"),
    ):
        assert f"<h4>{title}" in page, title
    assert "AUPR, far-ood" not in page and "Relative drop of AUROC, Energy" not in page  # of which nothing was given


def test_ratios_over_several_sets_are_summed_up_by_median_and_count(make_twenty) -> None:
    """+harm on one set, -harm on the other; of three corruptions (a group is none) one is as before, two are worse."""
    index = Index(make_twenty())
    tables = {each.title: each for section in all_sections() for each in section.tables(index)}

    def line(title: str, model: str) -> list[str]:
        (found,) = (row for row in tables[title].rows if row[0].text == model)
        return [cell.text for cell in found]

    drops = line("Relative drop of AUROC, MCM", "w4a8")  # harm 0.014
    assert drops == ["w4a8", "+1.4", "\N{MINUS SIGN}1.4", "0.0", "1 of 2"]
    errors = line("Error over the reference's, scenes-test", "w4a8")
    heads = [cell.text for cell in tables["Error over the reference's, scenes-test"].head]
    assert dict(zip(heads, errors, strict=True)) == {
        "Model": "w4a8",
        "Blur": "0.979",
        "Gaussian blur": "1.000",
        "Fog": "1.007",
        "Contrast": "1.028",
        "Median": "1.007",
        "Above 1": "2 of 3",
    }
    assert line("Relative drop of accuracy", "w4a8")[-1] == "2 of 2"


def test_long_lists_are_folded(make_twenty, make_results) -> None:
    """57 sentences on spectra, of which eight stand openly; 380 rows of controls. Those of a few variants are open."""
    page = html(make_twenty())
    spectra = page.split('<section id="spectra">')[1].split("</section>")[0]
    openly, folded = spectra.split('<details class="unprinted">')[:2]
    assert openly.count("<li>") - openly.count("<li><svg") == 8 and "more of these sentences</summary>" in folded
    assert "w8a8 and w8a8-smoothquant" not in openly and "and w3a8-gptq (vision, text and features on" in openly
    controls = page.split('<section id="interventions">')[1].split("</section>")[0]
    assert '<details class="unprinted">\n<summary>All numbers</summary>' in controls and 'class="paper"' in controls
    agreement = html(make_results(("photos",))).split('<section id="agreement">')[1].split("</section>")[0]
    assert "<table" in agreement and "All numbers" not in agreement and "more of these" not in agreement


def test_figures_carry_their_numbers(make_twenty) -> None:
    page = html(make_twenty())
    body = page.split('<section id="ood">')[1].split("</section>")[0]
    data = re.findall(r"<pre tabindex=\"0\">(.*?)</pre>", body, re.S)
    assert len(data) == body.count("<figure") == 6 and all(
        each.startswith("model,fpr,tpr\nfloat,0,0\n") for each in data
    )


def test_no_figure_is_without_its_numbers(make_twenty) -> None:
    page = html(make_twenty())
    assert page.count("<figure>") == page.count('<details class="data">') > 100


def test_what_is_printed_is_whole(make_twenty) -> None:
    page = html(make_twenty())
    style = page.split("@media print {")[1].split("</style>")[0]
    for rule in (
        ".scroll { overflow: visible",
        "content-visibility: visible",
        "figure { break-inside: avoid",
        "size: A4",
    ):
        assert rule in page.split("<style>")[1] and (rule == "size: A4" or rule in style), rule
    assert "details.data { display: none; }" in style  # raw numbers are no matter for paper
