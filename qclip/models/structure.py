"""A snapshot of a model's modules: puts them back, and names what a rewrite lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import ModelError
from . import hooks

#: Contents that change.
CONTENTS = ("_modules", "_parameters", "_buffers", *hooks.FORWARD, *hooks.DETAILS, *hooks.OTHERS)


class Structure:
    """Every module of a model with its class, its attributes and its contents, held by reference: no tensor is copied,
    and none is freed meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.parts = [
            (m, type(m), dict(m.__dict__), {name: dict(m.__dict__[name]) for name in CONTENTS if name in m.__dict__})
            for m in self.names
        ]
        self.parameters = sum(p.numel() for p in model.parameters())

    def restore(self) -> None:
        """The same modules of the same classes, in the same places, with the same tensors, hooks and flags."""
        for module, kind, attributes, contents in self.parts:
            module.__class__ = kind  # type: ignore[assignment]
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for name, held in contents.items():
                place = module.__dict__[name]  # others hold it: handles of hooks
                place.clear()
                place.update(held)

    @contextlib.contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """`restore` where the block raises, whatever it is."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def refuse_losses(self, libraries: tuple[str, ...] = ()) -> None:
        """Raises ModelError naming the module whose code, hooks or parameters the model does not have any more.
        `libraries`: whose classes were taken apart, see `Family.libraries`."""
        present = set(self.model.modules())
        carried = {id(m.__dict__["_forward_hooks"]) for m in present}
        for module, kind, *_ in self.parts:
            name = self.names[module] or "the model"
            if type(module) is not kind:
                for method in type(module).overridden(kind):  # type: ignore[attr-defined]
                    hooks.refuse_foreign_code(module, name, kind, method, libraries)
            elif module not in present and ".parametrizations." not in name:
                hooks.refuse_foreign_code(module, name, kind, libraries=libraries)
                hooks.refuse_others(module, name)
                if hooks.watched_itself(module) and id(module.__dict__["_forward_hooks"]) not in carried:
                    raise ModelError(
                        f"{name} has forward hooks, but the quantized model does not call it with the same arguments; "
                        "remove them, and register them after quantize_ on what runs there then, or on the whole block"
                    )
        lost = self.parameters - sum(p.numel() for p in self.model.parameters())
        if lost > 0:
            raise ModelError(
                f"{lost} parameters of {type(self.model).__name__} belong to modules that no adapter knows"
            )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: a layer may keep a packed weight that it makes in here
            yield
    finally:
        for module, mode in modes:
            module.training = mode
