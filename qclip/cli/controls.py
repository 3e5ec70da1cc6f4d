"""`qclip controls`: a recipe of training and its controls, trained with several seeds and evaluated together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import typer

from . import common, comparison, training

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip controls photos --recipe w4a8-lsq --pairs parquet:flickr8k.parquet --data parquet:cifar10_test.parquet "
    "--dev parquet:cifar10_dev.parquet --ood far=parquet:mnist_test.parquet --output found\n\n"
    "qclip controls scenes-clean --recipe w4a4-lsq --pairs scenes:train --data scenes:test --dev scenes:dev "
    "--ood scenes:near-ood --seeds 1 --steps 60 --output quick"
)


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = training.NAMED | {"corruption": "qclip.data.corruptions:CORRUPTIONS"}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file, hf:ID ... See `qclip models`.")],
    recipe: training.Recipe,
    pairs: training.Pairs,
    data: Annotated[list[str], typer.Option("--data", metavar="DATA", help="Labelled images to test on; repeatable.")],
    dev: Annotated[
        str, typer.Option("--dev", metavar="DATA", help="Labelled images on which every arm's temperature is fitted.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            parser=common.output_path,
            help="report.html and results.json. The arms stand in DIR.arms: the same command goes on from these.",
        ),
    ],
    ood: Annotated[
        list[str] | None,
        typer.Option("--ood", metavar="DATA", help="Other classes, KIND:PATH, before it near= or far=; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="How often each arm is trained.")] = 3,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="NAME",
            help="untrained, float-tuned, float-continued, noise, noise-measured, lsq-authors; repeatable. Default: "
            "all but noise-measured.",
        ),
    ] = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option("--corruption", metavar="NAME", help="Of the test images; repeatable. Default: gaussian_noise."),
    ] = None,
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
    templates: common.Templates = None,
    cache: common.Cache = True,
    arch: common.Arch = None,
    device: common.Device = "cpu",
    strict: common.Strict = False,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Train a recipe beside its controls and say what its gains are due to: rounding, steps, noise, a temperature."""
    import qclip
    from qclip import recipes
    from qclip.controls import arms
    from qclip.data import load, read_lines
    from qclip.data.corruptions import expand
    from qclip.reliability.sets import kinds
    from qclip.reporting.controlled import findings, means

    chosen = recipes.get(recipe)
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
    )
    arms(chosen, control, **settings)
    comparison.check_output(output, force)
    expand(corruption or [])
    common.set_threads(threads)
    prompts = None if templates is None else read_lines(templates, "templates")
    tests = [load(name) for name in data]
    others = {kind: [load(name) for name in names] for kind, names in kinds(ood or []).items()}
    common.say(f"loading {model}")
    loaded = qclip.load_model(model, device=device, arch=arch)
    with common.progress() as progress:
        results = qclip.controlled(
            loaded,
            chosen,
            pairs,
            output.with_name(f"{output.name}.arms"),
            data=tests,
            dev=load(dev),
            ood=others,
            seeds=seeds,
            seed=seed,
            controls=control,
            classes=None if classes is None else read_lines(classes, "classes"),
            strict=strict,
            evaluation={"corruptions": corruption, "templates": prompts, "cache": cache, "device": device},
            progress=progress,
            **settings,
        )
    results.meta["command"] = common.command_line()
    comparison.write(results, output, means(results))
    if json:
        common.print_results(results)
        return
    for line in findings(results):
        print(line)
    print(f"\nreport: {output / 'report.html'}")
