"""`qclip demo`: the whole of qclip on two small models that come with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import common, comparison

EXAMPLES = "[bold]Examples[/]\n\nqclip demo\n\nqclip demo --samples 200 --output quick-look"
MODELS = ["scenes-clean", "scenes-noisy"]
OUTPUT = Path("qclip-demo")  # its own: an earlier demo is replaced unasked
RECIPES = ["float", "w8a8", "w4a8", "w4a4"]


def command(
    output: Annotated[
        Path,
        typer.Option("--output", metavar="DIR", parser=common.output_path, help="What is in qclip-demo is replaced."),
    ] = OUTPUT,
    samples: Annotated[
        int, typer.Option("--samples", min=10, max=1_000_000, help="Images of each set; more give narrower intervals.")
    ] = 800,
    cache: common.Cache = True,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Quantize two small CLIP models and show what that did to their reliability, on generated images."""
    import qclip

    def scenes(split: str) -> str:
        return f"scenes:{split}?samples={samples}"

    comparison.check_output(output, force or output == OUTPUT)
    common.set_threads(threads)
    settings = {
        "data": scenes("test"),
        "ood": {"near": [scenes("near-ood")], "far": [scenes("far-ood")]},
        "shift": [scenes("style-shift"), scenes("spurious-test")],
        "dev": scenes("dev"),
        "seed": seed,
        "cache": cache,
    }
    found = comparison.groups(MODELS, RECIPES, seed=seed)
    results = comparison.join([comparison.evaluate(group, True, **settings) for group in found])
    comparison.write(results, output)
    if json:
        common.print_results(results)
        return
    print(qclip.table(results))
    print(f"\nreport: {output / 'report.html'}")
