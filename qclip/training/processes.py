"""The processes that train one model together, as `torchrun` starts them: each embeds its part of a batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import QclipError


class ProcessError(QclipError):
    """Another process of the run has stopped."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's say who did not answer, which is no reason
        raise ProcessError("another process of this run has stopped; what it said before tells why") from error


class Processes:
    """This process's `rank` of `size`. Alone, everything is what it was."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def of_environment(cls) -> Processes:
        """What `torchrun` says, joined by gloo, or by NCCL where there are GPUs; alone without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of `count` rows are this process's."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order of rank; no gradient passes."""
        if self.size == 1:
            return rows.detach().clone()
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        with _told():
            dist.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, in one message, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _told():
            dist.all_reduce(flat)
        for tensor, found in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(found.view_as(tensor))

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            with _told():
                dist.barrier()

    def each(self, value: int) -> list[int]:
        """What it is in every process, by rank."""
        device = "cuda" if self.size > 1 and dist.get_backend() == "nccl" else "cpu"
        return self.gathered(torch.tensor([value], device=device)).tolist()  # type: ignore[no-any-return]
