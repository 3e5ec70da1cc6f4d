"""`qclip sensitivity`: what quantizing each site alone does to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from qclip.errors import InputError

from . import common, comparison

EXAMPLES = (
    "[bold]Examples[/]\n\nqclip sensitivity photos --data parquet:cifar10_dev.parquet\n\n"
    "qclip sensitivity my.safetensors --arch ViT-B-32 --data folder:pictures --bits 3,4,8 --output sensitivity\n\n"
    "qclip quantize my.safetensors --arch ViT-B-32 --budget 4.5bit --calibration folder:pictures"
)
SHOWN = 12  # sites in the table; all of them are in the results


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file, hf:ID ... of a float model.")],
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="Images; with labels, accuracy and calibration are told, too.")
    ],
    bits: Annotated[
        str, typer.Option("--bits", metavar="LIST", help="Widths of the weights, by comma: 2 to 8.")
    ] = "2,3,4,5,6,8",
    activation_bits: Annotated[
        int, typer.Option("--activation-bits", min=2, max=16, help="Of the sites' inputs; 16 is float.")
    ] = 8,
    images: Annotated[int, typer.Option("--images", min=2, max=100_000, help="Images, and captions.")] = 128,
    output: common.ReportFolder = None,
    arch: common.Arch = None,
    classes: common.Classes = None,
    cache: common.Cache = True,
    strict: common.Strict = False,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Quantize one site at a time, and one tower at a time, and measure what that does: which sites need their bits.
    What is measured is kept, and `quantize --budget` spends a size by it."""
    import qclip
    from qclip.data import load

    widths = whole_numbers(bits)
    if output is not None:
        comparison.check_output(output, force)
        common.keep_input(output, [model])
    common.set_threads(threads)
    images_of = load(data, classes_file=classes)
    common.say(f"loading {model}")
    loaded = qclip.load_model(model, arch=arch)
    with common.progress() as progress:
        results = qclip.sensitivity(
            loaded,
            images_of,
            widths,
            activation_bits,
            count=images,
            seed=seed,
            strict=strict,
            cache=cache,
            progress=progress,
        )
    if output is not None:
        comparison.write(results, output)
    if json:
        common.print_results(results)
        return
    for role, title in (("tower", "towers alone"), ("site", "sites alone, the most sensitive ones first")):
        rows = results.where(metric="sensitivity", role=role).rows
        names = list(dict.fromkeys(row["set"] for row in rows))
        by_name = {name: {row["at"]: row["value"] for row in rows if row["set"] == name} for name in names}
        if role == "site":
            names = sorted(names, key=lambda name: -max(by_name[name].values()))[:SHOWN]
        common.print_table(
            f"1 - cosine of embeddings, {title}",
            [role, *(f"{width} bits" for width in widths)],
            [[name, *(f"{by_name[name][width]:.6f}" for width in widths)] for name in names],
        )
    if output is not None:
        print(f"\nreport: {output / 'report.html'}")


def whole_numbers(text: str) -> list[int]:
    """ "2,4,8" -> [2, 4, 8]. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 3 for part in parts):
        raise InputError(f"--bits {text!r} is no list of widths; write 2,4,8")
    return list(dict.fromkeys(map(int, parts)))
