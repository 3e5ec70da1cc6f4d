from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_limits

from tests.spectral.towers import Model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def fake_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Model` of `towers.py` tells its own towers."""
    monkeypatch.setattr("qclip.models.towers", Model.towers)
