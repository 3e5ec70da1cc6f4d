"""What a command compares: names and recipes in, groups of labelled models out; then their results and the page."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from qclip import files
from qclip.errors import InputError

from . import common

FLOAT = "float"
GRATED = 256  # images that gratings are added to
RESULTS, PAGE = "results.json", "report.html"


def groups(
    names: list[str],
    recipes: list[str] | None,
    *,
    calibration: str | None = None,
    arch: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    strict: bool = False,
) -> Iterator[dict[str, Any]]:
    """Groups of label -> model, each to be evaluated together: its first model is what the others are compared with.

    Without recipes all models are one group, as they are. With recipes every model is a group of its own: as loaded
    (`float`, always first) and quantized by each recipe.
    """
    import qclip

    labels = _distinct([common.short_name(name) for name in names])
    if not recipes:
        common.say(f"loading {', '.join(names)}")
        yield {label: qclip.load_model(n, device, arch) for label, n in zip(labels, names, strict=True)}
        return
    from qclip.ptq import refuse_trained
    from qclip.recipes import get

    if duplicates := {r for r in recipes if recipes.count(r) > 1}:
        raise InputError(f"--recipe {sorted(duplicates)[0]} was given twice; once is enough")
    wanted = [get(recipe) for recipe in recipes if recipe != FLOAT]
    for recipe in wanted:
        refuse_trained(recipe)
    named = [recipe.name for recipe in wanted] + [FLOAT]
    if duplicates := {name for name in named if named.count(name) > 1}:
        raise InputError(f"two recipes are named {sorted(duplicates)[0]!r}; rename one in its JSON file")
    for label, name in zip(labels, names, strict=True):
        common.say(f"loading {name}")
        model = qclip.load_model(name, device, arch)
        prefix = "" if len(names) == 1 else f"{label} "
        group = {prefix + FLOAT: model} if FLOAT in recipes else {}
        for recipe in wanted:
            common.say(f"quantizing {name} with {recipe.name}")
            with common.progress() as progress:
                small = qclip.quantize(model, recipe, calibration, seed, strict=strict, progress=progress)
            group[prefix + recipe.name] = small
        yield group


def evaluate(group: dict[str, Any], spectra: bool, **settings: Any) -> Any:
    """`qclip.evaluate` of one group, with a progress bar, and its weight spectra."""
    from qclip.study.measure import with_spectra

    with common.progress() as progress:
        return with_spectra(group, spectra, progress, **settings)


def spectrum(group: dict[str, Any], **settings: Any) -> Any:
    """`qclip.weight_spectrum` of one group as Results, with a progress bar."""
    import qclip

    (label, first), *others = group.items()
    with common.progress() as progress:
        return qclip.weight_spectrum(first, dict(others), label=label, progress=progress, **settings)


def image_spectra(
    group: dict[str, Any],
    data: str,
    images: int,
    *,
    measured: Any | None,
    controls: list[str] | None,
    seed: int,
    seeds: int,
) -> Any:
    """Features with their controls, Fourier spectra and gratings of one group on the first images of a set. With
    `measured`, see there, controls and interventions through the model as well."""
    import qclip
    from qclip import spectral

    (label, first), *others = group.items()
    pixels = spectral.Pixels.read(group, data, images)
    few, small = pixels.take(GRATED), dict(others)
    names = spectral.CONTROLS.names() if controls is None else controls
    settings: dict[str, Any] = {"controls": names, "seeds": seeds, "seed": seed, "label": label}
    with common.progress() as progress:
        settings["progress"] = progress
        if measured is not None:
            features = spectral.through_model(first, small, measured, pixels=pixels, **settings)
        else:
            features = spectral.feature_spectrum(first, small, pixels, **settings)
        return qclip.Results.merge(
            features,
            spectral.fourier(group, pixels, seed=seed, progress=progress),
            spectral.gratings(group, few, seed=seed, progress=progress),
        )


def measured(data: str, ood: list[str], images: int, cache: bool, seed: int) -> Any:
    """What is measured of controls: accuracy and calibration on the first images of a labelled set, detection of others
    by MCM. Raises what can be said of the sets before there are models."""
    import numpy as np

    from qclip import data as qdata
    from qclip.reliability import check, evaluate

    def first(name: str) -> Any:
        found = qdata.load(name)
        return found.select(np.arange(min(images, len(found))))

    settings: dict[str, Any] = {
        "data": first(data),
        "ood": [first(name) for name in ood],
        "scores": ["mcm"],
        "measurements": ["clean", "ood"] if ood else ["clean"],
    }
    check(**settings)
    return functools.partial(evaluate, **settings, seed=seed, cache=cache)


def join(parts: list[Any]) -> Any:
    """One table from several, made by this command line; recipes that several models have are tested over them."""
    import qclip
    from qclip.reliability.across import across_models

    whole = qclip.Results.merge(*parts)
    across_models(whole)
    whole.meta["command"] = common.command_line()
    return whole


def check_output(folder: Any, force: bool) -> None:
    """Raises, before the work, where `write` could not write."""
    files.check_folder(folder, (RESULTS, PAGE), force)


def write(results: Any, folder: Any, shown: Any = None) -> None:
    """results.json and report.html, both or neither. `shown`: what of the results is on the page; None: all."""
    import qclip

    with files.whole_folder(folder, last=PAGE) as part:
        results.to_json(part / RESULTS)
        qclip.report(results if shown is None else shown, part / PAGE)


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]
