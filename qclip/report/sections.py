"""The parts of the page below the verdicts: what each draws and tabulates, and what it says where there is nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from . import absolute, bars, damping, figures, spectra
from .index import Index

Draw = Callable[[Index], list[figures.Panel]]
Tabulate = Callable[[Index], list[absolute.Grid]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a section is made, and what is said where it has nothing."""

    anchor: str
    title: str
    intro: str
    absent: str
    draw: Draw = lambda _: []
    tabulate: Tabulate = lambda _: []
    sentences: Callable[[Index], list[str]] = lambda _: []
    grids_title: str = "All numbers"


PLANS = (
    Plan(
        "calibration",
        "Accuracy and calibration",
        "Bars show how often the model was right at each confidence; the diagonal is perfect calibration. Where "
        "confidence exceeds accuracy the gap is hatched orange, where it falls short, blue. Below is the number of "
        "images in each bin: bins with few images wobble.",
        "No labelled set was evaluated, so there is neither accuracy nor calibration.",
        figures.reliability,
        absolute.labelled,
    ),
    Plan(
        "ood",
        "OOD detection",
        "How well a score separates images of known classes (ID) from others. The dashed diagonal is chance. FPR95 is "
        "the share of OOD images accepted where 95 % of ID images are.",
        "No OOD set was given, so detection was not measured.",
        figures.roc,
        absolute.detection,
    ),
    Plan(
        "noise",
        "Noise robustness",
        "The same corrupted images for every model. Marks of one severity are set side by side a little, so that their "
        "intervals can be seen. These are each model's own; the paired differences above are sharper.",
        "No corrupted images were evaluated, so noise robustness was not measured.",
        figures.noise,
        absolute.corrupted,
    ),
    Plan(
        "agreement",
        "Agreement with the reference",
        "Image by image: how near the embeddings are, and how many predictions changed.",
        "There is no second model to agree with.",
        tabulate=absolute.agreement,
        grids_title="",
    ),
    Plan(
        "spectra",
        "Spectra of the weights",
        "What of each weight's singular directions is left after rounding. A gain of 1 leaves a rank band as it was; "
        "below 1 it is damped. SQNR falls with rank under any noise, and rounding raises the tail of a weight's own "
        "spectrum, so only a difference to white noise of equal norm says something about quantization itself.",
        "Weight spectra were not computed.",
        lambda index: spectra.gains(index) + spectra.singular_values(index),
        lambda index: absolute.last_bands(index) + absolute.ranks(index),
        damping.damping,
    ),
    Plan(
        "coverage",
        "Coverage",
        "Real: integer kernels run it. Simulated: float arithmetic on the quantization grid, good for judging "
        "reliability, never for speed. Float: left as it was.",
        "No quantized model told how its layers are computed.",
        bars.coverage,
        absolute.sites,
        grids_title="Site by site",
    ),
    Plan(
        "speed",
        "Speed and size",
        "Ratios are to the reference. Times are taken in passing, while images were embedded; `qclip bench` measures "
        "speed. Models with simulated layers have no ratio of time.",
        "Neither size nor time was recorded.",
        bars.size_and_speed,
    ),
)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. Without panels and grids only `absent` is printed."""

    anchor: str
    title: str
    intro: str
    panels: list[figures.Panel]
    grids: list[absolute.Grid]
    absent: str
    sentences: list[str]
    grids_title: str  # "" shows them openly


def sections(index: Index) -> list[Section]:
    """The parts of the page below the verdicts, in order."""
    return [
        Section(
            plan.anchor,
            plan.title,
            plan.intro,
            plan.draw(index),
            plan.tabulate(index),
            plan.absent,
            plan.sentences(index),
            plan.grids_title,
        )
        for plan in PLANS
    ]
