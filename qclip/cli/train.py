"""`qclip train`: a float model and pairs in, the artifact of a trained model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import typer

from qclip.errors import InputError

from . import common, training

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip train photos --recipe w4a4-lsq --pairs parquet:flickr8k_train.parquet --output photos-w4a4\n\n"
    "qclip train photos --recipe w2a8-lsq --pairs parquet:pairs.parquet --output small --steps 800 --rate 2e-4\n\n"
    "qclip train photos --recipe float-continued --pairs parquet:pairs.parquet --output control --steps 800\n\n"
    "torchrun --nproc-per-node 8 -m qclip train ViT-B-32:openai --recipe w4a8-lsq --pairs tar:shards --output vit"
)


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = training.NAMED


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file, hf:ID ... See `qclip models`.")],
    recipe: training.Recipe,
    pairs: training.Pairs,
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
    objective: training.Objective = None,
    steps: training.Steps = None,
    batch: training.Batch = None,
    micro: training.Micro = None,
    rate: training.Rate = None,
    scale_rate: training.ScaleRate = None,
    decay: training.Decay = None,
    warmup: training.Warmup = None,
    start: training.Start = None,
    logit_scale: training.LogitScale = None,
    precision: training.Precision = None,
    checkpointing: training.Checkpointing = False,
    ema: training.Ema = None,
    held_out: training.HeldOut = None,
    count: training.Samples = None,
    save_every: training.SaveEvery = None,
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
    settings = training.settings(
        objective=objective,
        steps=steps,
        batch=batch,
        micro=micro,
        rate=rate,
        scale_rate=scale_rate,
        decay=decay,
        warmup=warmup,
        start=start,
        logit_scale=logit_scale,
        precision=precision,
        checkpointing=checkpointing,
        ema=ema,
        held_out=held_out,
        pairs=count,
        save_every=save_every,
    ) | {"seed": seed}
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
    if held := notes.get("held_out"):
        print(f"loss on {held['pairs']} held-out pairs: {held['loss']:.4f}, before training {held['before']:.4f}")
    print(f"{output}: {written / 1e6:.1f} MB; what it was trained with stands in {artifact.DESCRIPTION}")
