"""`qclip spectrum`: what quantization does to the spectra of weights and features, beside controls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from qclip import files
from qclip.errors import InputError

from . import common, comparison

EXAMPLES = (
    "[bold]Examples[/]\n\nqclip spectrum photos --recipe w8a8 --recipe w4a8\n\n"
    "qclip spectrum photos photos-w4a8 --output spectrum.json\n\n"
    "qclip spectrum photos --recipe w4a8 --data parquet:cifar10_test.parquet --ood parquet:dtd10_64.parquet --through"
)


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = {"recipe": "qclip.recipes:METHODS", "control": "qclip.spectral.controls:CONTROLS"}


def command(
    models: common.Models,
    recipe: common.Recipes = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Images for features, Fourier maps and gratings: KIND:PATH."),
    ] = None,
    through: Annotated[
        bool,
        typer.Option("--through", help="Run every control and intervention through the model, on --data (labelled)."),
    ] = False,
    ood: Annotated[
        list[str] | None, typer.Option("--ood", metavar="DATA", help="Other classes, for --through; repeatable.")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=2, max=10_000_000, help="Images of each set: its first ones.")
    ] = 1000,
    control: Annotated[
        list[str] | None, typer.Option("--control", metavar="NAME", help="Control; repeatable. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=8, max=1000, help="Draws of each random control.")] = 8,
    calibration: common.Calibration = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", parser=common.output_path, help="Write the results here.")
    ] = None,
    arch: common.Arch = None,
    cache: common.Cache = True,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Compare spectra: what of each rank band is left in the weights and, with --data, in the features; and whether
    the controls would have done the same."""
    import qclip

    if data is None and (through or ood):
        raise InputError("--through and --ood need images; name them with --data")
    if ood and not through:
        raise InputError("--ood is for --through; give both")
    if output is not None:
        files.check_file(output, force)
        common.keep_input(output, models)
    for name in control or []:
        common.registry_at(Command.NAMED["control"]).get(name)
    common.set_threads(threads)
    measured = None
    if through:
        assert data is not None
        measured = comparison.measured(data, ood or [], images, cache, seed)
    recipes = None if recipe is None else list(dict.fromkeys([comparison.FLOAT, *recipe]))
    found = comparison.groups(models, recipes, calibration=calibration, arch=arch, seed=seed)
    settings: dict[str, Any] = {"controls": control, "seeds": seeds, "seed": seed}
    parts = []
    for group in found:
        parts.append(comparison.spectrum(group, **settings))
        if data is not None:
            parts.append(comparison.image_spectra(group, data, images, measured=measured, **settings))
    results = comparison.join(parts)
    if output is not None:
        results.to_json(output)
    if json:
        common.print_results(results)
        return
    print(qclip.table(results))
    if output is not None:
        print(f"\nresults: {output}")
