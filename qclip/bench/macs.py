"""How much a tower computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qclip import models

from .case import encode


def count_macs(explicit: nn.Module, tower: str, x: Tensor) -> int:
    """Multiply-accumulates that one call with `x` does in the linear maps and in attention of a float model in
    explicit form (`qclip.towers`), counted from the shapes that pass by."""
    total = 0

    def site(module: Any, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * (module.weight.numel() // module.weight.shape[0])

    def attention(module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        nonlocal total
        source, query = args[0], kwargs.get("query", args[3] if len(args) > 3 else None)
        length, width = source.shape[1], module.v.weight.shape[0]
        queries = length if query is None else query.shape[1]
        total += 2 * source.shape[0] * queries * length * width

    seen = models.towers(explicit)["vision" if tower == "image" else "text"]
    hooks = [s.module.register_forward_hook(site) for s in seen if s.kind != "embedding"]
    cores = [getattr(*block.attention) for block in seen.blocks if block.attention is not None]
    hooks += [core.register_forward_hook(attention, with_kwargs=True) for core in cores]
    encode(explicit, tower)(x)
    for hook in hooks:
        hook.remove()
    return total
