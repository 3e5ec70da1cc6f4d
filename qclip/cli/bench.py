"""`qclip bench`: a quantized tower beside its peers."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from . import common

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip bench ViT-B-32 --recipe w8a8 --tower image --batch 16\n\n"
    "qclip bench ViT-B-32 --peers torch-fp32,torch-bf16 --json\n\n"
    "qclip bench ViT-B-32 --tower text --peers all   (`make bench` installs all peers)"
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file, hf:ID. Random weights serve for speed.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe name or JSON file.")] = "w8a8",
    tower: Annotated[Literal["image", "text"], typer.Option("--tower", help="Which encoder.")] = "image",
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, max=4096, help="Images or prompts a call. Without it 16 images, 64 prompts."),
    ] = None,
    peers: Annotated[
        str, typer.Option("--peers", help="all, none, or a list: torch-fp32,torch-bf16,torchao,onnxruntime,openvino.")
    ] = "torch-fp32",
    calibration: common.Calibration = None,
    full: Annotated[bool, typer.Option("--full", help="Prompts that fill the context (text tower).")] = False,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.1, max=86400, callback=common.finite, help="Time to measure, all together."),
    ] = 20.0,
    arch: common.Arch = None,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Measure a quantized tower and its peers: interleaved, the same input, the same threads, medians."""
    from qclip import bench

    chosen = bench.peer_names(peers)
    common.set_threads(threads)
    bench.keep_to_cores()
    with common.progress() as progress:
        found = bench.bench(
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
    if json:
        common.print_json(found)
        return
    ours = found["ours"]
    rows = [["qclip " + found["recipe"], round(ours["ms_per_item"], 3), "", round(ours["cosine"], 6)]]
    for name, peer in found["peers"].items():
        rows.append([name, round(peer["ms_per_item"], 3), f"{found['ratios'][name]:.2f}x", round(peer["cosine"], 6)])
    title = "{model}, {tower} tower, batch {batch}, {threads} threads, {cpu}".format(**found)
    common.print_table(title, ["who", f"ms per {found['unit']}", "ours is faster by", "cosine to fp32"], rows)
    if found["percent_of_peak"] is not None:
        share, peak = found["percent_of_peak"], found["peak_gops"]
        print(f"\n{share:.1f} % of the INT8 peak of {peak:.0f} GOPS, measured in the same run")
    for note in found["notes"]:
        print(f"note: {note}")
