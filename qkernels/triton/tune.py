"""Measured choices instead of the rules', for whoever asks for them.

With `QKERNELS_AUTOTUNE=1` the first call of a linear op with a new shape times every legal configuration on the GPU
(seconds: each is compiled) and writes the fastest to `triton.json` in the user's cache, the folder `qkernels` of
`$XDG_CACHE_HOME` or `~/.cache`. What was written is used from then on, with or without the variable; delete the file to
go back to the rules. Rows are counted in powers of two. Nothing is timed while a CUDA graph is recorded.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from .launch import power_of_two

Config = TypeVar("Config")


def cache_file() -> Path:
    """Where choices are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkernels" / "triton.json"


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    """The choices by key; a file that cannot be read counts as empty."""
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def choose(
    op: str,
    device: torch.device,
    shape: tuple[int, int, int],
    kinds: Sequence[Any],
    default: Config,
    options: Callable[[], list[Config]],
    run: Callable[[Config], None],
) -> Config:
    """The configuration for `(M, N, K)` and what else the op distinguishes: the measured one where there is one, else
    `default`, after a measurement where that was asked for."""
    wanted = os.environ.get("QKERNELS_AUTOTUNE") == "1"
    if device.type != "cuda" or not (wanted or _known()):
        return default
    m, n, k = shape
    chip = torch.cuda.get_device_name(device)
    key = " ".join(map(str, (chip, f"triton-{triton.__version__}", op, power_of_two(m), n, k, *kinds)))
    legal = {json.dumps(asdict(option)): option for option in (default, *options())}  # type: ignore[call-overload]
    # A choice of another version of this package may be no configuration any more.
    if (found := legal.get(json.dumps(_known().get(key)))) is not None:
        return found
    if not wanted or torch.cuda.is_current_stream_capturing():
        return default
    best = fastest(list(legal.values()), run)
    _save(key, asdict(best))  # type: ignore[call-overload]
    return best


def fastest(options: list[Config], run: Callable[[Config], None]) -> Config:
    """The configuration whose `run` takes the least time, by the median of many runs."""
    from triton.testing import do_bench

    return min(options, key=lambda option: do_bench(lambda: run(option), return_mode="median"))


def _save(key: str, choice: dict[str, Any]) -> None:
    """Add a choice to the file, which is replaced as a whole; a cache that cannot be written is none."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _known.cache_clear()
        choices = {**_known(), key: choice}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(choices, new, indent=1, sort_keys=True)
        os.replace(new.name, file)
    except OSError:
        _known()[key] = choice
    else:
        _known.cache_clear()
