"""What is measured, one file per measurement: what it wants embedded, and the rows that it writes.

Another package adds one by an entry point of the group `qclip.measurements`, a script by `MEASUREMENTS.register`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qclip.registry import Registry

if TYPE_CHECKING:
    from ..embedded import Embeddings
    from ..request import Condition, Request
    from ..writer import Writer


class Measurement(Protocol):
    name: str
    label: str

    def wants(self, request: Request) -> list[Condition]:
        """The conditions that `rows` will read; none where there is nothing to measure."""
        ...

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        """Write what was measured. Only what was wanted may be read."""
        ...


_HERE = "qclip.reliability.measurements"
MEASUREMENTS: Registry[Measurement] = Registry(
    "measurement",
    "qclip.measurements",
    {
        "clean": f"{_HERE}.clean:Clean",
        "groups": f"{_HERE}.groups:Groups",
        "agreement": f"{_HERE}.agreement:Agreement",
        "neighbours": f"{_HERE}.neighbours:Neighbours",
        "speed": f"{_HERE}.speed:Speed",
        "corrupted": f"{_HERE}.corrupted:Corrupted",
        "ood": f"{_HERE}.ood:Ood",
        "human": f"{_HERE}.human:Human",
        "pairwise": f"{_HERE}.pairwise:Pairwise",
        "retrieval": f"{_HERE}.retrieval:Retrieval",
        "probe": f"{_HERE}.probe:Probe",
    },
    ("label", "wants", "rows"),
)
