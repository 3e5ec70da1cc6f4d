"""What a recording depends on besides its inputs, and whether it is still as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from . import hooks

SCALARS = (bool, int, float, str, type(None))


class Guards:
    """What a recording depends on besides its inputs: modules, parameters and their versions, hooks, settings."""

    def __init__(self, owner: nn.Module, below: Iterable[nn.Module]) -> None:
        found = [owner, *dict.fromkeys(m for top in below for m in top.modules() if m is not owner)]
        self.entries: list[tuple[dict, str, Any]] = []
        self.versions: list[tuple[Tensor, int]] = []
        self.places: list[tuple[Tensor, int]] = []  # setting `data` changes neither the object nor its version
        self.hooks = [m.__dict__[name] for m in found for name in hooks.FORWARD]
        for m in found:
            for group in (m._modules, m._parameters, m._buffers):
                self.entries += [(group, name, value) for name, value in group.items()]
            # Leaves are torch's and ours, whose settings are fixed; looking at them all would cost a tenth of a
            # millisecond.
            names = [n for n, v in m.__dict__.items() if isinstance(v, SCALARS) and n[0] != "_"] if m._modules else []
            self.entries += [(m.__dict__, name, m.__dict__.get(name)) for name in {*names, "training", "forward"}]
            tensors = [t for group in (m._parameters, m._buffers) for t in group.values() if t is not None]
            self.versions += [(t, t._version) for t in tensors if not t.is_inference()]
            self.places += [(t, t.data_ptr()) for t in tensors]
        self.plain = not any(m.training or hooks.forward_set(m) for m in found)

    def watched(self) -> bool:
        """Whether a module is in training, replaced in part or looked at now, so that each must be called by itself."""
        return not self.plain or (any(self.hooks) and any(map(hooks.active, self.hooks)))

    def hold(self) -> bool:
        """Whether all is as it was."""
        for owner, name, value in self.entries:
            now = owner.get(name)
            if now is not value and (isinstance(value, Tensor | nn.Module) or now != value):
                return False
        return all(tensor._version == version for tensor, version in self.versions) and all(
            tensor.data_ptr() == place for tensor, place in self.places
        )
