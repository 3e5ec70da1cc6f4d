"""What each metric is called, its unit, which way is better, and how its numbers are printed."""

from __future__ import annotations

import dataclasses
import math

from qclip import metrics
from qclip.data.corruptions import CORRUPTIONS, GROUPS, PUBLISHED
from qclip.metrics import Metric
from qclip.reliability.scores import SCORES

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"
RANGE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclasses.dataclass(frozen=True)
class Measure:
    """A metric's record (`qclip.metrics`) and how its numbers are printed: shares in percent."""

    record: Metric

    @property
    def name(self) -> str:
        return f"{self.record.label} ({self.record.unit})" if self.record.unit == "dB" else self.record.label

    @property
    def better(self) -> int:
        return self.record.better

    @property
    def share(self) -> bool:
        return self.record.unit == "share"

    @property
    def digits(self) -> int:
        return self.record.digits

    @property
    def signed(self) -> bool:
        return self.record.signed

    @property
    def unit(self) -> str:
        """The unit of a difference."""
        return "points" if self.share else ""

    def value(self, number: float | None) -> str:
        """An absolute value for print: "71.3 %", "0.812", an en dash where undefined."""
        if number is None:
            return ABSENT
        text = _fixed(100 * number if self.share else number, self.digits, self.signed)
        return f"{text} %" if self.share and not self.signed else text

    def interval(self, low: float | None, high: float | None) -> str:
        """ "[70.1, 72.5]" in the units of `value`, "" without both ends."""
        if low is None or high is None:
            return ""
        scale = 100 if self.share else 1
        return f"[{_fixed(scale * low, self.digits, self.signed)}, {_fixed(scale * high, self.digits, self.signed)}]"

    def difference(self, number: float | None) -> str:
        """A difference with its sign, one digit finer than a value; shares in percentage points."""
        if number is None:
            return ABSENT
        return _fixed(100 * number if self.share else number, self._fine, True)

    def difference_interval(self, low: float | None, high: float | None) -> str:
        if low is None or high is None:
            return ""
        return f"[{self.difference(low)}, {self.difference(high)}]"

    @property
    def _fine(self) -> int:
        return self.digits + 1 if self.share else self.digits


def score(name: str) -> str:
    """What an OOD score is called."""
    return SCORES.get(name).label if name in SCORES else name


def corruption(name: str) -> str:
    """What a corruption, or a group of them, is called."""
    if name in GROUPS or name == PUBLISHED:
        return GROUPS.get(name, "ImageNet-C without frost")
    return CORRUPTIONS.get(name).label if name in CORRUPTIONS else title(name)


def metric(name: str) -> Measure:
    """What is printed for a metric."""
    return Measure(metrics.metric(name))


def _fixed(number: float, digits: int, signed: bool = False) -> str:
    if math.isinf(number):
        return (MINUS if number < 0 else "+" if signed else "") + "\N{INFINITY}"
    text = f"{abs(number):,.{digits}f}"
    if number == 0 or not signed and not text.strip("0.,"):  # an unsigned "-0.0" says nothing, a signed one its side
        return text
    return (MINUS if number < 0 else "+" if signed else "") + text


def count(number: float | None) -> str:
    """A whole number with thousands marks."""
    return ABSENT if number is None else _fixed(number, 0)


def size(number: float | None) -> str:
    """Bytes in decimal units: "12.3 MB"."""
    if number is None:
        return ABSENT
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 100 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number:.0f} B"


def milliseconds(number: float | None) -> str:
    return ABSENT if number is None else f"{number:.3g} ms" if number < 100 else f"{number:,.0f} ms"


def percent(share: float | None, digits: int = 1) -> str:
    return ABSENT if share is None else f"{_fixed(100 * share, digits)} %"


def probability(p: float) -> str:
    """A p-value for print: "< 0.001", "0.034"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def words(names: list[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else ""


def small(name: str) -> str:
    """With a small first letter, for the middle of a sentence; "ECE" and "JPEG" stay."""
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def title(name: str) -> str:
    """ "gaussian_noise" -> "Gaussian noise"."""
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]
