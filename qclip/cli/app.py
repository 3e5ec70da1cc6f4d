"""The command tree: which commands there are, and the options of `qclip` itself."""

from __future__ import annotations

from typing import Annotated

import typer

from . import (
    bench,
    controls,
    demo,
    doctor,
    evaluate,
    models,
    quantize,
    recipes,
    report,
    sensitivity,
    spectrum,
    study,
    train,
    verify,
)

app = typer.Typer(
    name="qclip",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize CLIP-like models with real INT8 and INT4 kernels, and measure what that does to their reliability.",
    epilog="[bold]Start with[/] qclip demo, then qclip quantize --help. Exit codes: 0, 1 (ran, something failed), "
    "2 (bad input), 130 (Ctrl-C).",
)


def show_version(value: bool) -> None:
    if value:
        import qclip

        print(f"qclip {qclip.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
) -> None:
    pass


for module in (
    demo,
    quantize,
    train,
    controls,
    evaluate,
    verify,
    spectrum,
    sensitivity,
    report,
    bench,
    doctor,
    models,
    recipes,
):
    name = module.__name__.rsplit(".", 1)[-1]
    app.command(name, cls=getattr(module, "Command", None), epilog=module.EXAMPLES)(module.command)
app.add_typer(study.app, name="study")
