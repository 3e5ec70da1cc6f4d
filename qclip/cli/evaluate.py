"""`qclip evaluate`: accuracy, calibration, OOD detection, noise and shift, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from qclip import files
from qclip.errors import InputError

from . import common, comparison

if TYPE_CHECKING:
    from qclip.data import ImageSet

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip evaluate scenes-clean --recipe float --recipe w8a8 --data scenes:test --output out\n\n"
    "qclip evaluate photos --recipe float --recipe w4a8 --data parquet:cifar10_test.parquet "
    "--dev parquet:cifar10_dev.parquet --ood far=parquet:mnist_test.parquet --output out\n\n"
    "qclip evaluate my.safetensors my-artifact --data folder:pictures --templates prompts.txt"
)


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = {
        "recipe": "qclip.recipes:METHODS",
        "score": "qclip.reliability.scores:SCORES",
        "corruption": "qclip.data.corruptions:CORRUPTIONS",
        "measure": "qclip.reliability.measurements:MEASUREMENTS",
    }


def command(
    models: common.Models,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="DATA", help="Labelled images, KIND:PATH; repeatable.")
    ] = None,
    recipe: common.Recipes = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", metavar="DATA", help="Images whose embeddings are compared, no more; repeatable."),
    ] = None,
    texts: common.Texts = None,
    ood: Annotated[
        list[str] | None,
        typer.Option("--ood", metavar="DATA", help="Other classes, KIND:PATH, before it near= or far=; repeatable."),
    ] = None,
    shift: Annotated[
        list[str] | None, typer.Option("--shift", metavar="DATA", help="The same classes, other images; repeatable.")
    ] = None,
    dev: common.Dev = None,
    proxy: Annotated[
        str | None, typer.Option("--proxy", metavar="DATA", help="Images with captions to tune logit scales on.")
    ] = None,
    train: common.Train = None,
    captions: Annotated[
        list[str] | None,
        typer.Option("--captions", metavar="DATA", help="Images with captions, for retrieval; repeatable."),
    ] = None,
    negatives: common.Negatives = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="NAME", help="OOD score; repeatable. Default: all."),
    ] = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option(
            "--corruption",
            "--corruptions",
            metavar="NAME",
            help="Corruption of the labelled images, or many: all, imagenet-c (without frost), noise, blur, weather, "
            "digital, validation; repeatable. Default: gaussian_noise.",
        ),
    ] = None,
    severity: Annotated[
        list[int] | None,
        typer.Option("--severity", min=1, max=5, metavar="N", help="Of the corruptions; repeatable. Default: 1 to 5."),
    ] = None,
    jpeg85: Annotated[
        bool,
        typer.Option("--jpeg85", help="Corrupted images go through JPEG of quality 85, as those of ImageNet-C did."),
    ] = False,
    measure: Annotated[
        list[str] | None,
        typer.Option("--measure", metavar="NAME", help="Measurement; repeatable. Default: all."),
    ] = None,
    classes: common.Classes = None,
    templates: common.Templates = None,
    calibration: common.Calibration = None,
    output: common.ReportFolder = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples", metavar="FILE", parser=common.output_path, help="Write a Parquet table of every image here."
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option("--share", metavar="I/N", help="Only embed part I of N into the cache: N processes at once."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Noise on all images, not on a fixed sample of 1,000.")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum/--no-spectrum", help="Spectra of the weights as well.")] = True,
    cache: common.Cache = True,
    batch: common.Batch = 64,
    strict: common.Strict = False,
    arch: common.Arch = None,
    device: common.Device = "cpu",
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Evaluate models, or one model under several recipes: differences are paired and have 95 % intervals."""
    import qclip
    from qclip.data import load, read_lines
    from qclip.data.corruptions import expand
    from qclip.reliability import check
    from qclip.reliability.sets import kinds

    if output is not None:
        comparison.check_output(output, force)
    part = None if share is None else _part(share)
    if share is not None and not cache:
        raise InputError("--share leaves nothing behind with --no-cache; leave one of them out")
    if samples is not None:
        if recipe and len(models) > 1:
            raise InputError("--samples holds one comparison; evaluate one model at a time with --recipe")
        files.check_file(samples, force)
    for option, names in (("score", score), ("measure", measure)):
        for name in names or []:
            common.registry_at(Command.NAMED[option]).get(name)
    expand(corruption or [])
    common.set_threads(threads)
    prompts = None if templates is None else read_lines(templates, "templates")

    def labelled(names: list[str]) -> list[ImageSet]:
        with common.progress() as progress:
            return [load(name, classes_file=classes, progress=progress) for name in names]

    def others(names: list[str]) -> list[ImageSet]:
        with common.progress() as progress:
            return [load(name, progress=progress) for name in names]

    settings: dict[str, Any] = {
        "data": labelled(data or []),
        "images": others(images or []),
        "texts": () if texts is None else read_lines(texts, "texts"),
        "ood": {kind: others(names) for kind, names in kinds(ood or []).items()},
        "shift": labelled(shift or []),
        "dev": None if dev is None else labelled([dev])[0],
        "proxy": None if proxy is None else others([proxy])[0],
        "train": None if train is None else labelled([train])[0],
        "captions": others(captions or []),
        "negatives": negatives,
        "scores": score,
        "corruptions": corruption,
        **({"severities": severity} if severity else {}),
        "jpeg85": jpeg85,
        "measurements": measure,
        "templates": prompts,
        "full": full,
        "samples": samples,
        "share": part,
        "seed": seed,
        "batch": batch,
        "strict": strict,
        "cache": cache,
        "device": device,
    }
    check(**settings)
    found = comparison.groups(
        models, recipe, calibration=calibration, arch=arch, device=device, seed=seed, strict=strict
    )
    results = comparison.join([comparison.evaluate(group, spectrum and not share, **settings) for group in found])
    if share is not None:
        common.say(f"part {share} is embedded; run again without --share when all parts are")
        return
    if output is not None:
        comparison.write(results, output)
    if json:
        common.print_results(results)
        return
    print(qclip.table(results))
    if output is not None:
        print(f"\nreport: {output / 'report.html'}")


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isascii() and part.isdecimal() and parts.isascii() and parts.isdecimal()):
        raise InputError(f"--share {text!r} is no part; write I/N, as in 2/4")
    if not 1 <= int(part) <= int(parts):
        raise InputError(f"--share {text!r} is no part; I is 1 to N")
    return int(part), int(parts)
