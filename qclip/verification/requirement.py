"""What is required of a quantized model: `top1>=-0.5, ece<=+1, index_recall@10>=0.98`.

A bound with a sign is a difference to the model that it is compared with, of shares in percentage points. A bound
without one is the value itself, of shares as 0..1 or, with a `%` behind it, in percent.
"""

from __future__ import annotations

import dataclasses
import math
import re

from qclip.errors import InputError, nearest
from qclip.metrics import METRICS, Metric, metric
from qclip.metrics.record import OWN

EXAMPLE = "write METRIC>=BOUND or METRIC<=BOUND, as in 'top1>=-0.5, ece<=+1, index_recall@10>=0.98'"
# Metrics that compare a model with its reference: they have a value, and no difference.
COMPARING = frozenset((*OWN["agreement"], *OWN["neighbours"]))
NEIGHBOURS = frozenset(OWN["neighbours"])
DETECTION = frozenset((*OWN["detection"], *OWN["precision"], "delong_p", "relative_drop_auroc"))  # of OOD sets
FITTED = frozenset(("ece_ts", "nll_ts", "temperature", "tpr_transferred", "fpr_transferred"))  # on a dev set
_FORM = re.compile(
    r"(?P<metric>\w+)(?:@(?P<at>\d+))?(?:\((?P<only>[^()]+)\))?\s*(?P<op>>=|<=)\s*"
    r"(?P<sign>[+-]?)(?P<bound>\d+(?:\.\d*)?|\.\d+)(?P<percent>\s*(?:%|pp))?"
)


@dataclasses.dataclass(frozen=True)
class Requirement:
    """text: as it was written. at: k of a metric of k neighbours. only: the name of a set, score, corruption or group
    to which it is restricted. bound: in the metric's own unit (shares 0..1), of the difference where `difference`."""

    text: str
    metric: str
    at: int | None
    only: str
    least: bool  # >=, else <=
    bound: float
    difference: bool

    @property
    def of(self) -> Metric:
        return metric(self.metric)

    def holds(self, value: float, low: float | None, high: float | None) -> bool:
        """Whether the bad end of the interval, or the value where it has none, meets the bound."""
        worst = self.worst(value, low, high)
        return worst >= self.bound if self.least else worst <= self.bound

    def worst(self, value: float, low: float | None, high: float | None) -> float:
        end = low if self.least else high
        return value if end is None else end


def requirements(text: str) -> list[Requirement]:
    """The requirements of a comma-separated list. Raises InputError on anything but the form above."""
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise InputError(f"nothing is required; {EXAMPLE}")
    return [_requirement(part) for part in parts if part]


def _requirement(text: str) -> Requirement:
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(f"requirement {text!r} cannot be read; {EXAMPLE}")
    name, least, sign = found["metric"], found["op"] == ">=", found["sign"]
    if name not in METRICS:
        raise InputError(f"requirement {text!r}: there is no metric {name!r}; {nearest(name, METRICS.names())}")
    kind = metric(name)
    if kind.better and least == (kind.better < 0):
        way, op = ("lower", "<=") if kind.better < 0 else ("higher", ">=")
        raise InputError(f"requirement {text!r}: {name} is better when {way}; require it by {op}")
    if name in NEIGHBOURS and int(found["at"] or 0) < 1:
        raise InputError(f"requirement {text!r}: say of how many neighbours, as in {name}@10")
    if name not in NEIGHBOURS and found["at"] is not None:
        raise InputError(f"requirement {text!r}: {name} has no @{found['at']}; leave it out")
    if name in COMPARING and sign:
        raise InputError(f"requirement {text!r}: {name} compares two models already; give its bound without a sign")
    bound, share = float(found["bound"]), kind.unit == "share"
    if not math.isfinite(bound):
        raise InputError(f"requirement {text!r} has no finite bound; {EXAMPLE}")
    if found["percent"] and not share:
        raise InputError(f"requirement {text!r}: {name} is no share; give its bound without {found['percent'].strip()}")
    if share and (sign or found["percent"]):
        bound /= 100
    if share and bound > 1:
        raise InputError(
            f"requirement {text!r}: {name} is a share of 0 to 1; write {bound:g}%, or a sign for a difference in points"
        )
    at = None if found["at"] is None else int(found["at"])
    signed = -bound if sign == "-" else bound
    return Requirement(text, name, at, (found["only"] or "").strip(), least, signed, bool(sign))
