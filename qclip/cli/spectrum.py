"""`qclip spectrum`: what quantization does to the singular values of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qclip import files

from . import common, comparison

EXAMPLES = (
    "[bold]Examples[/]\n\nqclip spectrum photos --recipe w8a8 --recipe w4a8\n\n"
    "qclip spectrum photos photos-w4a8 --output spectrum.json"
)


def command(
    models: common.Models,
    recipe: common.Recipes = None,
    calibration: common.Calibration = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", parser=common.output_path, help="Write the results here.")
    ] = None,
    arch: common.Arch = None,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Compare weight spectra: energy by rank band, gain on the float basis, and both for white noise of equal norm."""
    import qclip

    if output is not None:
        files.check_file(output, force)
        common.keep_input(output, models)
    common.set_threads(threads)
    recipes = None if recipe is None else list(dict.fromkeys([comparison.FLOAT, *recipe]))
    found = comparison.groups(models, recipes, calibration=calibration, arch=arch, seed=seed)
    results = comparison.join([comparison.spectrum(group) for group in found])
    if output is not None:
        results.to_json(output)
    if json:
        common.print_results(results)
        return
    print(qclip.table(results))
    if output is not None:
        print(f"\nresults: {output}")
