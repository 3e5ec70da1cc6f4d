"""`qclip study choose`: of many variants the one to deploy."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from .. import common
from .arguments import Plan, Score, Where, recalled

if TYPE_CHECKING:
    from qclip.study.choose import Candidate, Limits


def choose_command(
    plan: Plan,
    store: Where = None,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="Of the artifact's files, which are what is shipped: 60MB."),
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option("--max-latency", metavar="TIME", help="Per image, as the study noted it in passing.")
    ] = None,
    max_loss: Annotated[
        list[str] | None,
        typer.Option("--max-loss", metavar="METRIC=POINTS", help="How much worse than float it may be; repeatable."),
    ] = None,
    prefer: Annotated[str, typer.Option("--prefer", metavar="METRIC", help="Decides among what is left.")] = "top1",
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Which evaluation; default: the plan's first.")
    ] = None,
    score: Score = None,
    json: common.Json = False,
) -> None:
    """Name the variants that no other beats in everything, and pick one, with reasons. The size that counts is that of
    what is shipped; that in memory stands beside it."""
    from qclip.study import choose

    limits = choose.Limits(
        prefer,
        None if max_size is None else choose.size(max_size),
        None if max_latency is None else choose.milliseconds(max_latency),
        choose.losses(max_loss or []),
    )
    _, known, grid = recalled(plan, store)
    with known.lock("store", shared=True):
        found = choose.choose(grid, known, limits, data, score)
    pick = None if found[0].why else found[0]
    if json:
        told = [dataclasses.asdict(each) for each in found]
        common.print_json({"pick": None if pick is None else pick.name, "candidates": told})
    else:
        _print(str(plan), found, pick, limits)
    if pick is None:
        raise typer.Exit(1)


def _print(title: str, found: list[Candidate], pick: Candidate | None, limits: Limits) -> None:
    from qclip.reporting import units

    measure, rows = units.metric(limits.prefer), []
    for each in found:
        lost = [f"{each.losses[name][0]:+.2f}" if name in each.losses else units.ABSENT for name in limits.max_loss]
        bits = units.ABSENT if each.bits is None else f"{each.bits:.1f}"
        cost = [units.size(each.size), units.size(each.memory), bits, units.milliseconds(each.latency)]
        rows.append([each.name, *cost, measure.value(each.preferred), *lost, _why(each, pick)])
    columns = ["variant", "shipped", "in memory", "bits a weight", "per image", limits.prefer]
    common.print_table(title, [*columns, *(f"loss of {name}" for name in limits.max_loss), ""], rows)
    if pick is None:
        print("\nno variant keeps all limits")
        return
    print(f"\npick: {pick.name}")
    for name, most in limits.max_loss.items():
        end = pick.losses[name][1]
        if end is not None and end > most:
            print(f"its loss of {name} may be up to {end:.2f} (95 % interval), more than {most:g}")


def _why(each: Candidate, pick: Candidate | None) -> str:
    if each is pick:
        return "the pick"
    beaten = f"{each.beaten_by} is as good in everything, and better in something" if each.beaten_by else ""
    return "; ".join(filter(None, (*each.why, beaten))) or "not beaten"
