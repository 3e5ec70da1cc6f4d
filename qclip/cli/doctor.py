"""`qclip doctor`: what is installed, and what will run."""

from __future__ import annotations

import typer

from . import common
from .process import FAILED

EXAMPLES = "[bold]Examples[/]\n\nqclip doctor\n\nqclip doctor --json"


def command(threads: common.Threads = None, json: common.Json = False) -> None:
    """Show versions, processor, kernels, costs, programs and checkpoints; check the kernels against the reference."""
    from qclip import doctor

    common.set_threads(threads)
    found = doctor.examine()
    if json:
        common.print_json(found)
    else:
        for title in ("versions", "processor", "kernels", "costs", "programs", "checkpoints"):
            common.print_table(title, ["", ""], [[k, common.plain(v)] for k, v in found[title].items()])
            print()
        for problem in found["problems"]:
            print(f"! {problem}")
        print("no problem found" if not found["problems"] else f"{len(found['problems'])} problem(s)")
    if found["problems"]:
        raise typer.Exit(FAILED)
