"""What a worker holds in memory from one task to the next is bounded, and is what the plan was expanded with."""

from __future__ import annotations

import types
import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qclip.errors import ModelError
from qclip.study import resident
from qclip.study.resident import Resident
from qclip.study.store import StudyStore


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resident:
    """Models that are their own names; the artifact in the folder "x" has the key "x"."""
    monkeypatch.setattr(resident.zoo, "load_model", lambda name, _: Named(name))
    monkeypatch.setattr(resident, "model_key", lambda model: model.name)
    monkeypatch.setattr(resident.artifact, "read_description", lambda folder: folder)
    monkeypatch.setattr(resident.artifact, "description_hash", lambda content: content)
    monkeypatch.setattr(resident.artifact, "load", lambda folder, _: Named(folder))
    return Resident(StudyStore(tmp_path), "runtime", "cpu", None)


def task(model: str) -> Any:
    return types.SimpleNamespace(model=model, facts={f"model {model}": model})


def variant(held: Resident, model: str, folder: str, key: str) -> nn.Module:
    found = held.variant(task(model), types.SimpleNamespace(artifact=folder), key, wait=True)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_one_float_model_is_held_with_its_variants(held: Resident) -> None:
    model, small = weakref.ref(held.model(task("a"))), weakref.ref(variant(held, "a", "x", "x"))
    assert held.model(task("a")) is model() and variant(held, "a", "x", "x") is small()
    held.model(task("b"))
    assert model() is None and small() is None


@pytest.mark.parametrize(("model", "but", "stays"), [("a", "x", True), ("a", "y", False), ("b", "x", False)])
def test_variants_of_the_last_task_that_the_next_has_not_are_released(
    model: str, but: str, stays: bool, held: Resident
) -> None:
    small = weakref.ref(variant(held, "a", "x", "x"))
    held.release(model, [but])
    assert (small() is not None) == stays


def test_what_is_not_what_the_plan_was_expanded_with_is_refused(held: Resident) -> None:
    with pytest.raises(ModelError, match="'x' has changed since the plan was expanded; run it again"):
        variant(held, "a", "x", "another")
    changed = task("a")
    changed.facts["model a"] = "another"
    with pytest.raises(ModelError, match="'a' has changed since the plan was expanded; run it again"):
        held.model(changed)
