"""`qclip quantize`: a model in, an artifact folder out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from qclip.errors import InputError

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
        str | None,
        typer.Option(
            "--recipe",
            help="wXaY[-static][-METHOD] or a JSON file; see `qclip recipes`. Without it: with --calibration the "
            "fastest one on this machine that stays near float on these images, else w8a8.",
        ),
    ] = None,
    calibration: common.Calibration = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="4.5bit (a weight, with its scales) or 60MB: sites get the widths that hurt least; "
            "--recipe says the rest.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", parser=common.output_path, help="The artifact's folder; NAME-RECIPE without it."
        ),
    ] = None,
    arch: common.Arch = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an unreadable calibration image.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Keep what methods find, block by block, in the user's cache folder until the run is over: the same "
            "command goes on where a killed one was.",
        ),
    ] = True,
    sites: Annotated[bool, typer.Option("--sites", help="Show the coverage site by site.")] = False,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Quantize a model and save it as an artifact: INT8 or INT4 codes, scales, and all that loading needs."""
    import qclip
    from qclip import artifact, ptq, recipes, rewrite
    from qclip.sensitivities import Budget

    measures = recipe is None and calibration is not None and budget is None
    chosen = recipes.get(recipe or ("w4a8" if budget else "w8a8"))
    ptq.refuse_trained(chosen)
    size = None if budget is None else Budget.parse(budget)
    if size is not None and calibration is None:
        raise InputError("--budget measures sites on images: name some with --calibration")
    ending = "quantized" if measures else chosen.name if size is None else size.text
    target = output or Path(f"{common.short_name(model)}-{ending}")
    artifact.check_output(target, force)
    common.set_threads(threads)
    if calibration is not None and size is None and not measures and not chosen.needs_data:
        common.say(f"--calibration {calibration} is not read: recipe {chosen.name!r} needs no data")
    common.say(f"loading {model}")
    loaded = qclip.load_model(model, arch=arch)
    if size is not None:
        chosen = _within(size, loaded, chosen, str(calibration), seed, strict)
    if measures:
        common.say("trying recipes on these images")
        with common.progress() as progress:
            choice = qclip.choose(loaded, str(calibration), seed=seed, strict=strict, progress=progress)
        for line in choice.reasons:
            common.say(line)
        chosen = choice.recipe
    before = sum(p.numel() for p in loaded.parameters()) * 4
    common.say(f"quantizing with {chosen.name}")
    with common.progress() as progress:
        qclip.quantize_(
            loaded, chosen, calibration=calibration, seed=seed, strict=strict, progress=progress, resume=resume
        )
    done = rewrite.quantization(loaded)
    assert done is not None
    coverage = done.coverage
    qclip.save(loaded, target, force=force)
    written = artifact.bytes_of(target)
    shares = coverage.shares()
    if json:
        rows = [vars(row) for row in coverage.rows]
        common.print_json(
            {
                "artifact": str(target),
                "recipe": chosen.to_dict(),
                "bytes": written,
                "float32_bytes": before,
                "coverage": shares,
                "bits_per_weight": coverage.bits_per_weight,
                "sites": rows,
            }
        )
        return
    if sites:
        columns = ["site", "kind", "state", "weights", "activations", "MMACs", "parameters", "backend"]
        common.print_table("coverage, site by site", columns, [_site(row) for row in coverage.rows])
    rows = [[state, *(round(100 * share, 1) for share in of.values())] for state, of in shares.items()]
    common.print_table("coverage", ["state", "MACs %", "parameters %"], rows)
    if coverage.bits_per_weight is not None:
        print(f"\n{coverage.bits_per_weight:.2f} bits per weight of the linear layers, with scales and side terms")
    print(f"\n{target}: {written / 1e6:.1f} MB, {written / before:.3f} of float32 ({before / 1e6:.1f} MB)")


def _within(size: Any, model: Any, base: Any, calibration: str, seed: int, strict: bool) -> Any:
    """`base` with the widths that `size` allows."""
    import qclip
    from qclip.sensitivities import probe_of, together

    activations = base.default.activation_bits
    common.say("measuring what each site needs")
    with common.progress() as progress:
        found = qclip.sensitivity(
            model, calibration, activation_bits=activations, seed=seed, strict=strict, progress=progress
        )
    whole = together(probe_of(model, calibration, seed=seed, strict=strict), activations)
    chosen = qclip.budgeted(model, size, found, base, whole)
    widths = Counter(p.weight_bits for p in [chosen.default, *(p for _, p in chosen.exceptions if p is not None)])
    common.say(
        f"{chosen.name}: {chosen.default.weight_bits} bits, and others for {len(chosen.exceptions)} sites ("
        f"{', '.join(f'{b} bits' for b in sorted(widths))})"
    )
    return chosen


def _site(row: Any) -> list[Any]:
    bits = [row.weight_bits or "float", row.activation_bits or "float"]
    return [row.site, row.kind, row.state, *bits, round(row.macs / 1e6, 2), row.parameters, row.backend]
