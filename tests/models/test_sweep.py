"""Every name of open_clip is quantized close to float, or refused with the reason that is told (`benchmarks/sweep`)."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest

from benchmarks.sweep import HUGGING_FACE, LEAST, Outcome, main, sweep

SOME = ("PE-Core-T-16-384", "RN50")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*open_clip.list_models(), *HUGGING_FACE])
def test_a_name_is_near_to_float_or_refused(name: str, full: bool) -> None:
    if not full and name not in SOME:
        pytest.skip("needs --full: all names take ten minutes")
    outcome = sweep(name)
    assert outcome.passes, str(outcome)


def test_a_run_goes_on_where_it_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def measured(name: str, whole: bool = False) -> Outcome:
        seen.append(name)
        return Outcome(name, (1.0, 0.9 if name == "bad" else 1.0), None, 0.1)

    monkeypatch.setattr("benchmarks.sweep.sweep", measured)
    file = tmp_path / "found.json"
    assert main(["--json", str(file), "one"]) == 0
    assert main(["--json", str(file), "one", "two"]) == 0 and seen == ["one", "two"]
    assert main(["--json", str(file), "bad"]) == 1 and main(["--json", str(file), "two"]) == 1
    content = json.loads(file.read_text())
    assert list(content["names"]) == ["one", "two", "bad"] and content["names"]["bad"]["cosines"] == [1.0, 0.9]
    assert content["versions"]["torch"] and content["cpu"]


def test_what_passes() -> None:
    assert Outcome("ViT-B-32", (1.0, LEAST), None, 0.0).passes
    assert not Outcome("ViT-B-32", (1.0, LEAST - 1e-6), None, 0.0).passes
    assert not Outcome("ViT-B-32", None, "why not", 0.0).passes and not Outcome("RN50", None, "why not", 0.0).passes
