"""Patch embeddings in the joint space: the last block of a vision tower by its value path (GL-MCM, Miyai et al.
2304.04521, after MaskCLIP, Zhou et al. 2112.01071)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .tower import Block, normed


class _Reached(Exception):
    """The input of the last block is there; what would follow is not computed."""


@dataclasses.dataclass(frozen=True)
class ValuePath:
    """The last block with every patch attending to itself alone, then what the class token goes through behind it.

    The layers are the model's own, quantized where it is: v, out, fc1, fc2, the last norm and the projection. They stay
    valid while the model keeps its weights and device.

    block: whose input is taken. attention, mlp: its explicit cores, their norms before and what is applied behind.
    tail: `[B, P, D]` -> `[B, P, E]`. prefix: tokens before those of the patches.
    """

    block: nn.Module
    attention: Any
    attention_norm: nn.Module
    mlp: nn.Module
    mlp_norm: nn.Module
    tail: Callable[[Tensor], Tensor]
    behind_attention: tuple[Callable[[Tensor], Tensor], ...] = ()
    behind_mlp: tuple[Callable[[Tensor], Tensor], ...] = ()
    prefix: int = 1

    @classmethod
    def of(cls, block: Block, tail: Callable[[Tensor], Tensor], **rest: Any) -> ValuePath:
        """Of a block whose cores and norms a tower describes."""
        places = (block.attention, block.attention_norm, block.mlp, block.mlp_norm)
        attention, attention_norm, mlp, mlp_norm = (getattr(*place) for place in places if place is not None)
        return cls(block.module, attention, attention_norm, mlp, mlp_norm, tail, **rest)

    def patches(self, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """`[B, P, E]`, not normalised, of `[B, 3, H, W]`; `encode` runs the model on them."""
        x = self._input(encode, images)
        y = self.attention.v(self.attention_norm(x))
        if self.attention.inner_norm is not None:
            y = self.attention.inner_norm(y)
        y = self.attention.out(y)
        for module in self.behind_attention:
            y = module(y)
        x = x + y
        y = normed(self.mlp_norm, self.mlp, x)
        for module in self.behind_mlp:
            y = module(y)
        return self.tail((x + y)[:, self.prefix :])

    def _input(self, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(args[0] if args else next(iter(kwargs.values())))
            raise _Reached

        handle = self.block.register_forward_pre_hook(see, with_kwargs=True)
        try:
            encode(images)
        except _Reached:
            return seen[0]
        finally:
            handle.remove()
        raise ModelError(f"the last block of the vision tower, {type(self.block).__name__}, was not run")


def undefined(model: nn.Module, why: str) -> ModelError:
    """The error for a tower whose patches have no embeddings of their own."""
    kind = f"{type(model).__module__}.{type(model).__name__}"
    return ModelError(f"patch embeddings are not defined for {kind}: {why}")
