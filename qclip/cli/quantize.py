"""`qclip quantize`: a model in, an artifact folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from . import common

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip quantize photos\n\n"
    "qclip quantize ViT-B-32:laion2b_s34b_b79k --recipe w4a8 --output vit-w4a8\n\n"
    "qclip quantize my.safetensors --arch ViT-B-32 --recipe w8a8-smoothquant --calibration folder:pictures"
)


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = {"recipe": "qclip.recipes:METHODS"}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file, hf:ID ... See `qclip models`.")],
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="wXaY[-static][-METHOD] or a JSON file; see `qclip recipes`."),
    ] = "w8a8",
    calibration: common.Calibration = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", parser=common.output_path, help="The artifact's folder; NAME-RECIPE without it."
        ),
    ] = None,
    arch: common.Arch = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an unreadable calibration image.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="Show the coverage site by site.")] = False,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Quantize a model and save it as an artifact: INT8 or INT4 codes, scales, and all that loading needs."""
    import qclip
    from qclip import artifact, recipes, rewrite

    chosen = recipes.get(recipe)
    target = output or Path(f"{common.short_name(model)}-{chosen.name}")
    artifact.check_output(target, force)
    common.set_threads(threads)
    if calibration is not None and not chosen.needs_data:
        common.say(f"--calibration {calibration} is not read: recipe {chosen.name!r} needs no data")
    common.say(f"loading {model}")
    loaded = qclip.load_model(model, arch=arch)
    before = sum(p.numel() for p in loaded.parameters()) * 4
    common.say(f"quantizing with {chosen.name}")
    with common.progress() as progress:
        qclip.quantize_(loaded, chosen, calibration=calibration, seed=seed, strict=strict, progress=progress)
    done = rewrite.quantization(loaded)
    assert done is not None
    coverage = done.coverage
    qclip.save(loaded, target, force=force)
    size = artifact.bytes_of(target)
    shares = coverage.shares()
    if json:
        rows = [vars(row) for row in coverage.rows]
        common.print_json(
            {
                "artifact": str(target),
                "recipe": chosen.to_dict(),
                "bytes": size,
                "float32_bytes": before,
                "coverage": shares,
                "sites": rows,
            }
        )
        return
    if sites:
        columns = ["site", "kind", "state", "weights", "activations", "MMACs", "parameters", "backend"]
        common.print_table("coverage, site by site", columns, [_site(row) for row in coverage.rows])
    rows = [[state, *(round(100 * share, 1) for share in of.values())] for state, of in shares.items()]
    common.print_table("coverage", ["state", "MACs %", "parameters %"], rows)
    print(f"\n{target}: {size / 1e6:.1f} MB, {size / before:.3f} of float32 ({before / 1e6:.1f} MB)")


def _site(row: Any) -> list[Any]:
    bits = [row.weight_bits or "float", row.activation_bits or "float"]
    return [row.site, row.kind, row.state, *bits, round(row.macs / 1e6, 2), row.parameters, row.backend]
