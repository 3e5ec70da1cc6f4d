from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qclip.spectral import judgements, verdict, weight_spectrum
from tests.spectral.towers import Model, power_law, rounded, truncated, white

Change = Callable[[torch.Tensor], torch.Tensor]


def judged(change: Change, sites: int = 6) -> tuple[str, str]:
    matrices = [power_law(seed=seed) for seed in range(sites)]
    rows = weight_spectrum(Model(matrices), {"q": Model([change(m) for m in matrices], quantized=True)}).rows
    (found,), (said,) = judgements(rows), verdict(rows)
    return found.finding, said


@pytest.mark.usefixtures("fake_towers")
@pytest.mark.parametrize(
    ("change", "finding", "said"),
    [
        (lambda w: 0.997 * w, "shrunk", "a uniform shrink by 0.30 %, no filter"),
        (lambda w: 1.01 * w, "grown", "a uniform growth by 1.00 %, no filter"),
        (white, "open", "nothing that white noise of equal norm would not show"),
        (lambda w: white(0.95 * w), "shrunk", "a uniform shrink by 4.98 %, no filter"),
        (truncated, "damped", "high-rank damping beyond every control, by 100.0 % of the band's energy"),
        (lambda w: truncated(w, kept=0.9), "damped", "high-rank damping beyond every control, by 19.0 %"),
        (lambda w: truncated(0.98 * w, kept=0.9), "damped", "high-rank damping beyond every control"),
        (lambda w: truncated(w, kept=1.1), "raised", "high-rank amplification beyond every control, by 21.0 %"),
        (lambda w: truncated(w, 0, 1.0) + rounded(w, 8) - w, "open", "nothing that white noise"),
    ],
    ids=["shrink", "growth", "white", "shrink+white", "cut", "damped", "damped+shrink", "raised", "8 bit"],
)
def test_shrink_noise_and_filter_have_verdicts_of_their_own(change: Change, finding: str, said: str) -> None:
    found = judged(change)
    assert found[0] == finding and said in found[1], found


@pytest.mark.usefixtures("fake_towers")
def test_one_site_is_no_finding() -> None:
    assert verdict(weight_spectrum(Model([power_law()]), {"q": Model([truncated(power_law())])}).rows) == []


CONTROLS = ("white", "white_layer", "uniform", "shuffled", "shrink", "truncated")


def rows_of(shape: tuple, tail: tuple, level: tuple, beyond_shape: dict, beyond_level: dict) -> list[dict]:
    """Rows of one tower; intervals are (low, high)."""

    def row(metric: str, ends: tuple, at: int | None = None, reference: str = "") -> dict:
        band = {} if at is None else {"axis": "band"}
        value = {"value": sum(ends) / 2, "low": ends[0], "high": ends[1], "n": 9}
        common = {"model": "q", "set": "vision", "role": "tower", "subset": "ranks 64-", "axis": ""}
        return common | band | value | {"metric": metric, "reference": reference, "at": at}

    rows = [row("gain", (0.999, 1.001), 0), row("gain", (0.5, 0.6), 8), row("gain", tail, 64)]
    rows += [row("shape", shape), row("level", level)]
    rows += [row("shape", beyond_shape.get(name, (shape[0], shape[1])), None, name) for name in CONTROLS]
    rows += [row("level", beyond_level.get(name, (level[0] - 1, level[1] - 1)), None, name) for name in CONTROLS]
    return rows


TAIL, LEVEL, SHAPE = (0.95, 0.97), (0.98, 0.99), (-0.05, -0.03)


@pytest.mark.parametrize(
    ("tail", "shape", "level", "beyond_shape", "beyond_level", "finding", "said"),
    [
        (TAIL, SHAPE, LEVEL, {}, {}, "damped", "beyond every control"),
        (TAIL, SHAPE, LEVEL, {"truncated": (0.1, 0.2)}, {}, "damped", "beyond every control"),
        (TAIL, SHAPE, LEVEL, {"white": (-0.05, 0.01)}, {}, "shrunk", "reached by a control (white)"),
        (TAIL, SHAPE, LEVEL, {"uniform": (-0.05, 0.01)}, {}, "shrunk", "reached by a control (uniform)"),
        (TAIL, SHAPE, LEVEL, {"shuffled": (-0.05, 0.01)}, {}, "shrunk", "reached by a control (shuffled)"),
        (TAIL, SHAPE, LEVEL, {"shrink": (-0.05, 0.01)}, {}, "shrunk", "reached by a control (shrink)"),
        ((0.95, 1.02), SHAPE, (0.98, 1.01), {}, {}, "open", "the gain of the tail itself is not clear of 1"),
        (TAIL, (-0.05, 0.01), LEVEL, {}, {}, "shrunk", "whether it is the same in every band cannot be told"),
        (
            TAIL,
            (-0.05, 0.01),
            LEVEL,
            dict.fromkeys(CONTROLS, SHAPE),
            {},
            "shrunk",
            "whether it is the same in every band cannot be told",
        ),
        (TAIL, (-0.001, 0.001), LEVEL, {}, {}, "shrunk", "a uniform shrink by 1.50 %, no filter"),
        (TAIL, (-0.01, 0.01), LEVEL, {}, {"white": (-0.1, 0.1)}, "open", "nothing that white noise"),
        (TAIL, (-0.01, 0.01), LEVEL, {}, {"uniform": (-0.1, 0.1)}, "open", "nothing that white noise"),
        (TAIL, (-0.01, 0.01), LEVEL, {}, {"shuffled": (-0.1, 0.1)}, "shrunk", "shrink"),
        ((1.03, 1.05), (0.03, 0.05), (1.0, 1.1), {}, {}, "raised", "high-rank amplification"),
        ((1.03, 1.05), (0.03, 0.05), (1.0, 1.1), {"shrink": (-0.01, 0.1)}, {}, "open", "(shrink)"),
        ((0.99, 1.01), (-0.01, 0.01), (1.01, 1.02), {}, {}, "grown", "growth by 1.50 %"),
        ((0.99, 1.01), (-0.01, 0.01), (1.01, 1.02), {}, {"white": (-0.01, 0.1)}, "open", "nothing"),
    ],
)
def test_a_claim_needs_every_interval_clear(tail, shape, level, beyond_shape, beyond_level, finding, said) -> None:
    rows = rows_of(shape, tail, level, beyond_shape, beyond_level)
    (found,) = judgements(rows)
    assert found.finding == finding
    (sentence,) = verdict(rows)
    assert sentence.startswith("q, vision tower, ranks 64-: ") and said in sentence


def test_a_control_that_is_not_installed_is_held_against_a_shape() -> None:
    rows = rows_of(SHAPE, TAIL, LEVEL, {}, {})
    foreign = next(row for row in rows if row["metric"] == "shape" and row["reference"] == "shrink")
    rows.append(foreign | {"reference": "of another package", "low": -0.05, "high": 0.01})
    assert judgements(rows)[0].finding == "shrunk" and "of another package" in verdict(rows)[0]
