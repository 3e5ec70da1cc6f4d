"""The sections on features and on controls through the model, from rows as `qclip.spectral` writes them."""

from __future__ import annotations

from html import unescape

from qclip.reporting import html
from qclip.reporting.index import Index
from qclip.reporting.sections.features import FeaturesSection
from qclip.reporting.sections.interventions import InterventionsSection
from qclip.reporting.sections.spectra import SpectraSection
from qclip.results import Results

IMAGES = {"set": "cifar", "role": "id", "n": 100}


def spectra() -> Results:
    results = Results()
    for model in ("float", "w4a8"):
        for at, band in ((0, "ranks 0-8"), (8, "ranks 8-64")):
            where = IMAGES | {"model": model, "axis": "band", "at": at, "subset": band}
            results.add(**where, metric="band_energy", value=0.5)
            for metric in ("band_top1", "band_top1_own", "band_top1_random", "band_top1_energy"):
                results.add(**where, metric=metric, value=0.625, low=0.6, high=0.65)
            if model == "w4a8":
                results.add(**where, metric="gain", value=0.99, low=0.98, high=1.0)
        common = IMAGES | {"model": model}
        results.add_curve({"rank": [0, 1], "value": [0.7, 1.0]}, **common, metric="energy_cdf")
        block = {"axis": "block", "at": "vision.blocks.1"}
        results.add_curve({"frequency": [0, 1], "value": [0.0, -2.0]}, **common, **block, metric="fourier_radial")
        points = {"u": [-0.5, -0.5, 0, 0], "v": [-0.5, 0, -0.5, 0], "value": [0.0, 1.0, 2.0, 4.0]}
        results.add_curve(points, **common, metric="fourier_map")
        for at in (1, 16):
            where = common | {"axis": "cycles", "at": at}
            results.add(**where, metric="grating_response", value=0.1, low=0.05, high=0.2)
        results.add(**common, metric="top1", value=0.5, low=0.4, high=0.6)
    results.add(**IMAGES, model="w4a8", metric="top1", value=-0.1, low=-0.2, high=0, reference="float")
    return results


def test_each_figure_has_its_numbers() -> None:
    index = Index(spectra())
    figures = {figure.title: str(figure.svg) for panel in FeaturesSection().panels(index) for figure in panel.figures}
    assert set(figures) == {
        "cifar: gain by rank band",
        "cifar: top-1 (%) by rank band",
        "cifar: energy up to a rank",
        "cifar: vision.blocks.1",
        "cifar: 1 - cosine under a grating",
        "float, cifar",
        "w4a8, cifar",
    }
    assert "w4a8, 8–64: 0.99" in figures["cifar: gain by rank band"]
    assert figures["cifar: gain by rank band"].count('class="whisker') == 2
    assert "w4a8, 8–64: 62.5" in figures["cifar: top-1 (%) by rank band"]
    cells = figures["w4a8, cifar"]
    assert cells.count("<rect") == 4 and 'fill-opacity="0.25"' in cells and "0, 0 cycles per patch: 4" in cells
    (table,) = FeaturesSection().tables(index)
    assert [cell.text for cell in table.rows[0]] == ["float", *["62.5 %"] * 4]


def test_controls_stand_below_the_quantized_model() -> None:
    results = spectra()
    where = IMAGES | {"model": "w4a8", "metric": "top1"}
    for axis, at, value in (("control", "white_layer", 0.41), ("intervention", "weights", 0.52), ("filter", 1.0, 0.2)):
        results.add(**where, axis=axis, at=at, value=value, low=value - 0.1, high=value + 0.1)
    results.add(**where, value=0.09, low=0.0, high=0.2, reference="white_layer")
    index = Index(results)
    (table,) = InterventionsSection().tables(index)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["w4a8", "itself", "50.0 %"],
        ["w4a8", "white layer", "41.0 %"],
        ["w4a8", "weights", "52.0 %"],
    ]
    (panel,) = InterventionsSection().panels(index)
    assert "w4a8, 100 %: 20" in str(panel.figures[0].svg) and "Top-1 accuracy (%)" in str(panel.figures[0].svg)
    assert [cohort.reference for cohort in index.cohorts] == ["float"]  # a control is no model
    page = unescape(html(results))
    assert "A filter by hand" in page and "white layer" in page and "No control ran" not in page


def test_level_and_shape_stand_beside_each_control() -> None:
    results = Results()
    where = {"model": "w4a8", "set": "vision", "role": "tower", "n": 38}
    for metric, value in (("level", 0.997), ("shape", -0.02)):
        results.add(**where, metric=metric, value=value, low=value - 0.001, high=value + 0.001)
        for k, control in enumerate(("white", "white_layer")):
            other = {"value": 1.0 - k / 100, "low": 0.9, "high": 1.1}
            results.add(**where, metric=metric, axis="control", at=control, **other)
    (panel,) = SpectraSection().panels(Index(results))
    figures = {figure.title: str(figure.svg) for figure in panel.figures}
    assert set(figures) == {"vision tower: level", "vision tower: shape"}
    level = figures["vision tower: level"]
    assert "w4a8, model: 0.997" in level and "w4a8, white: 1" in level and "w4a8, white layer: 0.99" in level
    assert level.count('class="whisker') == 3 and "w4a8, model: -0.02" in figures["vision tower: shape"]
