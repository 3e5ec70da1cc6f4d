"""No gradient passes a quantized layer: rounding has none, and gradients around it would be incomplete."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GradientError

_library = torch.library.Library("qclip", "DEF")
_library.define("refuse_gradient(Tensor gradient) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _refuse(gradient: Tensor) -> Tensor:
    raise GradientError(
        "gradients do not pass a quantized layer: compute them with the float model (qclip.dequantize_ makes one of "
        "this model), train what qclip.prepare makes of the float model, freeze all parameters before the quantized "
        "layers (requires_grad_(False)), or call the model under torch.no_grad()"
    )


_library.impl("refuse_gradient", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("qclip::refuse_gradient", torch.empty_like, lib=_library)


class _Refusing(torch.autograd.Function):
    """y as it is; backward raises, through an op, so that compilers which trace backward ahead of time can."""

    @staticmethod
    def forward(y: Tensor, *sources: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.shapes = [source.shape for source in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        refused = torch.ops.qclip.refuse_gradient(gradient).sum()
        return (None, *(refused.expand(shape) for shape in ctx.shapes))


def refuse_gradients(y: Tensor, *sources: Tensor | nn.Module | None) -> Tensor:
    """Returns y, which ops without gradients made of `sources` (tensors, or modules for their parameters). It requires
    a gradient where one of `sources` does; a backward pass through it raises GradientError."""
    if not torch.is_grad_enabled():
        return y
    tensors = [t for s in sources for t in (s.parameters() if isinstance(s, nn.Module) else (s,)) if t is not None]
    wanting = [t for t in tensors if t.requires_grad]
    return _Refusing.apply(y.detach(), *wanting) if wanting else y
