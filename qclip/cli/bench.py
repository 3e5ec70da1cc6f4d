"""`qclip bench`: a quantized tower beside its peers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import typer

from . import common
from .process import FAILED, say

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip bench ViT-B-32 --recipe w8a8 --tower image --batch 16\n\n"
    "qclip bench ViT-B-32 --peers torch-fp32,torch-bf16 --json\n\n"
    "qclip bench ViT-B-32 --tower text --peers all --seconds 300   (`make bench` installs all peers)"
)


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = {"peers": "qclip.bench.peers:PEERS"}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file, hf:ID. Random weights serve for speed.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe name or JSON file.")] = "w8a8",
    tower: Annotated[Literal["image", "text"], typer.Option("--tower", help="Which encoder.")] = "image",
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, max=4096, help="Images or prompts a call. Without it 16 images, 64 prompts."),
    ] = None,
    peers: Annotated[str, typer.Option("--peers", help="all, none, or a list, separated by commas.")] = "torch-fp32",
    calibration: common.Calibration = None,
    full: Annotated[bool, typer.Option("--full", help="Prompts that fill the context (text tower).")] = False,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            min=0.1,
            max=86400,
            callback=common.finite,
            help="Time for everything once the model is quantized: peers are made ready, all take turns.",
        ),
    ] = 60.0,
    arch: common.Arch = None,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Measure a quantized tower and its peers: interleaved, the same input, the same threads, medians.

    Every peer's outputs are compared with float32. Ctrl-C while turns are taken shows what was measured until then.
    """
    from qclip.bench import peers as known
    from qclip.bench import processor, table
    from qclip.bench.run import bench

    chosen = known.peer_names(peers)
    common.set_threads(threads)
    processor.keep_to_cores()
    with common.progress(counted=False) as progress:
        found = bench(
            model,
            recipe,
            tower=tower,
            batch=batch,
            peers=chosen,
            calibration=calibration,
            full=full,
            seconds=seconds,
            arch=arch,
            seed=seed,
            progress=progress,
        )
    for name, failure in found["failed"].items():
        say(f"the last lines of {name}, which failed:\n{failure['log']}")
    if json:
        common.print_json(found)
    elif found["ours"]:
        common.print_table(*table.table(found))
        print("\n" + "\n".join(table.remarks(found)))
    if found["failed"]:
        raise typer.Exit(FAILED)
