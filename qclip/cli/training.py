"""Options of commands that train: what to learn from, and `qclip.training.Settings`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import common

MOST = 10**8  # steps, or pairs

Recipe = Annotated[
    str,
    typer.Option("--recipe", help="wXaY-[METHOD+]QUANTIZER, as in w4a8-lsq and w4a4-rotation+lsq, or a JSON file."),
]
Pairs = Annotated[
    list[str],
    typer.Option("--pairs", metavar="DATA", help="Images with captions, or with classes: KIND:PATH; repeatable."),
]
Objective = Annotated[
    str | None, typer.Option("--objective", help="Terms with their weights, as in contrastive+10*mse.")
]
Steps = Annotated[int | None, typer.Option("--steps", min=0, max=MOST, help="0: only scales are found.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, max=MOST, help="Pairs of a step, of all processes.")]
Micro = Annotated[
    int | None, typer.Option("--micro", min=1, max=MOST, help="Pairs at a time; the step stays the same.")
]
Rate = Annotated[
    float | None, typer.Option("--rate", min=1e-12, max=10, callback=common.finite, help="Of weights, at its highest.")
]
ScaleRate = Annotated[
    float | None,
    typer.Option("--scale-rate", min=1e-12, max=10, callback=common.finite, help="Of quantizers' scales."),
]
Decay = Annotated[
    float | None,
    typer.Option("--decay", min=0, max=10, callback=common.finite, help="Weight decay, of weights alone."),
]
Warmup = Annotated[
    float | None,
    typer.Option("--warmup", min=0, max=1, callback=common.finite, help="Share of the steps in which rates rise."),
]
Start = Annotated[
    float | None,
    typer.Option(
        "--start", min=0, max=1, callback=common.finite, help="Share of the steps before anything is rounded."
    ),
]
LogitScale = Annotated[
    str | None, typer.Option("--logit-scale", help="frozen, learned, or tuned afterwards on held-out pairs.")
]
Precision = Annotated[str | None, typer.Option("--precision", help="float32 or bfloat16 (autocast).")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Blocks run again in backward: less memory, more time.")
]
Ema = Annotated[
    float | None,
    typer.Option("--ema", min=0, max=1, callback=common.finite, help="Decay of an average of the weights; 0: none."),
]
HeldOut = Annotated[
    float | None,
    typer.Option("--held-out", min=0, max=1, callback=common.finite, help="Share of the pairs not trained on."),
]
Samples = Annotated[int | None, typer.Option("--samples", min=2, max=MOST, help="Pairs drawn from DATA.")]
SaveEvery = Annotated[int | None, typer.Option("--save-every", min=1, max=MOST, help="Steps between checkpoints.")]
NAMED = {"recipe": "qclip.recipes:QUANTIZERS", "objective": "qclip.training.objectives:OBJECTIVES"}


def settings(**given: Any) -> dict[str, Any]:
    """What was asked for; the rest is the quantizer's."""
    return {name: value for name, value in given.items() if value is not None and value is not False}
