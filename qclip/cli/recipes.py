"""`qclip recipes`: the presets, and one recipe in full."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from . import common

EXAMPLES = "[bold]Examples[/]\n\nqclip recipes\n\nqclip recipes w4a8 --json > mine.json"


def command(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Show this recipe in full.")] = None,
    json: common.Json = False,
) -> None:
    """List the recipes: how many bits, and how they are found."""
    from qclip import recipes

    if name is not None:
        recipe = recipes.get(name)
        if json:
            common.print_json(recipe.to_dict())
        else:
            fields = {**recipe.to_dict(), "hash": recipe.hash}
            common.print_table(recipe.name, ["field", "value"], [[k, common.plain(v)] for k, v in fields.items()])
        return
    presets = recipes.presets()
    if json:
        common.print_json({n: {"about": about, **recipes.get(n).to_dict()} for n, about in presets.items()})
        return
    common.print_table("presets", ["name", "what it does"], [[n, about] for n, about in presets.items()])
    print("\nNames compose: wXaY[-static][-METHOD[+METHOD]], X weight bits 1..8, Y activation bits 2..8 or 16 (float).")
    print("A fraction of X (w3.3a8-raana) is an average over sites, where a method gives each a width of its own.")
    print("What no kernel runs is simulated in float, and says so. Options of methods go into a JSON file's `steps`.\n")
    rows = [["rtn", "round to nearest, where no method decides otherwise", ""]]
    rows += [[name, _about(method), _options(method.options)] for name, method in recipes.METHODS.items()]
    common.print_table("methods", ["name", "what it does", "options"], rows)
    rows = [[name, _about(kind), _options(kind.options)] for name, kind in recipes.QUANTIZERS.items()]
    common.print_table("\nquantizers of training, for `qclip train`", ["name", "what it does", "options"], rows)


def _about(method: Any) -> str:
    """The first line of its docstring."""
    return (method.__doc__ or "").strip().partition("\n")[0]


def _options(kind: Any) -> str:
    """ "alpha=null, samples=32": fields and their defaults as JSON has them."""
    from json import dumps

    fields = dataclasses.fields(kind)
    return ", ".join(f.name if f.default is dataclasses.MISSING else f"{f.name}={dumps(f.default)}" for f in fields)
