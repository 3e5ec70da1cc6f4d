"""The page in a real browser: no console message, every figure drawn, nothing wider than the screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qclip.reporting import report
from qclip.results import Results

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,  # starts a browser
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package `chromium`)"),
]

PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe id="page" src="{page}"
style="border:0;width:{width}px;height:4000px"></iframe><script>
document.getElementById("page").onload = function () {{
  var page = this.contentDocument, out = {{}};
  page.querySelectorAll("details").forEach(function (d) {{ d.open = true; }});
  var drawn = function (e) {{ var b = e.getBoundingClientRect(); return b.width > 1 && b.height > 1; }};
  var shown = Array.from(page.querySelectorAll("svg")).filter(function (e) {{ return !e.classList.contains("defs"); }});
  out.width = this.contentWindow.innerWidth;
  out.scroll = page.documentElement.scrollWidth;
  out.svgs = shown.length;
  out.flat = shown.filter(function (e) {{ return !drawn(e); }}).length;
  out.figures = page.querySelectorAll("figure svg").length;
  out.empty = Array.from(page.querySelectorAll("figure svg")).filter(function (e) {{
    return !Array.from(e.querySelectorAll("polyline, rect, circle, polygon")).some(drawn); }}).length;
  out.unnamed = Array.from(page.querySelectorAll("figure svg")).filter(function (e) {{
    return !e.querySelector(":scope > title") || !e.querySelector(":scope > desc"); }}).length;
  out.spill = Array.from(page.querySelectorAll("figure svg text")).filter(function (e) {{
    var t = e.getBoundingClientRect(), s = e.closest("svg").getBoundingClientRect();
    return t.left < s.left - 0.5 || t.right > s.right + 0.5 || t.bottom > s.bottom + 0.5; }}).length;
  out.small = Array.from(page.querySelectorAll("figure svg text")).filter(function (e) {{
    var m = e.getScreenCTM(), size = parseFloat(page.defaultView.getComputedStyle(e).fontSize);
    return Math.hypot(m.a, m.b) * size < 9; }}).length;
  out.touch = shown.filter(function (svg) {{
    var boxes = Array.from(svg.querySelectorAll("text.tick:not([transform]), text.label")).map(function (e) {{
      return e.getBoundingClientRect(); }});
    return boxes.some(function (a, i) {{ return boxes.slice(i + 1).some(function (b) {{
      return a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom; }}); }});
  }}).length;
  out.heads = Array.from(page.querySelectorAll("th")).filter(function (e) {{
    return e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).position !== "absolute"; }}).length;
  out.ink = getComputedStyle(page.body).color;
  out.paper = getComputedStyle(page.body).backgroundColor;
  document.body.setAttribute("data-found", JSON.stringify(out));
}};
</script>"""


# figures without size, without content, without a name; labels that leave theirs, are too small, or touch; heads of
# tables that do not fit their column
WRONG = ("flat", "empty", "unnamed", "spill", "small", "touch", "heads")


def browse(folder: Path, page: Path, *flags: str) -> tuple[str, list[str]]:
    """The document after scripts ran, and what was written to the console."""
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            "--v=0",
            "--window-size=1400,900",
            "--virtual-time-budget=20000",
            *flags,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(folder: Path, page: Path, width: int, *flags: str) -> dict:
    outer = folder / "probe.html"
    outer.write_text(PROBE.format(page=page.as_uri(), width=width))
    document, console = browse(folder, outer, *flags)
    assert console == []
    found = re.search(r'data-found="([^"]*)"', document)
    assert found, "the page did not load"
    return json.loads(found.group(1).replace("&quot;", '"'))


@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_screen(make_results, tmp_path, width: int) -> None:
    found = probe(tmp_path, report(make_results(), tmp_path), width)
    assert found["width"] == width and found["scroll"] <= width
    assert found["figures"] > 60 and found["svgs"] > 240
    assert [found[what] for what in WRONG] == [0] * len(WRONG)


def test_the_page_alone_writes_nothing_to_the_console(make_results, tmp_path) -> None:
    document, console = browse(tmp_path, report(make_results(), tmp_path))
    assert console == [] and "Reliability" in document


def test_dark_and_light_differ_and_both_have_contrast(make_results, tmp_path) -> None:
    page = report(make_results(cohorts=("photos",)), tmp_path)
    light, dark = (probe(tmp_path, page, 390, f"--blink-settings=preferredColorScheme={k}") for k in (1, 0))
    assert luminance(light["paper"]) > 0.8 > 0.2 > luminance(dark["paper"])
    for found in (light, dark):
        a, b = sorted((luminance(found["ink"]), luminance(found["paper"])))
        assert (b + 0.05) / (a + 0.05) > 7


def test_long_and_hostile_names_do_not_widen_the_page(make_results, tmp_path) -> None:
    results = make_results(cohorts=("photos",))
    for row in results.rows:
        if row["model"] == "w8a8":
            row["model"] = "<script>throw 1</script>" + "w" * 90
        if row["set"] == "style-shift":
            row["set"] = "s" * 120
    found = probe(tmp_path, report(results, tmp_path), 390)
    assert found["scroll"] <= 390 and found["flat"] == found["empty"] == 0


def test_an_empty_table_is_a_quiet_page_too(tmp_path) -> None:
    assert probe(tmp_path, report(Results(), tmp_path), 390)["scroll"] <= 390


def test_the_probe_notices_errors(tmp_path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><title>x</title><script>nothing.here()</script>")
    _, console = browse(tmp_path, page)
    assert console and "nothing is not defined" in console[0]


def luminance(colour: str) -> float:
    """WCAG relative luminance of "rgb(r, g, b)"."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


ACT = """<!doctype html><meta charset="utf-8"><body><iframe id="page" src="{page}" style="width:1280px;height:900px">
</iframe><script>
document.getElementById("page").onload = function () {{
  var page = this.contentDocument, out = {{}};
  var table = page.querySelector("table.matrix");
  var rows = function () {{ return Array.from(table.tBodies[0].rows); }};
  var order = function () {{ return rows().map(function (r) {{ return r.dataset.model; }}); }};
  var press = function (k) {{ table.tHead.rows[0].cells[k].querySelector("button").click(); return order(); }};
  out.before = order();
  out.worst = press(1);
  out.best = press(1);
  out.sorted = table.tHead.rows[0].cells[1].getAttribute("aria-sort");
  out.named = press(0);
  var numbers = page.querySelector("#speed, #accuracy").querySelector("table.sortable thead button");
  out.focus = numbers.tabIndex;
  var filter = page.getElementById("filter");
  out.offered = !filter.parentNode.hidden;
  var type = function (text) {{ filter.value = text; filter.dispatchEvent(new Event("input")); }};
  type("GPTQ");
  out.left = rows().filter(function (r) {{ return !r.hidden; }}).length;
  out.said = filter.parentNode.querySelector("output").textContent;
  out.reference = page.querySelector('#accuracy tr[data-model="float"]').hidden;
  type("");
  out.all = page.querySelectorAll("[data-model][hidden]").length;
  document.body.setAttribute("data-found", JSON.stringify(out));
}};
</script>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_twenty_models_fit_a_phone_and_a_screen(make_twenty, tmp_path, width: int) -> None:
    found = probe(tmp_path, report(make_twenty(), tmp_path), width)
    assert found["scroll"] <= width
    assert [found[what] for what in WRONG] == [0] * len(WRONG)


def test_tables_sort_and_models_are_filtered(make_twenty, tmp_path) -> None:
    outer = tmp_path / "act.html"
    outer.write_text(ACT.format(page=report(make_twenty(), tmp_path).as_uri()))
    document, console = browse(tmp_path, outer)
    found = json.loads(re.search(r'data-found="([^"]*)"', document).group(1).replace("&quot;", '"'))
    assert console == [] and found["focus"] == 0 and found["offered"]
    assert found["worst"] != found["before"] and found["worst"][0].startswith("w3a8")
    assert found["best"][-1].startswith("w3a8") and found["sorted"] == "descending"
    assert found["named"][2:6] == ["w3a8-smoothquant", "w4a4", "w4a8", "w4a16-gptq"]  # 4 before 16
    assert (found["left"], found["said"]) == (5, "5 of 19 variants")
    assert found["reference"] is False and found["all"] == 0
