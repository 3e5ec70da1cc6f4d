"""A linear site on the quantization grid in float arithmetic: the numbers as they would be, not the speed."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import ArtifactError
from ..untrusted.schema import one_of, optional, real, whole
from .activations import ASYM, SYM, quantize_dequantize, quantize_twin
from .gradients import refuse_gradients
from .site import Description, QuantizedSite
from .transforms import transformed

LEAST_SHARE = 1e-3


class SimulatedLinear(QuantizedSite):
    """Weight codes as in a real site (6-bit codes in an `Int8Weight`, 4-bit in an `Int4Weight`), computed in float.
    `activation_bits`: None leaves the input float. `activation_grid`: what the input is rounded to where it is dynamic;
    a static one has a zero point or none. `negative_step`: its step below 0, of a twin input (`quantize_twin`).
    `input_share`: of a token's range that its codes cover, of a dynamic input."""

    packs = False
    SETTINGS = {
        "activation_bits": optional(whole(2, 8)),
        "activation_grid": one_of(SYM, ASYM),
        "negative_step": optional(real(1e-30, 1e30)),
        "input_share": real(LEAST_SHARE, 1),
    }
    USUAL = {"activation_grid": SYM, "negative_step": None, "input_share": 1.0}

    def __init__(
        self,
        *args: Any,
        activation_bits: int | None,
        activation_grid: str = SYM,
        negative_step: float | None = None,
        input_share: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.activation_bits, self.activation_grid = activation_bits, activation_grid
        self.negative_step, self.input_share = negative_step, input_share

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> QuantizedSite:
        twin = facts.get("negative_step") is not None
        if twin and (facts["activation_bits"] is None or not facts["input_scale"] or facts["input_zero"]):
            raise ArtifactError(f"{cls.__name__} has a twin input, which takes a static scale and no zero point")
        dynamic = facts["activation_bits"] is not None and not facts["input_scale"]
        if facts.get("input_share", 1.0) != 1.0 and not dynamic:
            raise ArtifactError(f"{cls.__name__} covers a share of each token, which takes a dynamic input")
        return super().from_facts(facts)

    def describe(self) -> Description:
        return Description(self.shape, "simulated", self.grid.bits, self.activation_bits, stored_bits=self.stored_bits)

    def pack(self) -> None:
        """Stays canonical: no kernel reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y = seen = transformed(x, self.transforms)
        if self.activation_bits is not None and self.negative_step is not None and self.input_scale is not None:
            y = quantize_twin(y, self.activation_bits, self.input_scale, self.negative_step)
        elif self.activation_bits is not None:
            given = self.input_scale, self.input_zero, self.activation_grid, self.input_share
            y = quantize_dequantize(y, self.activation_bits, *given)
        y = F.linear(y.to(x.dtype), self.quantized.dequantize().to(x.dtype), self.bias)
        return refuse_gradients(y if self.branch is None else y + self.branch(seen).to(y.dtype), x, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation_bits={self.activation_bits}"
