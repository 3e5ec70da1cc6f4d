from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from qclip.errors import InputError, OutputExistsError
from qclip.reporting import html, report
from qclip.reporting.index import Index
from qclip.results import Results

HOSTILE = '<script>alert("x")</script>&"\'</style>'


class Structure(HTMLParser):
    """Checks that tags nest, and collects elements and what they link to."""

    VOID = {"meta", "link", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        linking = ("href", "src", "xlink:href", "srcset", "action")
        self.links += [value or "" for name, value in attrs if name in linking]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"


def parsed(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    return structure


def test_a_whole_page_is_well_formed_and_self_contained(make_results) -> None:
    page = html(make_results())
    structure = parsed(page)
    assert all(link.startswith(("#", "data:")) for link in structure.links)
    assert {link[1:] for link in structure.links if link.startswith("#")} <= set(structure.ids)
    assert len(structure.ids) == len(set(structure.ids))
    assert not re.search(r"https?:|//cdn|@import|url\((?!#)", page)
    assert structure.tags.count("script") == 1  # ours, for print
    for part in (
        "Reliability of scenes-clean and scenes-noisy",
        "An ordinary CPU",
        "qclip demo",
        "torch 2.14.1",
        "scenes-test (2,000)",
        "temperatures were fitted",
    ):
        assert part in re.sub(r"</?span>", "", page), part


def test_every_section_has_its_figures(make_results) -> None:
    page = html(make_results(cohorts=("photos",)))
    wanted = {"accuracy": 6, "shift": 6, "ood": 2, "corruptions": 2, "spectra": 32, "coverage": 2, "speed": 2}
    for section, figures in wanted.items():
        body = page.split(f'<section id="{section}">')[1].split("</section>")[0]
        assert body.count("<figure>") == figures, section


def test_verdicts_are_words_and_symbols_beside_their_numbers() -> None:
    results = Results()
    common = {"set": "cifar", "subset": "all", "metric": "top1", "n": 1000}
    for model, value in (("float", 0.7), ("w8a8", 0.699), ("w4a4", 0.68)):
        results.add(model=model, value=value, **common)
    results.add(model="w8a8", value=-0.001, low=-0.003, high=0.001, reference="float", **common)
    results.add(model="w4a4", value=-0.02, low=-0.03, high=-0.01, reference="float", **common)
    page = html(results)
    cells = re.findall(r'<td data-label="(\w+)" data-model="\w+"><div class="answer">(.*?)</div></td>', page, re.S)
    told = {model: re.sub(r"<[^>]+>|\s+", " ", cell) for model, cell in cells}
    assert "○ no difference shown" in re.sub(r"\s+", " ", told["w8a8"]) and "[−0.30, +0.10]" in told["w8a8"]
    assert "✗ worse" in re.sub(r"\s+", " ", told["w4a4"]) and "[−3.00, −1.00]" in told["w4a4"]
    # the parts that were not measured are left out with one sentence each
    assert "No OOD set was given" in page and "Weight spectra were not computed" in page and "<figure>" not in page


def test_an_empty_table_makes_a_page() -> None:
    page = html(Results(notes=["nothing ran"]))
    parsed(page)
    assert "holds no rows" in page and "nothing ran" in page and "<figure>" not in page


def test_a_single_model_has_no_verdict_but_numbers() -> None:
    results = Results()
    results.add(model="only", set="cifar", subset="all", metric="top1", value=0.7, low=0.6, high=0.8, n=100)
    page = html(results)
    parsed(page)
    assert "no pair of models" in page and "[60.0, 80.0]" in page


def test_hostile_names_are_text(make_results) -> None:
    results = make_results(cohorts=("photos",))
    for row in (*results.rows, *results.curves):
        for column in ("model", "source", "recipe", "set", "host", "reference"):
            if row.get(column, "") not in ("", "white", "vision", "text"):
                row[column] += HOSTILE
        if row["axis"] == "group":
            row["at"] += HOSTILE
    results.notes.append(HOSTILE)
    results.meta.update(command=HOSTILE, cpu=HOSTILE, versions={HOSTILE: HOSTILE}, created=HOSTILE)
    page = html(results)
    assert parsed(page).tags.count("script") == 1
    assert "alert(" in page and "<script>alert" not in page and page.count("</style>") == 1


def test_undefined_and_infinite_values_are_shown_as_such(make_results) -> None:
    results = make_results(cohorts=("photos",))
    for k, row in enumerate(results.rows):
        if k % 3 == 0:
            row["value"] = row["low"] = row["high"] = None
        elif k % 7 == 0:
            row["value"], row["high"] = float("inf"), float("inf")
    for curve in results.curves:
        for column in curve["points"].values():
            column[1::5] = [None] * len(column[1::5])
            column[2::5] = [float("inf")] * len(column[2::5])
    page = html(results)
    parsed(page)
    assert not re.search(r'="(nan|inf|-inf)', page) and ">nan" not in page and "None" not in page


def test_a_huge_table_is_bounded_and_quick() -> None:
    """Figures stop at a number, and work grows as the table does; it is counted in calls, not in seconds."""
    half, whole = huge(30, 150), huge(60, 300)
    assert len(whole.rows) + len(whole.curves) > 1.9 * (len(half.rows) + len(half.curves))
    html(half)  # what is made once is there
    (_, fewer), (page, more) = counted(lambda: html(half)), counted(lambda: html(whole))
    assert more < 2.03 * fewer, "the work grows faster than the table"
    assert page.count("<figure") < 100 and len(page) < 2e6
    parsed(page)
    assert "further figures of this kind are left out" in page


def counted(work: Callable[[], str]) -> tuple[str, int]:
    """What it gives, and how many functions it called, of Python and of C."""
    calls = 0

    def count(_frame: Any, event: str, _what: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        return work(), calls
    finally:
        sys.setprofile(before)


def huge(variants: int, sites: int) -> Results:
    results = Results()
    models = [f"variant {k}" for k in range(variants)]
    for name in ("a", "b"):
        for model in ["float", *models]:
            common = {"model": model, "set": name, "n": 100}
            for metric in ("top1", "ece", "nll"):
                results.add(metric=metric, value=0.5, low=0.4, high=0.6, **common)
                if model != "float":
                    results.add(metric=metric, value=0.0, low=-0.1, high=0.1, reference="float", **common)
            ones = dict.fromkeys(("accuracy", "confidence", "count"), [1.0] * 15)
            results.add_curve({"bin": range(15)} | ones, metric="reliability", **common)
    for model in models[:4]:
        for site in range(sites):
            common = {"model": model, "set": f"vision.blocks.{site}.q"}
            points = {"rank": range(24), "value": range(1, 25)}
            results.add_curve(points, metric="singular_values", role="site", **common)
            results.add(metric="site_macs", role="site", axis="state", at="real", value=10, n=10, **common)
    return results


def test_writing_refuses_replaces_and_stays_whole(make_results, tmp_path, monkeypatch) -> None:
    results = Results(notes=["first"])
    target = report(results, tmp_path)  # a folder gets report.html
    assert target == tmp_path / "report.html" and "first" in target.read_text()
    with pytest.raises(OutputExistsError, match="report.html' exists already"):
        report(Results(notes=["second"]), tmp_path / "report.html")
    assert "first" in target.read_text()
    assert report(Results(notes=["second"]), str(target), force=True) == target and "second" in target.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report(Results(notes=["third"]), target, force=True)
    assert "second" in target.read_text() and list(tmp_path.iterdir()) == [target]


def test_the_public_name_is_a_function_whatever_was_imported_first(tmp_path) -> None:
    import qclip
    import qclip.reporting.page

    assert "empty" in qclip.table(Results())
    assert qclip.report(Results(), tmp_path / "page.html", force=True).is_file()


def test_new_folders_are_made_and_impossible_ones_refused(tmp_path) -> None:
    assert report(Results(), tmp_path / "new" / "page.html").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        report(Results(), tmp_path / "file" / "page.html")


def test_the_page_is_the_same_from_json(make_results, tmp_path) -> None:
    results = make_results()
    again = Results.from_json(results.to_json(tmp_path / "results.json"))
    assert html(again) == html(results)


def test_sets_are_told_apart_by_what_was_done_with_them(make_results) -> None:
    index = Index(make_results())
    assert index.id_sets == ["scenes-test"] and index.shift_sets == ["style-shift"]
    assert index.spurious_sets == ["spurious-test"] and index.ood_sets == [("near-ood", "near"), ("far-ood", "far")]
    assert index.corrupted == [("scenes-test", "gaussian_noise")]
    assert [cohort.reference for cohort in index.cohorts] == ["scenes-clean float", "scenes-noisy float"]
    assert index.cohorts[0].short("scenes-clean w8a8") == "w8a8"


def test_a_key_that_repeats_is_said(make_results) -> None:
    results = make_results(cohorts=("photos",))
    results.rows.append(dict(results.rows[0]))
    assert "1 rows repeat the key" in html(results)


def test_a_section_of_another_package_stands_in_the_page(make_results) -> None:
    """One file outside the package: what it asks is judged, what it draws and says is shown."""
    from markupsafe import Markup

    from qclip.reporting.parts import Cell, Figure, Table, panel
    from qclip.reporting.sections import SECTIONS, Section
    from qclip.reporting.verdicts import Question

    class Patience(Section):
        name, title = "patience", "Patience"
        intro, absent = "How long it waits.", "Nobody waited."

        def questions(self, index):
            return [Question("Patience", "patience", name, leading=True) for name in index.id_sets]

        def panels(self, index):
            return panel("Waiting", [Figure("drawn by another package", Markup("<svg></svg>"))])

        def tables(self, index):
            rows = [[Cell(r["model"]), Cell(f"{r['value']:g}")] for r in index.rows("patience") if not r["reference"]]
            return [Table("Seconds", [Cell("Model"), Cell("Seconds")], rows)]

        def about(self, index, cohort, model, answers):
            return [f"Patience of {model} was looked at."]

    results = make_results(cohorts=("photos",))
    reference, variant = Index(results).cohorts[0].models[:2]
    assert "patience" not in html(results)
    common = {"set": "scenes-test", "role": "id", "metric": "patience"}
    results.add(model=variant, value=0.5, **common)
    results.add(model=variant, value=0.25, low=0.1, high=0.4, reference=reference, **common)
    SECTIONS.register(Patience)
    try:
        page = html(results)
    finally:
        SECTIONS.unregister("patience")
    parsed(page)
    for part in ('<section id="patience">', '<a href="#patience">Patience</a>', "drawn by another package", "Seconds"):
        assert part in page, part
    assert f"Patience of {variant} was looked at." in page and "+0.2500" in page
