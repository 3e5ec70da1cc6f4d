"""`qclip train`: a float model and pairs in, the artifact of a trained quantized model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from qclip.errors import InputError

from . import common

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip train photos --recipe w4a4-lsq --pairs parquet:flickr8k_train.parquet --output photos-w4a4\n\n"
    "qclip train photos --recipe w2a8-lsq --pairs parquet:pairs.parquet --output small --steps 800 --rate 2e-4\n\n"
    "torchrun --nproc-per-node 8 -m qclip train ViT-B-32:openai --recipe w4a8-lsq --pairs tar:shards --output vit"
)


MOST = 10**8  # steps, or pairs


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = {
        "recipe": "qclip.recipes:QUANTIZERS",
        "objective": "qclip.training.objectives:OBJECTIVES",
    }


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file, hf:ID ... See `qclip models`.")],
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="wXaY-[METHOD+]QUANTIZER, as in w4a8-lsq and w4a4-rotation+lsq, or a JSON file."),
    ],
    pairs: Annotated[str, typer.Option("--pairs", metavar="DATA", help="Images with captions: KIND:PATH.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            parser=common.output_path,
            help="The artifact's folder. Checkpoints and log.csv stand in DIR.training: the same command goes on from "
            "what a killed one left there.",
        ),
    ],
    objective: Annotated[
        str | None, typer.Option("--objective", help="Terms with their weights, as in contrastive+10*mse.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=MOST)] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, max=MOST, help="Pairs of a step, of all processes.")
    ] = None,
    micro: Annotated[
        int | None, typer.Option("--micro", min=1, max=MOST, help="Pairs at a time; the step stays the same.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=1e-12, max=10, callback=common.finite, help="Of weights, at its highest."),
    ] = None,
    scale_rate: Annotated[
        float | None,
        typer.Option("--scale-rate", min=1e-12, max=10, callback=common.finite, help="Of quantizers' scales."),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option("--decay", min=0, max=10, callback=common.finite, help="Weight decay, of weights alone."),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option("--warmup", min=0, max=1, callback=common.finite, help="Share of the steps in which rates rise."),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(
            "--start", min=0, max=1, callback=common.finite, help="Share of the steps before anything is rounded."
        ),
    ] = None,
    logit_scale: Annotated[
        str | None, typer.Option("--logit-scale", help="frozen, learned, or tuned afterwards on held-out pairs.")
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="float32 or bfloat16 (autocast).")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Blocks run again in backward: less memory, more time.")
    ] = False,
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema", min=0, max=1, callback=common.finite, help="Decay of an average of the weights; 0: none."
        ),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option("--held-out", min=0, max=1, callback=common.finite, help="Share of the pairs not trained on."),
    ] = None,
    count: Annotated[int | None, typer.Option("--samples", min=2, max=MOST, help="Pairs drawn from DATA.")] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, max=MOST, help="Steps between checkpoints.")
    ] = None,
    classes: common.Classes = None,
    arch: common.Arch = None,
    device: common.Device = "cpu",
    strict: common.Strict = False,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Train a model with rounded weights and inputs, and save what it becomes as an artifact."""
    import qclip
    from qclip import artifact, recipes, rewrite
    from qclip.data import read_lines
    from qclip.training import Settings
    from qclip.training.objectives import Objective
    from qclip.training.processes import Processes

    chosen = recipes.get(recipe)
    if chosen.trained is None:
        raise InputError(
            f"recipe {chosen.name!r} is computed, not trained: use `qclip quantize`, or name a quantizer of training, "
            f"as in {chosen.default.name}-lsq"
        )
    given: dict[str, Any] = {
        "objective": objective,
        "steps": steps,
        "batch": batch,
        "micro": micro,
        "rate": rate,
        "scale_rate": scale_rate,
        "decay": decay,
        "warmup": warmup,
        "start": start,
        "logit_scale": logit_scale,
        "precision": precision,
        "checkpointing": checkpointing or None,
        "ema": ema,
        "held_out": held_out,
        "pairs": count,
        "save_every": save_every,
        "seed": seed,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    Objective(Settings.of(chosen, **settings).objective)
    processes = Processes.of_environment()
    if processes.first:
        artifact.check_output(output, force)
    common.set_threads(threads)
    say = common.say if processes.first else lambda _: None
    say(f"loading {model}")
    loaded = qclip.load_model(model, device=device, arch=arch)
    say(f"training with {chosen.name}")
    with common.progress() as progress:
        trained = qclip.train(
            loaded,
            chosen,
            pairs,
            output.with_name(f"{output.name}.training"),
            classes=None if classes is None else read_lines(classes, "classes"),
            strict=strict,
            progress=progress if processes.first else None,
            **settings,
        )
    if not processes.first:
        return
    qclip.save(trained, output, force=force)
    done = rewrite.quantization(trained)
    assert done is not None
    notes = done.provenance["training"]
    written = artifact.bytes_of(output)
    if json:
        common.print_json(
            {
                "artifact": str(output),
                "recipe": chosen.to_dict(),
                "bytes": written,
                "training": notes,
                "coverage": done.coverage.shares(),
            }
        )
        return
    if "held_out" in notes:
        print(f"loss on {notes['held_out']['pairs']} held-out pairs: {notes['held_out']['loss']:.4f}")
    print(f"{output}: {written / 1e6:.1f} MB; what it was trained with stands in {artifact.DESCRIPTION}")
