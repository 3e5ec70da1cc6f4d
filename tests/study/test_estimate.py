"""What a plan would take: images counted for every variant, time by a probe of each model."""

from __future__ import annotations

from pathlib import Path

import pytest

from qclip.study import estimate as module
from qclip.study.estimate import estimate
from qclip.study.run import prepare
from qclip.study.store import StudyStore
from tests.study.small import plan_of


def test_images_of_every_variant_and_condition_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepare(plan_of(tmp_path), StudyStore.create(tmp_path / "s"), threads=1)
    monkeypatch.setattr(module, "_probed", lambda *_: (0.5, 2.0))
    found = estimate(ready, 1, probe=True)
    assert found["images"] == 3 * (60 + 40 + 60), "float and two variants; two sets as they are, one corrupted"
    assert found["seconds"] == 0.5 * found["images"] + 2.0 * len(ready.grid)
    assert estimate(ready, 2, probe=True)["seconds"] == found["seconds"] / 2
    assert estimate(ready, 1, probe=False)["seconds"] is None


def test_what_is_there_takes_no_time(tmp_path: Path) -> None:
    ready = prepare(plan_of(tmp_path), StudyStore.create(tmp_path / "s"), threads=1)
    ready.todo.clear()
    assert estimate(ready, 1, probe=True)["seconds"] == 0.0


def test_the_probe_parts_what_an_image_costs_from_what_a_set_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare(plan_of(tmp_path), StudyStore.create(tmp_path / "s"), threads=1)
    clock = [0.0]

    def evaluate(models: object, data: list[object], **settings: object) -> None:
        clock[0] += 3.0 + 0.25 * len(data)

    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    image, each = module._probed(ready.todo[0], "cpu")
    assert image == pytest.approx(0.25) and each == pytest.approx(3.0)
