"""How far a run is, shown while it works."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

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

    told = time.monotonic()
    changed = counts.changed

    def line() -> str:
        state = counts.state()
        left = "" if state["eta"] is None else f", {state['eta']:.0f} s left"
        return (
            f"{state['done']} of {state['cells'] - state['cached']} cells measured, {state['cached']} cached, "
            f"{state['failed']} failed, {state['images_per_second']:.0f} images/s{left}"
        )

    if not sys.stderr.isatty():

        def plain(at_once: bool = False) -> None:
            nonlocal told
            changed(at_once)
            if time.monotonic() - told >= 10:
                told = time.monotonic()
                common.say(line())

        counts.changed = plain  # type: ignore[method-assign]
        yield
        return

    def look() -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_row(line())
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in counts.seconds.items())
        if stages:
            table.add_row(stages)
        for worker, doing in list(counts.doing.items()):
            table.add_row(f"{worker}: {doing}")
        return table

    with Live(console=Console(stderr=True), get_renderable=look, refresh_per_second=2, transient=True):
        yield
