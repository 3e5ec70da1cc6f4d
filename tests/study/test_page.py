"""The page shows every variant's difference and leads to its reliability page, which is that of `qclip evaluate`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qclip
from qclip.errors import InputError
from qclip.reporting import units
from qclip.study import page
from qclip.study.run import Ready
from qclip.study.tables import find
from tests.reporting.test_browser import CHROMIUM, WRONG, probe
from tests.study.small import DATA, OOD, Told


@pytest.fixture(scope="session")
def written(small: tuple[Ready, Told], tmp_path_factory: pytest.TempPathFactory) -> Path:
    ready, folder = small[0], tmp_path_factory.mktemp("page") / "out"
    assert page.write(ready.grid, ready.store, folder) == (folder, 3)
    return folder


def test_each_variant_stands_under_its_bits_and_leads_to_its_page(written: Path, small: tuple[Ready, Told]) -> None:
    text = (written / page.FILE).read_text()
    links = set(re.findall(r'href="([^#"]+\.html)"', text))
    assert len(links) == 2 and all((written / name).is_file() for name in links)
    assert len(list(written.iterdir())) == 4
    for line in find(small[0].grid, small[0].store).lines:
        if line["variant"] != "float" and not line["corruption"] and line["metric"] in ("top1", "ece", "auroc"):
            assert f">{units.metric(line['metric']).difference(line['difference'])}</a>" in text
    assert '<th scope="col">8/8</th><th scope="col">4/8</th>' in text and text.count("<figure>") == 3
    assert "<span>float</span>" in text and "<span>rtn</span>" in text  # what the marks mean


def test_a_variant_s_page_is_that_of_evaluate(small: tuple[Ready, Told]) -> None:
    ready = small[0]
    found = page.variant_results(ready.grid, ready.store, ready.grid.blocks[1], ready.work.runtime)
    assert found is not None and found.unique("model") == ["float", "w8a8"]
    model = qclip.load_model("scenes-clean")
    group = {"float": model, "w8a8": qclip.quantize(model, "w8a8")}
    said = {"scores": ["mcm"], "measurements": ["clean", "ood", "corrupted"], "replicates": 50, "batch": 32}
    whole = qclip.evaluate(group, DATA, {"far": [OOD]}, severities=[3], cache=False, **said)  # type: ignore[arg-type]
    assert len(found) == len([row for row in whole.rows if not row["metric"].startswith("wins")])
    assert {(c["model"], c["metric"]) for c in found.curves} == {(c["model"], c["metric"]) for c in whole.curves}
    where = {"model": "w8a8", "metric": "coverage_macs", "axis": "state", "at": "real"}
    assert found.value(**where) == whole.value(**where)


def test_a_set_of_pages_is_not_replaced_unasked(written: Path) -> None:
    with pytest.raises(InputError, match="not empty"):
        page.check_output(written)
    page.check_output(written, force=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package `chromium`)")
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_whole_in_a_browser(width: int, written: Path, tmp_path: Path) -> None:
    seen = probe(tmp_path, written / page.FILE, width)
    assert [name for name in WRONG if seen[name]] == [] and seen["scroll"] <= width and seen["figures"] == 3
