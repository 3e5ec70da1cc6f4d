"""`qclip models`: what may stand where a command wants MODEL."""

from __future__ import annotations

from typing import Annotated

import typer

from . import common

EXAMPLES = "[bold]Examples[/]\n\nqclip models\n\nqclip models ViT-B-32\n\nqclip models siglip --json"
KINDS = [
    ["photos", "a checkpoint that ships with qclip"],
    ["DIR", "an artifact that `qclip quantize` wrote"],
]


def command(
    search: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Show only names that contain TEXT.")] = None,
    json: common.Json = False,
) -> None:
    """List the models: shipped checkpoints, names that a model family knows, and the other kinds of name."""
    from qclip import models, zoo
    from qclip.errors import ModelError, nearest

    cards = zoo.checkpoints()
    names = {family.name: known for family in models.families() if (known := family.names())}
    if search is not None:
        cards_found = {name: card for name, card in cards.items() if search.lower() in name.lower()}
        found = {of: [name for name in known if search.lower() in name.lower()] for of, known in names.items()}
        if not cards_found and not any(found.values()):
            raise ModelError(f"no model's name contains {search!r}; {nearest(search, [*cards, *models.names()])}")
        cards, names = cards_found, found
    if json:
        common.print_json({"shipped": cards, **names})
        return
    if cards:
        rows = [[name, card.get("data", "")] for name, card in cards.items()]
        common.print_table("shipped with qclip", ["name", "trained on"], rows)
    if search is None:
        examples = [list(example) for family in models.families() for example in family.examples]
        common.print_table("\nkinds of MODEL", ["for example", "what"], [*KINDS, *examples])
        counts = " and ".join(f"{of} knows {len(known)} names" for of, known in names.items())
        print(f"\n{counts}: `qclip models TEXT` shows those that contain TEXT.")
    for of, known in names.items() if search is not None else ():
        if known:
            common.print_table(of, ["name"], [[name] for name in known])
