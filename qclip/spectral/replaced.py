"""A float copy of a model whose weights are replaced, one control after the other."""

from __future__ import annotations

import copy
from types import TracebackType

import torch
from torch import Tensor, nn

from qclip import models as qmodels
from qclip.errors import InputError

from ..seeds import generator
from .basis import Basis
from .change import Change
from .controls import Control
from .sites import choose_sites, effective_weight, other_weight, steps_of


class Replaced:
    """`model` is a float copy in explicit form; `put` changes its weights wherever quantization changed them (not in
    lookups, which have no spectrum). Basis and residual of every such weight are held: 24 bytes for each parameter.

    A context, so that the quantized model is back in its own form afterwards."""

    def __init__(self, float_model: nn.Module, quantized: nn.Module, label: str) -> None:
        self._quantized, self.label = quantized, label
        self.model = copy.deepcopy(float_model)
        self._towers = qmodels.towers(self.model)
        self.changes: dict[str, Change] = {}

    def __enter__(self) -> Replaced:
        self._form = qmodels.explicit_form(self._quantized)
        others = self._form.__enter__()
        for tower, site in choose_sites(self._towers, None):
            weight = effective_weight(tower, site)
            residual = other_weight(others, site, self.label, weight.shape) - weight
            if bool(residual.any()) and bool(weight.any()):
                self.changes[site.name] = Change(site.name, Basis.of(weight), residual, steps_of(others, site))
        if not self.changes:
            raise InputError(f"{self.label!r} has the float model's weights; there is nothing that a control replaces")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._form.__exit__(kind, error, trace)

    def put(self, control: Control, seed: int = 0, k: int = 0) -> None:
        """Every changed weight becomes the float one plus draw `k` of the control's residual. Weights for which the
        control cannot be made are the float ones."""
        for name, change in self.changes.items():
            weight = change.weight
            if control.fits(change):
                weight = weight + control.residual(change, generator(seed, f"{name} {control.name} {k}"))
            self.write(name, weight)

    @torch.no_grad()
    def write(self, site: str, weight: Tensor) -> None:
        """Put `[N, K]` in the place of one weight."""
        module = self._towers[site.split(".", 1)[0]].sites[site].module
        held: Tensor = module.weight  # type: ignore[assignment]
        held.copy_(weight.view(held.shape))
