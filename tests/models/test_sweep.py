"""Every name of open_clip is quantized close to float, or refused with the reason that is told (`benchmarks/sweep`)."""

from __future__ import annotations

import open_clip
import pytest

from benchmarks.sweep import LEAST, Outcome, sweep

SOME = ("PE-Core-T-16-384", "RN50")


@pytest.mark.slow
@pytest.mark.parametrize("name", open_clip.list_models())
def test_a_name_is_near_to_float_or_refused(name: str, full: bool) -> None:
    if not full and name not in SOME:
        pytest.skip("needs --full: all names take ten minutes")
    outcome = sweep(name)
    assert outcome.passes, str(outcome)


def test_what_passes() -> None:
    assert Outcome("ViT-B-32", (1.0, LEAST), None, 0.0).passes
    assert not Outcome("ViT-B-32", (1.0, LEAST - 1e-6), None, 0.0).passes
    assert not Outcome("ViT-B-32", None, "why not", 0.0).passes and not Outcome("RN50", None, "why not", 0.0).passes
