"""`qclip models`: what may stand where a command wants MODEL."""

from __future__ import annotations

from typing import Annotated

import typer

from . import common

EXAMPLES = (
    "[bold]Examples[/]\n\nqclip models\n\nqclip models ViT-B-32\n\nqclip models siglip --json\n\n"
    "qclip models --supported\n\nqclip models --supported mobileclip"
)
KINDS = [
    ["photos", "a checkpoint that ships with qclip"],
    ["DIR", "an artifact that `qclip quantize` wrote"],
]


def _supported(search: str | None, json: bool) -> None:
    """Every open_clip name, looked at beforehand (`qclip/models/open_clip_names.json`)."""
    from qclip import models
    from qclip.errors import ModelError, nearest
    from qclip.models import open_clip_names

    known, versions = open_clip_names.supported()
    found = {name: entry for name, entry in known.items() if search is None or search.lower() in name.lower()}
    if not found:
        raise ModelError(f"no open_clip name contains {search!r}; {nearest(search or '', known)}")
    if json:
        common.print_json({"versions": versions, "names": {name: entry.to_dict() for name, entry in found.items()}})
        return
    rows = []
    for name, entry in found.items():
        if entry.refused is None:
            numbers = [f"{entry.real:.1%}", f"{entry.parameters / 1e6:,.0f} M", f"{entry.bytes / 1e6:,.0f} MB"]
            rows.append([name, "accepted", *numbers])
        else:
            rows.append([name, "refused", "", "", ""])
    told = " and ".join(f"{library} {version}" for library, version in versions.items())
    head = ["name", "", "MACs on kernels", "parameters", "artifact"]
    common.print_table(f"names of {told}, at w8a8", head, rows)
    reasons: dict[str, list[str]] = {}
    for name, entry in found.items():
        if entry.refused is not None:
            reasons.setdefault(entry.refused, []).append(name)
    for reason, refused in reasons.items():
        print(f"\n{', '.join(refused)}: {reason}")
    if search is None and (new := sorted(set(models.FAMILIES.made("open_clip").names()) - set(known))):
        print(f"\nnot looked at, of another version: {', '.join(new)}")


def command(
    search: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Show only names that contain TEXT.")] = None,
    supported: Annotated[
        bool, typer.Option("--supported", help="Show for every open_clip name whether it is quantized, and how far.")
    ] = False,
    json: common.Json = False,
) -> None:
    """List the models: shipped checkpoints, names that a model family knows, and the other kinds of name."""
    if supported:
        return _supported(search, json)
    from qclip import models, zoo
    from qclip.errors import ModelError, nearest

    cards = zoo.checkpoints() | zoo.variants()
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
