"""`qclip models`: what may stand where a command wants MODEL."""

from __future__ import annotations

from typing import Annotated

import typer

from . import common

EXAMPLES = "[bold]Examples[/]\n\nqclip models\n\nqclip models ViT-B-32\n\nqclip models siglip --json"
KINDS = [
    ["photos", "a checkpoint that ships with qclip"],
    ["DIR", "an artifact that `qclip quantize` wrote"],
    ["ViT-B-32:laion2b_s34b_b79k", "an open_clip name with its pretrained tag (downloads)"],
    ["ViT-B-32", "an open_clip architecture with random weights: good for speed only"],
    ["FILE", "a .safetensors or .pt checkpoint (with --arch where the file does not say)"],
    ["local-dir:PATH", "an open_clip model folder"],
    ["hf:ID_OR_DIR", "a Hugging Face CLIP or SigLIP (extra `hf`)"],
]


def command(
    search: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Show only names that contain TEXT.")] = None,
    json: common.Json = False,
) -> None:
    """List the models: shipped checkpoints, open_clip names, and the other kinds of name."""
    from qclip import models, zoo
    from qclip.errors import ModelError, nearest

    cards = zoo.checkpoints()
    names = list(models.names())
    if search is not None:
        cards_found = {name: card for name, card in cards.items() if search.lower() in name.lower()}
        found = [name for name in names if search.lower() in name.lower()]
        if not cards_found and not found:
            raise ModelError(f"no model's name contains {search!r}; {nearest(search, [*cards, *names])}")
        cards, names = cards_found, found
    if json:
        common.print_json({"shipped": cards, "open_clip": names})
        return
    if cards:
        rows = [[name, card.get("data", "")] for name, card in cards.items()]
        common.print_table("shipped with qclip", ["name", "trained on"], rows)
    if search is None:
        common.print_table("\nkinds of MODEL", ["for example", "what"], KINDS)
        print(f"\nopen_clip knows {len(names)} names: `qclip models TEXT` shows those that contain TEXT.")
    elif names:
        common.print_table("open_clip", ["name"], [[name] for name in names])
