"""Turn a trained artifact into a shipped variant of a checkpoint: the difference to it, card.json and README.md.

    python dev/pack_variant.py runs/qat/photos/w4a8-reliable-seed0 photos w4a8-reliable
    qclip evaluate photos:w4a8-reliable --data SET --dev SET --json > measured.json
    python dev/pack_variant.py runs/qat/photos/w4a8-reliable-seed0 photos w4a8-reliable --measured measured.json

`--size BYTES` makes it smaller, for a float model: changes of its weights are then of low rank, and how near it comes
to the trained one is printed. What is measured is the variant as it is loaded.
`--measured` are files of `qclip evaluate ... --json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qclip
from qclip import artifact, recipes, variants, zoo
from qclip.results import Results
from qclip.training import Pairs, Settings

WANTED = ("top1", "balanced_accuracy", "nll", "ece", "nll_ts", "ece_ts", "signed_gap", "auroc", "mean_top1")
OPTIONS = {"pairs": "samples"}  # of `qclip train`, where they are called otherwise than the setting
COLUMNS = ("set", "subset", "corruption", "score", "metric", "value", "low", "high", "n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("base", choices=sorted(zoo.checkpoints()))
    parser.add_argument("name")
    parser.add_argument("--measured", type=Path, nargs="+", default=[])
    parser.add_argument("--size", type=int, help="bytes that changes of float weights may take; default: 8 bits each")
    args = parser.parse_args()
    card = made(args.artifact, args.base, args.name, [row for file in args.measured for row in measured(file)])
    out = Path(zoo.__file__).parent / "checkpoints" / args.base / args.name
    base = qclip.load_model(args.base)
    variants.save(args.artifact, base, out, card, readme(card), args.size)
    near = nearness(variants.load(out, base), artifact.load(args.artifact))
    if args.size is not None:  # the card says how near it comes, which is known of what is stored
        card["stored"] = (
            f"changes of weights at low rank; cosine to the trained model on scenes, images and texts: {near}"
        )
        variants.save(args.artifact, base, out, card, readme(card), args.size)
    print(f"{out}: {(out / variants.FILE).stat().st_size:,} bytes\ncosine to the artifact, images and texts: {near}")


@torch.no_grad()
def nearness(model: nn.Module, trained: nn.Module) -> str:
    """Mean cosine of embeddings of scenes and their captions."""
    pairs = Pairs.of("scenes:test?samples=200", qclip.encoders(trained))
    cosine = torch.nn.functional.cosine_similarity
    images = pairs.pixels(np.arange(len(pairs)))
    found = [
        float(cosine(model.encode_image(images), trained.encode_image(images)).mean()),  # type: ignore[operator]
        float(cosine(model.encode_text(pairs.tokens), trained.encode_text(pairs.tokens)).mean()),  # type: ignore[operator]
    ]
    return ", ".join(f"{each:.6f}" for each in found)


def made(folder: Path, base: str, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The card: what the artifact says of its training, and what was measured."""
    content = variants.without_folders(artifact.read_description(folder))
    training = content["provenance"]["training"]
    recipe = content["recipe"]["name"]
    source = training["pairs"]["source"]
    data = zoo.checkpoints()[base]["data"]
    settings = training["settings"]
    usual = dataclasses.asdict(Settings.of(recipes.get(recipe)))
    differ = [key for key, value in settings.items() if value != usual.get(key) or key == "seed"]
    options = [f"--{OPTIONS.get(key, key).replace('_', '-')} {shlex.quote(str(settings[key]))}" for key in differ]
    pairs = [f"--pairs {shlex.quote(name)}" for name in source.split(" + ")]
    command = f"qclip train {base} --recipe {recipe} {' '.join([*pairs, *options])} --output DIR"
    return {
        "name": f"{base}:{name}",
        "base": base,
        "recipe": recipe,
        "data": f"{base}, trained on with {training['learned']:,} pairs of {source}. {base}: {data}",
        "training": {"command": command, "settings": settings, "held_out": training.get("held_out")},
        "measured": rows,
    }


def measured(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file that go onto the card."""
    found = Results.from_json(file).where(metric=WANTED, reference="", axis="", severity=0)
    return [
        {column: row[column] for column in COLUMNS}
        for row in found
        if row["value"] is not None
        and (row["score"] in ("", "mcm"))
        and bool(row["corruption"]) == (row["metric"] == "mean_top1")
    ]


def readme(card: dict[str, Any]) -> str:
    training = card["training"]
    lines = [
        f"# {card['name']}",
        "",
        f"`{card['base']}` trained with the recipe `{card['recipe']}`, stored as the difference to it. Made for "
        "testing and demonstration, not for use; what training does and what it does not stands in docs/qat.md.",
        "",
        f"- **Data**: {card['data']}",
        f"- **Made with**: `{training['command']}`",
        f"- **Objective**: `{training['settings']['objective']}`, rate {training['settings']['rate']:g}",
    ]
    if "stored" in card:
        lines.append(f"- **Stored**: {card['stored']}")
    if card["measured"]:
        lines += [
            "",
            "| set | subset | corruption | metric | value | 95 % interval | n |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in card["measured"]:
            interval = "" if row["low"] is None else f"{row['low']:.4f} .. {row['high']:.4f}"
            name = f"{row['metric']} ({row['score']})" if row["score"] else row["metric"]
            cells = row["set"], row["subset"], row["corruption"], name, f"{row['value']:.4f}", interval, str(row["n"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
