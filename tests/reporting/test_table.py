from __future__ import annotations

import io
import sys
from html import unescape

import pytest

from qclip.reporting import html, table
from qclip.results import Results
from qclip.spectral import verdict


def test_it_fits_and_carries_verdicts_differences_and_intervals(make_results) -> None:
    text = table(make_results())
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text  # not a terminal: no colour codes
    for part in (
        "Against scenes-clean float",
        "Against scenes-noisy float",
        "Covariate shift",
        "✗ ",
        "✓ ",
        "○ ",
        "points [",
        "comparisons",
        "simulated",
        "note: temperatures were fitted",
    ):
        assert part in text, part


def test_spectra_are_judged_in_words_and_numbers(make_results) -> None:
    results = make_results()
    said = verdict(results.rows)
    assert len(said) == 16  # two cohorts, four recipes, two towers
    told, page = " ".join(table(results).split()), unescape(html(results)).replace("\N{NO-BREAK SPACE}", " ")
    assert all(sentence in told and sentence in page for sentence in said)
    assert said[0].startswith("scenes-clean w8a8, vision tower, ranks 64-: ") and "gain 0.99" in said[0]


def test_difference_and_interval_stand_in_the_row() -> None:
    results = Results()
    common = {"set": "cifar", "subset": "all", "metric": "top1"}
    results.add(model="float", value=0.7, **common)
    results.add(model="w4a4", value=0.68, **common)
    results.add(model="w4a4", value=-0.02, low=-0.03, high=-0.01, reference="float", **common)
    text = table(results)
    assert "✗ −2.00" in text and "[−3.00, −1.00]" in text and "70.0 %" in text


def test_many_models_are_split_into_tables_that_fit() -> None:
    results = Results()
    results.add(model="float", set="cifar", subset="all", metric="top1", value=0.7)
    for k in range(9):
        results.add(
            model=f"variant-with-a-long-name-{k}",
            set="cifar",
            subset="all",
            metric="top1",
            value=-0.02,
            low=-0.03,
            high=-0.01,
            reference="float",
        )
    text = table(results)
    assert max(len(line) for line in text.splitlines()) <= 100 and text.count("Against float") == 3


def test_models_that_were_compared_with_nothing_are_shown_as_they_are() -> None:
    results = Results(notes=["why"])
    results.add(model="only", set="cifar", subset="all", metric="top1", value=0.7, low=0.6, high=0.8, n=100)
    text = table(results)
    assert "70.0 %" in text and "[60.0, 80.0]" in text and "note: why" in text and "Against" not in text


def test_an_empty_table_says_so() -> None:
    assert "empty" in table(Results())


def test_markup_in_a_name_is_text() -> None:
    results = Results(notes=["[bold]n[/bold]"])
    name = "[red]x[/red] [/]"
    results.add(model=name, set="[b]s", subset="all", metric="top1", value=0.1, low=0, high=0.2, reference="[i]float")
    results.add(model=name, metric="model_bytes", value=1e6)
    text = table(results)
    assert "[i]float" in text and "[bold]n[/bold]" in text and "[red]x" in text


class Ascii(io.StringIO):
    encoding = "ascii"


def test_plain_signs_where_stdout_cannot_print_ours(make_results, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", Ascii())
    text = table(make_results())
    text.encode("ascii")
    assert "+ better, x worse, o no difference shown" in text and "?" not in text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("forbidden", [False, True])
def test_colour_on_a_terminal_only_where_wanted(make_results, monkeypatch, forbidden: bool) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", "1" if forbidden else "")
    assert ("\x1b[" in table(make_results())) is not forbidden
