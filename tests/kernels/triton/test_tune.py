"""Choosing configurations by measurement: only when asked, kept between processes, never trusted blindly."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pytest
import torch

from qkernels.triton import tune

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Config:
    size: int


RULE, SLOW, FAST = Config(1), Config(2), Config(3)


@pytest.fixture
def timed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A GPU that is not there; returns how often was timed."""
    calls: list[int] = []

    def fastest(options, run):
        calls.append(len(options))
        return FAST

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QKERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "chip")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tune, "fastest", fastest)
    tune._known.cache_clear()
    yield calls
    tune._known.cache_clear()


def choose(m: int = 100, device: torch.device = DEVICE) -> Config:
    return tune.choose("op", device, (m, 64, 32), ("row",), RULE, lambda: [SLOW, FAST], lambda config: None)


def test_the_rule_decides_unless_asked(timed: list) -> None:
    assert choose() == RULE and not timed and not tune.cache_file().exists()


def test_what_was_measured_is_kept(timed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "1")
    assert choose() == FAST and timed == [3]
    assert choose(m=128) == FAST and timed == [3]  # the same power of two
    assert choose(m=200) == FAST and timed == [3, 3]
    assert choose(device=torch.device("cpu")) == RULE
    tune._known.cache_clear()  # as a new process
    monkeypatch.delenv("QKERNELS_AUTOTUNE")
    assert choose() == FAST and choose(m=1) == RULE and timed == [3, 3]
    assert len(json.loads(tune.cache_file().read_text())) == 2
    assert [path.name for path in tune.cache_file().parent.iterdir()] == ["triton.json"]


@pytest.mark.parametrize("content", ["", "[1]", "{", json.dumps({"key": asdict(SLOW)})])
def test_a_foreign_cache_does_no_harm(content: str, timed: list) -> None:
    tune.cache_file().parent.mkdir()
    tune.cache_file().write_text(content)
    assert choose() == RULE


def test_nothing_is_timed_while_a_graph_is_recorded(timed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == RULE and not timed


def test_a_choice_that_is_no_configuration_any_more_is_ignored(timed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "1")
    choose()
    text = tune.cache_file().read_text().replace('"size": 3', '"size": 9')
    tune.cache_file().write_text(text)
    tune._known.cache_clear()
    monkeypatch.delenv("QKERNELS_AUTOTUNE")
    assert choose() == RULE
