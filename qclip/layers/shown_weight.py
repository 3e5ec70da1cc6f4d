"""What a quantized site shows as its `weight`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


class ShownWeight:
    """dtype, device and shape of the float weight, for libraries that look at these; its numbers are held as codes.

    Reading its numbers raises an error that says where they are, instead of computing with an empty or stale tensor.
    """

    requires_grad, grad, is_meta = False, None, False

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> None:
        self.dtype, self.device, self.shape = dtype, device, torch.Size(shape)
        self.ndim = len(shape)

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __repr__(self) -> str:
        return f"ShownWeight({tuple(self.shape)}, {self.dtype}, held as codes)"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"weight.{name}: {HELD}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(f"{getattr(function, '__name__', 'torch')}(weight): {HELD}")


HELD = "the weight is held as quantized codes; its values are dequantized_weight() of the same module"


def _refuse(self: ShownWeight, *_: object) -> NoReturn:
    raise TypeError(HELD)


for _name in ("matmul", "mul", "add", "sub", "truediv", "pow"):
    setattr(ShownWeight, f"__{_name}__", _refuse)
    setattr(ShownWeight, f"__r{_name}__", _refuse)
for _name in ("neg", "abs", "getitem", "setitem", "len", "iter", "float", "array", "imul", "iadd"):
    setattr(ShownWeight, f"__{_name}__", _refuse)
