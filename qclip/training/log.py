"""Loss and norms of every step: a CSV file, and TensorBoard where that is installed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomic

FILE = "log.csv"


class Log:
    """Rows of numbers, one a step. `folder`: where they are written; None: nowhere."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.columns: list[str] = []
        self.rows: list[list[float]] = []
        self.board: Any = None

    def add(self, step: int, values: dict[str, float]) -> None:
        new = [name for name in values if name not in self.columns]
        self.columns += new
        for row in self.rows if new else ():
            row += [float("nan")] * len(new)
        self.rows.append([values.get(name, float("nan")) for name in self.columns])
        if self.board is None and self.folder is not None:
            self.board = _board(self.folder)
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def last(self, column: str) -> float:
        return self.rows[-1][self.columns.index(column)]

    def values(self) -> Tensor:
        """Float64 `[steps, columns]`."""
        return torch.tensor(self.rows, dtype=torch.float64).reshape(len(self.rows), len(self.columns))

    def load(self, columns: list[str], values: Tensor) -> None:
        self.columns, self.rows = list(columns), values.tolist()

    def write(self) -> None:
        """The whole file, at once."""
        if self.folder is None:
            return
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        out.writerow(["step", *self.columns])
        for step, row in enumerate(self.rows):
            out.writerow([step + 1, *("" if value != value else repr(value) for value in row)])
        write_atomic(self.folder / FILE, text.getvalue().encode())
        if self.board:
            self.board.flush()


def _board(folder: Path) -> Any:
    """TensorBoard's writer; False where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    return SummaryWriter(str(folder / "tensorboard"))
