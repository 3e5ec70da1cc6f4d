"""The MLP with its activation in the epilogue of the first product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import qkernels

from ..models.hooks import watched
from ..models.tower import ACTIVATIONS, Mlp, activate
from .gradients import refuse_gradients
from .linear import QuantizedLinear, behind, fusable, takes_codes


class QuantizedMlp(Mlp):
    """The explicit MLP core, fused where its sites allow it: norm and quantization in one pass, the activation on the
    accumulator, and codes straight into fc2 with a static scale, or in groups where the backend wants that. A gate and
    fc1 read one quantized input."""

    codes_between: bool  # fc1 could write what fc2 reads
    shares_input: bool  # gate and fc1 read the same codes

    @classmethod
    def fuse(cls, core: Mlp) -> QuantizedMlp:
        """As `QuantizedAttention.fuse`."""
        core.__class__ = cls
        gate, fc1, fc2 = core.gate, core.fc1, core.fc2
        core.shares_input = takes_codes(fc1) and gate is not None and fc1.same_input(gate)  # type: ignore[operator, assignment]
        core.codes_between = (
            gate is None
            and core.activation in ACTIVATIONS
            and isinstance(fc1, QuantizedLinear)
            and isinstance(fc2, QuantizedLinear)
            and fc2.takes_plain_codes()
            and core.inner_norm is None
        )
        return core  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("gate", "fc1", "fc2", "inner_norm"):  # as in `QuantizedAttention`
            self.fuse(self)

    def unfuse(self) -> None:
        self.__class__ = Mlp  # type: ignore[assignment]

    def fuses(self, norm: nn.Module) -> bool:
        """Whether `forward` can take `norm` and run it in one pass with the quantization."""
        takes = takes_codes(self.fc1) if self.gate is None else self.shares_input
        return takes and not watched(self.gate, self.fc1, self.fc2) and fusable(norm)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        return refuse_gradients(self._forward(x, norm), x, self, norm)

    def _forward(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if self.gate is not None:
            x = self._gated(x, norm)
        elif not isinstance(fc1, QuantizedLinear) or fc1.branch is not None or watched(fc1, fc2):
            x = activate(fc1(x), self.activation)
        else:
            codes, scale = fc1.quantize(x, norm)
            if self.codes_between and isinstance(fc2, QuantizedLinear):
                static, group = fc2.input_scale, qkernels.output_group(x.device)
                if static is not None:
                    return fc2.linear(fc1.linear(codes, scale, self.activation, out_scale=static), static)  # type: ignore[no-any-return]
                if group is not None:
                    return fc2.linear(*fc1.linear(codes, scale, self.activation, out_group=group))  # type: ignore[no-any-return]
            x = self._activated(fc1, codes, scale)
        return behind(self.inner_norm, fc2, x)

    def _gated(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        gate: Any = self.gate
        fc1: Any = self.fc1
        if not self.shares_input or watched(gate, fc1, self.fc2):
            return activate(gate(x), self.activation) * fc1(x)
        codes, scale = fc1.quantize(x, norm)
        return self._activated(gate, codes, scale) * fc1.linear(codes, scale)  # type: ignore[no-any-return]

    def _activated(self, site: Any, codes: Tensor, scale: Tensor) -> Tensor:
        """The product with the activation, in its kernel where that has it."""
        if self.activation in ACTIVATIONS:
            return site.linear(codes, scale, self.activation)  # type: ignore[no-any-return]
        return activate(site.linear(codes, scale), self.activation)
