"""torch in float32, as the model was loaded, and in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ..case import Case, encode
from ..processor import TORCH_HELD_BY
from . import Setting


@dataclasses.dataclass(frozen=True)
class TorchFloat:
    """Model and input in `dtype`, eager and compiled."""

    name: str
    dtype: torch.dtype
    needs: tuple[str, ...] = ()
    held_by: tuple[str, ...] = TORCH_HELD_BY

    def settings(self, case: Case) -> Iterator[Setting]:
        model = case.model().to(self.dtype)
        x = case.x.to(self.dtype) if case.x.is_floating_point() else case.x
        instructions = torch.backends.cpu.get_cpu_capability()
        yield Setting("eager", case.run(model, x), instructions=instructions)
        case.say("torch.compile")
        compiled = torch.compile(encode(model, case.tower))
        yield Setting("compiled", lambda: compiled(x), instructions=instructions)


FLOAT32 = TorchFloat("torch-fp32", torch.float32)
BFLOAT16 = TorchFloat("torch-bf16", torch.bfloat16)
