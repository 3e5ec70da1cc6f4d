"""How long spectra take: of the weights of ViT-B/32 with their controls, and of `photos` everything, controls run
through the model.

    python -m benchmarks.spectra_time weights
    python -m benchmarks.spectra_time photos --data /path/to/cifar10_test.parquet --ood /path/to/dtd10_64.parquet
    python -m benchmarks.spectra_time photos --data ... --ood ... --part controls --control white

Nothing is kept from an earlier run: embeddings go to a folder that is deleted afterwards.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import qclip
from qclip import data as qdata
from qclip import spectral
from qclip.files import write_atomic
from qclip.machine import environment

IMAGES = 1000
PARTS = ("weights", "controls", "interventions", "fourier", "gratings")


def weights(recipe: str) -> dict[str, float]:
    """ViT-B/32 with random weights: the time depends on their shapes only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = qclip.load_model("ViT-B-32")
    small = qclip.quantize(model, recipe)
    began = time.perf_counter()
    results = qclip.weight_spectrum(model, {recipe: small})
    seconds = time.perf_counter() - began
    print(*spectral.verdict(results.rows), sep="\n")
    return {"weights": seconds}


def photos(recipe: str, data: str, ood: str, wanted: list[str], names: list[str], cache: str) -> dict[str, float]:
    """Weights, features of 1,000 images with the controls, which embed once for these and for what is measured of the
    whole model, interventions, Fourier, gratings; `cache` is an empty folder for embeddings."""
    model = qclip.load_model("photos")
    group = {"float": model, recipe: qclip.quantize(model, recipe)}
    quantized = {recipe: group[recipe]}
    sets = [qdata.load(f"parquet:{path}").select(np.arange(IMAGES)) for path in (data, ood)]
    evaluate = functools.partial(
        qclip.evaluate, data=sets[0], ood=sets[1], scores=["mcm"], measurements=["clean", "ood"], cache=cache
    )
    pixels = spectral.Pixels.read(group, sets[0], IMAGES)
    steps = {
        "weights": lambda: qclip.weight_spectrum(model, quantized),
        "controls": lambda: spectral.through_model(
            model, quantized, evaluate, controls=names, pixels=pixels, interventions=False
        ),
        "interventions": lambda: spectral.through_model(model, quantized, evaluate, controls=[]),
        "fourier": lambda: spectral.fourier(group, pixels),
        "gratings": lambda: spectral.gratings(group, pixels.take(256)),
    }
    seconds, parts = {}, []
    for name in wanted:
        began = time.perf_counter()
        parts.append(steps[name]())
        seconds[name] = time.perf_counter() - began
        print(f"{name:20} {seconds[name]:7.1f} s", flush=True)
    print(*spectral.verdict([row for part in parts for row in part.rows]), sep="\n")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weights", "photos"])
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--data")
    parser.add_argument("--ood")
    parser.add_argument("--part", action="append", choices=PARTS, help="Of `photos`; repeatable. Default: all.")
    parser.add_argument("--control", action="append", choices=spectral.CONTROLS.names(), help="Default: all.")
    parser.add_argument("--output", type=Path, help="Add the times to this JSON.")
    asked = parser.parse_args()
    if asked.what == "photos" and not (asked.data and asked.ood):
        parser.error("photos needs --data and --ood")
    parts, controls = asked.part or [*PARTS], asked.control or spectral.CONTROLS.names()
    if asked.what == "weights":
        seconds = weights(asked.recipe)
    else:
        with tempfile.TemporaryDirectory() as cache:
            seconds = photos(asked.recipe, asked.data, asked.ood, parts, controls, cache)
    print(f"{asked.what}: {sum(seconds.values()):.1f} s on {torch.get_num_threads()} threads")
    if asked.output is not None:
        facts = {"what": asked.what, "recipe": asked.recipe, "controls": controls, "seconds": seconds, **environment()}
        runs = json.loads(asked.output.read_text()) if asked.output.exists() else []
        facts |= {"threads": torch.get_num_threads(), "total": sum(seconds.values())}
        write_atomic(asked.output, f"{json.dumps([*runs, facts], indent=1)}\n".encode())


if __name__ == "__main__":
    main()
