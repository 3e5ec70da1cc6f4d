from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from qclip.reporting import svg


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.97, 1.03, [0.98, 1.0, 1.02]), (-3, 7, [-2, 0, 2, 4, 6]), (5, 5, [5])],
)
def test_ticks_are_round_and_inside(low, high, wanted) -> None:
    assert svg.nice_ticks(low, high) == pytest.approx(wanted)


def test_scales_map_corners_to_the_frame() -> None:
    axes = svg.Axes("t", "d", (0, 10), (1, 100), log_y=True, width=200, height=100, left=40, right=10, top=5, bottom=15)
    assert (axes.at_x(0), axes.at_x(10), axes.at_x(5)) == (40, 190, 115)
    assert (axes.at_y(1), axes.at_y(100), axes.at_y(10)) == (85, 5, 45)
    assert axes.at_y(1e9) == 5  # outside is drawn at the edge, not across the page


def test_everything_written_is_escaped_well_formed_and_described() -> None:
    axes = svg.Axes("<b>&", "\"'", (0, 1), (0, 1), x_label="<x>", y_label="y")
    axes.line([(0, 0), (1, 1)], 0)
    axes.mark(0.5, 0.5, 3, "<tip>")
    axes.whisker(0.5, 0.4, 0.6, 9)
    axes.bar(0, 0.5, 0, 0.5, "hit", "a & b")
    axes.guide((0, 0), (1, 1))
    root = ET.fromstring(axes.render())
    assert [child.tag for child in root][:2] == ["title", "desc"] and root[0].text == "<b>&"
    assert root.attrib["viewBox"] == "0 0 360 270" and "width" not in root.attrib  # it scales
    assert {"<x>", "y"} <= {e.text for e in root.iter("text")}
    assert {e.text for e in root.iter("title")} == {"<b>&", "<tip>", "a & b"}


def test_points_that_are_not_finite_break_a_line_and_draw_no_mark() -> None:
    axes = svg.Axes("t", "d", (0, 5), (0, 1))
    axes.line([(0, 0), (1, 1), (2, float("nan")), (3, 0), (4, 1), (5, float("inf"))], 1)
    axes.mark(1, float("nan"), 0)
    axes.whisker(1, None, 1, 0)
    root = ET.fromstring(axes.render())
    assert [len(e.attrib["points"].split()) for e in root.iter("polyline")] == [2, 2]
    assert not list(root.iter("circle")) and "nan" not in axes.render()


def test_each_series_has_its_own_marker() -> None:
    shapes = {svg.marker(0, 0, k).replace(f"s{k}", "") for k in range(svg.SERIES)}
    assert len(shapes) == svg.SERIES


def test_an_interval_bar_puts_zero_in_the_middle() -> None:
    root = ET.fromstring(svg.interval_bar(0.5, 0.0, 1.0, 1.0, "better"))
    reach = next(e for e in root.iter("rect"))
    assert float(reach.attrib["x"]) == 60 and float(reach.attrib["x"]) + float(reach.attrib["width"]) == 115
    assert svg.interval_bar(None, 0, 1, 1, "open") == "" and svg.interval_bar(0, 0, 0, 0, "open") == ""


def test_padded_range() -> None:
    low, high = svg.padded([0.2, None, float("nan"), 0.8], floor=0, ceiling=0.82)
    assert low == pytest.approx(0.164) and high == 0.82
    assert svg.padded([]) == (0.0, 1.0)
    low, high = svg.padded([0.0, 0.0])
    assert low < high


def test_attributes_are_escaped_and_absent_ones_left_out() -> None:
    made = svg.element("g", id='"><x>', transform=None, stroke_width=1.25)
    assert ET.fromstring(made).attrib == {"id": '"><x>', "stroke-width": "1.25"}


def test_labels_that_would_touch_are_slanted() -> None:
    def drawn(names: list[str], width: float = 360) -> svg.Axes:
        places = range(len(names))
        return svg.Axes(
            "t", "d", (-0.5, len(names) - 0.5), (0, 1), width=width, x_ticks=places, x_text=lambda k: names[k]
        )

    short, long = drawn(["a", "b", "c"]), drawn(["white", "white layer", "uniform", "shuffled", "shrink", "truncated"])
    assert "rotate(-35" not in short.render() and short.height == 270
    assert long.render().count("rotate(-35") == 6
    grown = drawn(["white", "w" * 40, "uniform", "shuffled", "shrink", "truncated"])
    assert grown.height > long.height > 270  # by what the longest label needs
    assert "rotate(-35" not in drawn(["white", "white layer", "uniform"], 900).render()


def test_long_labels_of_y_have_room() -> None:
    def left(top: float) -> float:
        return svg.Axes("t", "d", (0, 1), (0.9997, top), y_label="gain").left

    assert left(5) == 50 and 60 < left(1.0001) < 90
