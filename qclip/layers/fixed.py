"""Modules whose quantization constants keep their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class Fixed(nn.Module):
    """A module whose buffers named in `FIXED` `.half()` and `.bfloat16()` leave alone; they move between devices."""

    FIXED: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        fixed = {name: self._buffers[name] for name in self.FIXED if self._buffers[name] is not None}
        for name in fixed:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        for name, tensor in fixed.items():
            device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
            if device == tensor.device:
                moved = tensor
            elif tensor.device.type == "meta":
                moved = torch.empty_like(tensor, device=device)
            else:
                moved = tensor.to(device)
            self._buffers[name] = moved
        return self
