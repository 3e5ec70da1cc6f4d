"""How far a run is, shown while it works."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qclip.errors import printable

from .. import common

if TYPE_CHECKING:
    from qclip.study.progress import Counts


@contextlib.contextmanager
def live(counts: Counts) -> Iterator[None]:
    """One table on a terminal; plain lines, at most one in ten seconds, elsewhere."""
    import sys

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    told = time.monotonic()
    changed = counts.changed

    def told_of() -> tuple[str, str]:
        """Cells, and how fast it goes."""
        state = counts.state()
        left = "" if state["eta"] is None else f", {_duration(state['eta'])} left"
        return (
            f"{state['done']} of {state['cells'] - state['cached']} measured, {state['cached']} cached, "
            f"{state['failed']} failed"
        ), f"{state['images_per_second']:.0f} images/s{left}"

    if not sys.stderr.isatty():

        def plain(at_once: bool = False) -> None:
            nonlocal told
            changed(at_once)
            if time.monotonic() - told >= 10:
                told = time.monotonic()
                common.say("cells: " + ", ".join(told_of()))

        counts.changed = plain  # type: ignore[method-assign]
        yield
        return

    def look() -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        stages = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in list(counts.seconds.items()))
        rows = [*zip(("cells", "speed"), told_of(), strict=True), ("stages", stages), *list(counts.doing.items())]
        for name, text in rows:
            if text:
                table.add_row(Text(name), Text(printable(text)))  # names out of files are no markup
        return table

    with Live(console=Console(stderr=True), get_renderable=look, refresh_per_second=2, transient=True):
        yield


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
