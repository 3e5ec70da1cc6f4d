"""Which OOD scores are computed: those that were named, or all that have what they need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from qclip import data as qdata
from qclip.data.classes import folded
from qclip.errors import InputError, ModelError, option
from qclip.models import value_path
from qclip.results import Results

from .request import EvalSet
from .scores import NEEDS, SCORES, Score


def what_is_given(sets: Iterable[EvalSet]) -> set[str]:
    """What these sets give a score."""
    train = [each for each in sets if each.role == "train"]
    labelled = any(each.labels is not None for each in train)
    return {"patches"} | ({"train"} if train else set()) | ({"labels"} if labelled else set())


def negative_words(given: str | os.PathLike[str] | Sequence[str] | None, sets: Iterable[EvalSet]) -> tuple[str, ...]:
    """The words, each once, without the classes of the first set. Raises InputError where none is left."""
    if given is None:
        return ()
    words = qdata.read_lines(given, "negatives") if isinstance(given, str | os.PathLike) else list(given)
    known = {folded(name) for name in next(iter(sets)).classes}
    out = tuple({folded(word): word for word in words if folded(word) not in known}.values())
    if not out:
        raise InputError(
            f"{option('negatives')} names no word that is not a class; give words that are none, one a line"
        )
    return out


def enough_to_learn_from(scores: Mapping[str, Score], sets: Iterable[EvalSet]) -> None:
    """Raises InputError for a score that needs more training images than there are; some cannot be read, perhaps, or
    are too few for their width, which is seen when it is fitted."""
    for each in sets:
        for name, score in scores.items():
            least = getattr(score, "least", 0) if each.role == "train" else 0
            if len(each.data) < least:
                raise InputError(
                    f"score {name!r} needs {least} training images or more, and {len(each.data)} were given; "
                    f"give more ({option('train')}), or leave it out"
                )


def _without_patches(models: Mapping[str, nn.Module]) -> str:
    """Why the patches of one of the models have no embeddings, "" where those of all have."""
    for label, model in models.items():
        try:
            value_path(model)
        except ModelError as why:
            return f"looks at patches, and {label!r} embeds none: {why}"
    return ""


def wanted_scores(
    results: Results, names: Iterable[str] | None, given: set[str], models: Mapping[str, nn.Module]
) -> dict[str, Score]:
    """The scores that were named, or all that have what they need; `given`: what there is of `NEEDS`. `models`: those
    whose patches may be looked at; none where no set of other classes asks for scores."""
    out: dict[str, Score] = {}
    left_out: dict[str, list[str]] = {}
    for name in SCORES.names() if names is None else names:
        score = SCORES.made(name)
        if unknown := sorted(set(score.needs) - set(NEEDS)):
            raise InputError(f"score {name!r} needs {unknown[0]!r}; evaluate gives {', '.join(sorted(NEEDS))}")
        if {"patches", "train"} <= score.needs or {"patches", "negatives"} <= score.needs:
            raise InputError(f"score {name!r} needs patches and something to learn from; it can have only one of them")
        if lacking := next((need for need in NEEDS if need in score.needs - given), None):
            why, argument = NEEDS[lacking]
            why += f" ({option(argument)})" if argument else ""
            if names is not None:
                raise InputError(f"score {name!r} {why}")
            left_out.setdefault(why, []).append(name)
            continue
        if "patches" in score.needs and (why := _without_patches(models)):
            if names is not None:
                raise InputError(f"score {name!r} {why}")
            left_out.setdefault(why, []).append(name)
            continue
        out[name] = score
    for why, without in left_out.items() if models else ():
        results.note(f"scores left out: {', '.join(without)} (each {why})")
    return out
