"""A small plotting module: axes, lines, bars and interval marks as SVG text that scales and follows the page's colours.

Nothing here knows about results. Colours are CSS classes (`s0` .. `s7`), so that light, dark and print differ in one
place; a series also has its own dash and marker, so that colour is never the only difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

SERIES = 8
TICK = 7.2  # units that a letter or digit of a tick's label takes
SLANT = math.radians(35)  # of labels that would touch
Point = tuple[float, float]


def finite(*numbers: float | None) -> bool:
    return all(n is not None and math.isfinite(n) for n in numbers)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(
    values: Iterable[float | None], share: float = 0.06, floor: float = -math.inf, ceiling: float = math.inf
) -> tuple[float, float]:
    """The range of the finite values, a little wider, within [floor, ceiling]; (0, 1) where there are none."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    room = (high - low) * share or abs(high) * share or 0.5
    return max(floor, low - room), min(ceiling, high + room)


def element(name: str, content: str = "", **attributes: object) -> Markup:
    """One SVG element; `content` is markup already. `class_` becomes class, `_` in a name becomes `-`."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value not in (None, "")
    )
    return Markup(f"<{name}{shown}>{content}</{name}>" if content else f"<{name}{shown}/>")


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "", **more: object) -> Markup:
    return element("text", escape(content), x=x, y=y, class_=class_, text_anchor=anchor, **more)


def document(width: float, height: float, title: str, description: str, body: Iterable[Markup]) -> Markup:
    """A whole `<svg>` with a viewBox (it scales with the page), its title and description for screen readers."""
    head = element("title", escape(title)) + element("desc", escape(description))
    return element("svg", head + Markup("").join(body), viewBox=f"0 0 {width:g} {height:g}", role="img")


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


class Axes:
    """A frame with two scales, into which marks are drawn in data coordinates.

    x, y: the data ranges. log_y: decades on the y axis (the range must be above 0). x_ticks, y_ticks: positions, or
    None for round numbers. x_text, y_text: how a tick is printed. Labels of x that would touch are slanted, and the
    figure grows downwards by what they need; `left` is the least room for those of y.
    """

    def __init__(
        self,
        title: str,
        description: str,
        x: Point,
        y: Point,
        *,
        x_label: str = "",
        y_label: str = "",
        width: float = 360,
        height: float = 270,
        log_y: bool = False,
        x_ticks: Sequence[float] | None = None,
        y_ticks: Sequence[float] | None = None,
        x_text: Callable[[float], str] | None = None,
        y_text: Callable[[float], str] | None = None,
        left: float = 50,
        right: float = 12,
        top: float = 10,
        bottom: float = 44,
    ) -> None:
        self.title, self.description = title, description
        self.width, self.height = width, height
        self.x_range, self.y_range, self.log_y = _spread(x), _spread(y), log_y
        if y_ticks is None:
            y_ticks = _decades(*self.y_range) if log_y else nice_ticks(*self.y_range)
        up = [(tick, (y_text or (_power if log_y else _plain))(tick)) for tick in y_ticks]
        needed = max((_wide(label) for _, label in up), default=0.0) + (32 if y_label else 12)
        self.left, self.right, self.top, self.bottom = max(left, needed), width - right, top, height - bottom
        self._body: list[Markup] = []
        ticks = nice_ticks(*self.x_range) if x_ticks is None else x_ticks
        shown = [(self.at_x(tick), (x_text or _plain)(tick)) for tick in ticks]
        self._slanted = _touch(shown)
        if self._slanted:
            self.height += max(_wide(label) for _, label in shown) * math.sin(SLANT) - 6
        self._frame(x_label, y_label, shown, up)

    def at_x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def at_y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        value = min(max(value, low), high)
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def _frame(
        self,
        x_label: str,
        y_label: str,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
    ) -> None:
        for tick, label in y_ticks:
            y = self.at_y(tick)
            self._body.append(element("line", x1=self.left, x2=self.right, y1=y, y2=y, class_="grid"))
            self._body.append(text(self.left - 7, y + 3.8, label, "tick", "end"))
        for x, label in x_ticks:
            self._body.append(element("line", x1=x, x2=x, y1=self.bottom, y2=self.bottom + 4, class_="axis"))
            if self._slanted:
                turn = f"rotate({-math.degrees(SLANT):g} {x + 4:.1f} {self.bottom + 13:g})"
                self._body.append(text(x + 4, self.bottom + 13, label, "tick", "end", transform=turn))
            else:
                self._body.append(text(x, self.bottom + 17, label, "tick", "middle"))
        self._body.append(element("line", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom, class_="axis"))
        if x_label:
            self._body.append(text((self.left + self.right) / 2, self.height - 6, x_label, "label", "middle"))
        if y_label:
            x, y = 12, (self.top + self.bottom) / 2
            self._body.append(text(x, y, y_label, "label", "middle", transform=f"rotate(-90 {x} {y:g})"))

    def line(self, points: Sequence[Point], series: int, class_: str = "") -> None:
        """A polyline; a point that is not finite breaks it."""
        run: list[str] = []
        for x, y in [*points, (math.nan, math.nan)]:
            if finite(x, y):
                run.append(f"{self.at_x(x):.1f},{self.at_y(y):.1f}")
            elif run:
                if len(run) > 1:
                    look = f"line s{series % SERIES} {class_}".strip()
                    self._body.append(element("polyline", points=" ".join(run), class_=look))
                run = []

    def guide(self, start: Point, end: Point) -> None:
        """A dashed grey line that means something fixed: chance, equality, zero."""
        (x1, y1), (x2, y2) = start, end
        self._body.append(
            element("line", x1=self.at_x(x1), y1=self.at_y(y1), x2=self.at_x(x2), y2=self.at_y(y2), class_="guide")
        )

    def arrow(self, start: Point, end: Point, series: int, head: bool = True) -> None:
        """A straight way between two places, with a head at its end."""
        if not finite(*start, *end):
            return
        (x1, y1), (x2, y2) = ((self.at_x(x), self.at_y(y)) for x, y in (start, end))
        self._body.append(element("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=f"way s{series % SERIES}"))
        long = math.hypot(x2 - x1, y2 - y1)
        if head and long > 14:  # room for it before the mark
            dx, dy = (x2 - x1) / long, (y2 - y1) / long
            tip = x2 - 5 * dx, y2 - 5 * dy
            sides = [(tip[0] - 7 * dx + s * 3.5 * dy, tip[1] - 7 * dy - s * 3.5 * dx) for s in (1, -1)]
            shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in (tip, *sides))
            self._body.append(element("polygon", points=shape, class_=f"head s{series % SERIES}"))

    def mark(self, x: float, y: float, series: int, tip: str = "", size: float = 3.6) -> None:
        """The series' own marker, with a tooltip."""
        if finite(x, y):
            self._body.append(marker(self.at_x(x), self.at_y(y), series, size, tip))

    def whisker(self, x: float, low: float | None, high: float | None, series: int) -> None:
        """A vertical interval."""
        if finite(x, low, high):
            at = self.at_x(x)
            self._body.append(
                element(
                    "line",
                    x1=at,
                    x2=at,
                    y1=self.at_y(low),  # type: ignore[arg-type]
                    y2=self.at_y(high),  # type: ignore[arg-type]
                    class_=f"whisker s{series % SERIES}",
                )
            )

    def bar(self, x0: float, x1: float, y0: float, y1: float, class_: str, tip: str = "") -> None:
        """A rectangle between two data corners."""
        if finite(x0, x1, y0, y1):
            left, right = sorted((self.at_x(x0), self.at_x(x1)))
            top, bottom = sorted((self.at_y(y0), self.at_y(y1)))
            self._body.append(rect(left, top, right - left, bottom - top, class_, tip))

    def draw(self, *parts: Markup) -> None:
        """Add ready markup in the figure's own units."""
        self._body.extend(parts)

    def render(self) -> Markup:
        return document(self.width, self.height, self.title, self.description, self._body)


def rect(x: float, y: float, width: float, height: float, class_: str, tip: str = "", radius: float = 0) -> Markup:
    inner = element("title", escape(tip)) if tip else ""
    return element(
        "rect", inner, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), class_=class_, rx=radius or None
    )


def marker(x: float, y: float, series: int, size: float = 3.6, tip: str = "") -> Markup:
    """Circle, square, triangle, diamond, cross ..., by series."""
    inner = element("title", escape(tip)) if tip else ""
    class_ = f"mark s{series % SERIES}"
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
        3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        4: ((0, 1.25), (1.2, -0.95), (-1.2, -0.95)),
        5: (
            (-1.3, -0.5),
            (-0.5, -0.5),
            (-0.5, -1.3),
            (0.5, -1.3),
            (0.5, -0.5),
            (1.3, -0.5),
            (1.3, 0.5),
            (0.5, 0.5),
            (0.5, 1.3),
            (-0.5, 1.3),
            (-0.5, 0.5),
            (-1.3, 0.5),
        ),
        6: ((-1.3, 0), (-0.6, -1.1), (0.6, -1.1), (1.3, 0), (0.6, 1.1), (-0.6, 1.1)),
        7: ((0, -1.3), (0.4, -0.4), (1.3, 0), (0.4, 0.4), (0, 1.3), (-0.4, 0.4), (-1.3, 0), (-0.4, -0.4)),
    }.get(series % SERIES)
    if corners is None:
        return element("circle", inner, cx=x, cy=y, r=size, class_=class_)
    shape = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return element("polygon", inner, points=shape, class_=class_)


def key(series: int) -> Markup:
    """The sample of a series for a legend."""
    body = element("line", x1=1, x2=29, y1=7, y2=7, class_=f"line s{series % SERIES}") + marker(15, 7, series)
    return element("svg", body, viewBox="0 0 30 14", class_="key", aria_hidden="true")


def interval_bar(value: float | None, low: float | None, high: float | None, reach: float, class_: str) -> Markup:
    """A difference beside 0 as a small bar: `reach` is the largest distance from 0 that has room."""
    if not finite(value, low, high) or not reach > 0:
        return Markup("")
    width, middle = 120.0, 60.0

    def at(number: float) -> float:
        return middle + max(-1.0, min(1.0, number / reach)) * (middle - 5)

    start, end = at(low), at(high)  # type: ignore[arg-type]
    body = [
        element("line", x1=0, x2=width, y1=7, y2=7, class_="rail"),
        element("line", x1=middle, x2=middle, y1=0, y2=14, class_="zero"),
        rect(start, 4.5, max(end - start, 1.5), 5, f"reach {class_}", radius=2.5),
        element("circle", cx=at(value), cy=7, r=3.6, class_=f"dot {class_}"),  # type: ignore[arg-type]
    ]
    return element("svg", Markup("").join(body), viewBox=f"0 0 {width:g} 14", class_="interval", aria_hidden="true")


def _wide(label: str) -> float:
    """How wide a tick's label is at most, in the figure's units; a font is not at hand to ask."""
    return sum(0.55 * TICK if letter in ".,:il1 " else TICK for letter in label)


def _touch(labels: Sequence[tuple[float, str]]) -> bool:
    """Whether labels that are centred on these places leave no gap between neighbours."""
    placed = sorted(labels)
    return any(b - a < (_wide(one) + _wide(other)) / 2 + TICK for (a, one), (b, other) in itertools.pairwise(placed))


def _spread(bounds: Point) -> Point:
    low, high = bounds
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with twice and five times them where that gives few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**k for k in powers if low <= 10.0**k <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / 6)]
    found = [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    return found if len(found) >= 2 else [t for t in nice_ticks(low, high, 4) if t > 0]


def _plain(number: float) -> str:
    return f"{number:g}".replace("-", "\N{MINUS SIGN}")


def _power(number: float) -> str:
    exponent = math.log10(number)
    if abs(exponent - round(exponent)) > 1e-9 or -2 <= exponent <= 3:
        return _plain(number)
    digits = str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"
