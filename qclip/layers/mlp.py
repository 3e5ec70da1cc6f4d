"""The MLP with its activation in the epilogue of the first product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import qkernels

from ..models.hooks import watched
from ..models.tower import Mlp, activate
from .gradients import refuse_gradients
from .linear import QuantizedLinear, fusable, takes_codes


class QuantizedMlp(Mlp):
    """The explicit MLP core, fused where its sites allow it: norm and quantization in one pass, the activation on the
    accumulator, and codes straight into fc2 with a static scale, or in groups where the backend wants that."""

    codes_between: bool  # fc1 could write what fc2 reads

    @classmethod
    def fuse(cls, core: Mlp) -> QuantizedMlp:
        """As `QuantizedAttention.fuse`."""
        core.__class__ = cls
        fc1, fc2 = core.fc1, core.fc2
        core.codes_between = (
            isinstance(fc1, QuantizedLinear)
            and isinstance(fc2, QuantizedLinear)
            and fc2.takes_plain_codes()
            and core.inner_norm is None
        )
        return core  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("fc1", "fc2", "inner_norm"):  # as in `QuantizedAttention`
            self.fuse(self)

    def unfuse(self) -> None:
        self.__class__ = Mlp  # type: ignore[assignment]

    def fuses(self, norm: nn.Module) -> bool:
        """Whether `forward` can take `norm` and run it in one pass with the quantization."""
        return takes_codes(self.fc1) and not watched(self.fc1, self.fc2) and fusable(norm)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        return refuse_gradients(self._forward(x, norm), x, self, norm)

    def _forward(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if not isinstance(fc1, QuantizedLinear) or fc1.branch is not None or watched(fc1, fc2):
            x = activate(fc1(x), self.activation)
        else:
            codes, scale = fc1.quantize(x, norm)
            if self.codes_between and isinstance(fc2, QuantizedLinear):
                static, group = fc2.input_scale, qkernels.output_group(x.device)
                if static is not None:
                    return fc2.linear(fc1.linear(codes, scale, self.activation, out_scale=static), static)  # type: ignore[no-any-return]
                if group is not None:
                    return fc2.linear(*fc1.linear(codes, scale, self.activation, out_group=group))  # type: ignore[no-any-return]
            x = fc1.linear(codes, scale, self.activation)
        return fc2(x if self.inner_norm is None else self.inner_norm(x))  # type: ignore[no-any-return]
