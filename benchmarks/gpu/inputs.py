"""Random inputs, and outputs full of what no result holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .machine import Machine
from .oracle import require

Case = tuple[str, Callable[[], None]]  # a name, and what raises WrongError where the op is wrong
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Inputs:
    """Random tensors, and outputs full of what no result holds: NaN, and -128, which is no code."""

    def __init__(self, machine: Machine) -> None:
        self.device, self.tiny = machine.device, machine.tiny
        self.generator = torch.Generator(self.device).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def codes(self, *shape: int, low: int = -127, high: int = 127) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device, dtype=torch.int8)

    def poison(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        value = float("nan") if dtype.is_floating_point else -128
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def shapes(self, full: list[tuple[int, ...]], tiny: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return tiny if self.tiny else full


def written(codes: Tensor) -> None:
    require(not (codes == -128).any(), "some codes were never written")
