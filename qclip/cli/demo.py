"""`qclip demo`: the whole of qclip on two small models that come with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import common, lineup

EXAMPLES = "[bold]Examples[/]\n\nqclip demo\n\nqclip demo --samples 200 --output quick-look"
MODELS = ["scenes-clean", "scenes-noisy"]
RECIPES = ["float", "w8a8", "w4a8", "w4a4"]


def command(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Its own earlier report.html and results.json are replaced.")
    ] = Path("qclip-demo"),
    samples: Annotated[
        int, typer.Option("--samples", min=10, help="Images of each set; more give narrower intervals.")
    ] = 800,
    cache: common.Cache = True,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Quantize two small CLIP models and show what that did to their reliability, on generated images."""
    import qclip

    def scenes(split: str) -> str:
        return f"scenes:{split}?samples={samples}"

    common.set_threads(threads)
    settings = {
        "data": scenes("test"),
        "ood": {"near": [scenes("near-ood")], "far": [scenes("far-ood")]},
        "shift": [scenes("style-shift"), scenes("spurious-test")],
        "dev": scenes("dev"),
        "seed": seed,
        "cache": cache,
    }
    found = lineup.groups(MODELS, RECIPES, seed=seed)
    results = lineup.join([lineup.evaluate(group, True, **settings) for group in found])
    lineup.write(results, output)
    if json:
        common.print_results(results)
        return
    print(qclip.table(results))
    print(f"\nreport: {output / 'report.html'}")
