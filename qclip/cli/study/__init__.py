"""`qclip study`: a grid of models, recipes and sets, declared in a file, measured once, read as tables."""

from __future__ import annotations

from collections.abc import Callable

import typer

from .choosing import choose_command
from .reading import correlations_command, report_command, table_command
from .running import plan_command, run_command, status_command
from .storing import compact_command, gc_command

app = typer.Typer(no_args_is_help=True, help="A grid of models, recipes and sets, declared in a file, measured once.")


def _add(name: str, command: Callable[..., None], *examples: str) -> None:
    shown = "".join(f"\n\nqclip study {name} {each}" for each in examples)
    app.command(name, epilog=f"[bold]Examples[/]{shown}")(command)


_add("plan", plan_command, "mine.toml", "mine.toml --workers 2 --json")
_add("run", run_command, "mine.toml", "mine.toml --workers 2 --retry-failed")
_add("status", status_command, "mine.toml", "mine.toml --json")
_add(
    "table",
    table_command,
    "mine.toml",
    "mine.toml --metric top1 --metric nll --corruption fog --format latex",
    "mine.toml --format csv --output table.csv",
)
_add(
    "choose",
    choose_command,
    "mine.toml --max-size 60MB --max-loss top1=0.5 --prefer ece",
    "mine.toml --max-latency 10ms --prefer auroc --json",
)
_add("correlations", correlations_command, "mine.toml", "mine.toml --metric ece --json")
_add(
    "report",
    report_command,
    "mine.toml --output out",
    "mine.toml --output out --metric top1 --metric nll --no-pages",
)
_add("compact", compact_command, "mine.study")
_add("gc", gc_command, "mine.toml other.toml --store shared.study")
