"""The page shows every variant's difference and leads to its reliability page, which is that of `qclip evaluate`."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

import qclip
from benchmarks.study_report import PLAN, synthetic
from qclip.artifact import bytes_of
from qclip.errors import InputError
from qclip.reporting import units
from qclip.study import page
from qclip.study.found import find
from qclip.study.run import Ready
from tests.reporting.test_browser import CHROMIUM, WRONG, browse, probe
from tests.study.small import DATA, OOD, Told


@pytest.fixture(scope="session")
def written(small: tuple[Ready, Told], tmp_path_factory: pytest.TempPathFactory) -> Path:
    ready, folder = small[0], tmp_path_factory.mktemp("page") / "out"
    assert page.write(ready.grid, ready.store, folder) == (folder, 3)
    return folder


def data_of(folder: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', (folder / page.FILE).read_text(), re.S
    )
    assert found is not None
    return json.loads(found[1])


def test_each_variant_has_its_difference_its_cost_and_its_page(written: Path, small: tuple[Ready, Told]) -> None:
    ready, data = small[0], data_of(written)
    (part,) = data["parts"]
    assert part["title"] == f"scenes-clean on {DATA}" and len(list(written.iterdir())) == 4
    assert [(v["name"], v["method"], v["bits"]) for v in part["variants"]] == [
        ("float", "float", ""),
        ("w8a8", "rtn", "8/8"),
        ("w4a8", "rtn", "4/8"),
    ]
    assert all((written / v["page"]).is_file() and not v["lost"] for v in part["variants"])
    places = {"id": "id", "ood-far": "on scenes-far-ood"}
    shown = 0
    for line in find(ready.grid, ready.store).lines:
        if line["variant"] != "float" and not line["corruption"]:
            at = [v["name"] for v in part["variants"]].index(line["variant"])
            cell = part["cells"][f"{line['metric']}|{places[line['role']]}"][at]
            assert cell[1] == units.metric(line["metric"]).difference(line["difference"])
            assert cell[0] == pytest.approx(100 * line["value"], abs=1e-5)
            shown += 1
    assert shown == 6
    noisy = {line["variant"]: line for line in find(ready.grid, ready.store).lines if line["metric"] == "mean_top1"}
    assert part["cells"]["top1|under gaussian_noise"][1][0] == pytest.approx(100 * noisy["w8a8"]["value"], abs=1e-5)
    sizes = [bytes_of(f) for f in (ready.store.folder / "artifacts").iterdir()]
    assert sorted(v["size"] * 1e6 for v in part["variants"][1:]) == pytest.approx(sorted(sizes))
    assert part["variants"][0]["size"] * 1e6 == ready.grid.facts.bytes["scenes-clean"]
    assert data["places"]["under gaussian_noise"]["label"].startswith("Gaussian noise")


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


def test_no_name_ends_the_script_that_it_stands_in(written: Path, small: tuple[Ready, Told]) -> None:
    found = find(small[0].grid, small[0].store)
    shown = data_of(written)
    shown["parts"][0]["variants"][1]["name"] = "</script><script>throw 1</script>"
    text = page.index(found, shown)
    assert "</script><script>throw" not in text
    assert text.count("</script>") == (written / page.FILE).read_text().count("</script>")


FEW = PLAN.replace('["rtn", "smoothquant", "repq-vit", "gptq", "awq", "rotation", "svdquant"]', '["rtn", "gptq"]')

ASKED = """<!doctype html><meta charset="utf-8"><body><iframe id="page" src="{page}" width="1280" height="900"></iframe>
<script>
document.getElementById("page").onload = function () {{
  var page = this.contentDocument, out = {{}};
  var pick = function (id, value) {{
    var control = page.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("change"));
  }};
  var texts = function (what) {{
    return Array.from(page.querySelectorAll(what)).map(function (e) {{ return e.textContent.trim(); }});
  }};
  var cells = function () {{ return texts("#heats table.heat td"); }};
  var labels = function () {{ return texts("#plots svg text.label"); }};
  out.first = cells();
  out.panels = page.querySelectorAll("#heats h3").length;
  out.small = texts("table.heat.small b");
  out.marks = page.querySelectorAll("#plots g[data-of]").length;
  out.labels = labels();
  pick("metric", "auroc");
  out.auroc = cells();
  out.places = Array.from(page.querySelectorAll("#place option")).map(function (e) {{ return e.value; }});
  pick("metric", "top1");
  pick("place", "under fog");
  out.fog = cells();
  pick("against", "time");
  out.timed = labels();
  out.hash = this.contentWindow.location.hash;
  page.querySelector("table.heat [data-of]").dispatchEvent(new Event("pointerover", {{ bubbles: true }}));
  out.on = Array.from(page.querySelectorAll(".on")).map(function (e) {{ return e.tagName.toLowerCase(); }});
  document.body.setAttribute("data-found", JSON.stringify(out));
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package `chromium`)")
def test_what_is_picked_is_drawn(tmp_path: Path) -> None:
    grid, store = synthetic(tmp_path, FEW)
    folder, _ = page.write(grid, store, tmp_path / "out", pages=False)
    data = data_of(folder)
    (tmp_path / "ask.html").write_text(ASKED.format(page=(folder / page.FILE).as_uri()))
    document, console = browse(tmp_path, tmp_path / "ask.html")
    assert console == []
    found = re.search(r'data-found="([^"]*)"', document)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))

    def expected(key: str) -> list[str]:
        return sorted(cell[1] for part in data["parts"] for cell in part["cells"][key][1:])

    assert sorted(filter(None, seen["first"])) == expected("top1|id") and seen["panels"] == 3
    assert sorted(seen["small"]) == sorted(c[2] for part in data["parts"] for c in part["cells"]["top1|id"][1:])
    assert sorted(filter(None, seen["auroc"])) == expected("auroc|on scenes-near-ood")
    assert sorted(filter(None, seen["fog"])) == expected("top1|under fog")
    assert seen["places"] == ["on scenes-near-ood", "on scenes-far-ood", "ood-mean"]
    assert seen["marks"] == sum(len(part["variants"]) for part in data["parts"])
    assert seen["labels"][0] == "Size of what is shipped (MB)" and seen["timed"][0] == "Time for one image (ms)"
    assert seen["hash"] == "#metric=top1&place=under+fog&against=time" and sorted(seen["on"]) == ["g", "span", "span"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package `chromium`)")
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_whole_in_a_browser(width: int, written: Path, tmp_path: Path) -> None:
    seen = probe(tmp_path, written / page.FILE, width)
    assert [name for name in WRONG if seen[name]] == [] and seen["scroll"] <= width and seen["figures"] == 1
