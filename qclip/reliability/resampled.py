"""Metrics on every resample, kept between runs: the same outputs resampled alike give the same numbers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qclip.metrics import metric
from qclip.store import Entry, Store, key_of

from .keys import STAGES


@dataclasses.dataclass(frozen=True)
class Kept:
    """Arrays of metrics by name, `[columns]` each, in a store."""

    store: Store
    seed: int
    replicates: int

    def fill(
        self, columns: int, metrics: Sequence[str], compute: Callable[[], Mapping[str, np.ndarray]], **depends: Any
    ) -> dict[str, np.ndarray]:
        """What `compute` gives, or gave in another run. metrics: those whose definitions it uses; depends: digests of
        outputs, names of resamplings and whatever else decides the numbers."""
        key = key_of(
            "resampled",
            STAGES["resampled"],
            columns=columns,
            metrics={name: metric(name).version for name in metrics},
            seed=self.seed,
            replicates=self.replicates,
            numpy=np.__version__,
            **depends,
        )
        entry = self.store.fill(key, lambda: _entry(compute()), lambda entry: _unsound(entry, columns))
        return {name: entry.arrays[name] for name in entry.facts["order"]}


def array_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) of arrays and their names."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _entry(values: Mapping[str, np.ndarray]) -> Entry:
    return Entry(values, {"order": list(values)})  # a file keeps its arrays in an order of its own


def _unsound(entry: Entry, columns: int) -> str:
    """What is wrong with stored values, "" where nothing is. NaN is a value: undefined."""
    order = entry.facts.get("order")
    if not isinstance(order, list) or set(map(str, order)) != set(entry.arrays) or len(order) != len(entry.arrays):
        return "its list of metrics is not that of its arrays"
    for name, values in entry.arrays.items():
        if values.dtype != np.float64 or values.shape != (columns,):
            return f"its {name} are {values.dtype} {list(values.shape)}, not float64 [{columns}]"
        if np.isinf(values).any():
            return f"its {name} hold infinite values"
    return ""
