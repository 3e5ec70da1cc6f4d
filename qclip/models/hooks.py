"""Hooks, and whatever else a user may have put on a module: seen, carried over to its successor, or refused by name."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError

FORWARD = ("_forward_hooks", "_forward_pre_hooks")
DETAILS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
OTHERS = {
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward hooks",
    "_state_dict_hooks": "state_dict hooks",
    "_state_dict_pre_hooks": "state_dict hooks",
    "_load_state_dict_pre_hooks": "load_state_dict hooks",
    "_load_state_dict_post_hooks": "load_state_dict hooks",
}
LIBRARIES = ("torch", "open_clip", "timm", "transformers", "qclip")
#: transformers leaves these on its layers after the first call with `output_hidden_states`; in other calls they do
#: nothing (`ExplicitTower` of huggingface_form.py runs those in which they do).
IDLE = "transformers.utils.output_capturing"
MORE = (
    "so it may compute more than its weight says (x W^T + b); merge the adapter first (peft: "
    "model.merge_and_unload()), or put the library's own layer in its place"
)


def watched(*modules: nn.Module | None) -> bool:
    """Whether anyone looks at what goes into or comes out of one of `modules`, or of every module: then each must be
    called by itself, with what it would get in the float model."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(m is not None and (active(m._forward_hooks) or active(m._forward_pre_hooks)) for m in modules)


def active(hooks: dict) -> bool:
    """Whether one of `hooks` does something in an ordinary call."""
    return bool(hooks) and any(getattr(hook, "__module__", None) != IDLE for hook in hooks.values())


def watched_itself(module: nn.Module) -> bool:
    return active(module._forward_hooks) or active(module._forward_pre_hooks)


def carry(old: nn.Module, new: nn.Module, positional: bool = False) -> None:
    """Give `new`, which is called as `old` was and answers as it did, the forward hooks of `old`: the very same
    dictionaries, so that the handles that their owners hold go on working.

    `positional`: only the positional arguments are the same; hooks that want the others stay behind.
    """
    if not (positional and (old._forward_hooks_with_kwargs or old._forward_pre_hooks_with_kwargs)):
        for name in (*FORWARD, *DETAILS):
            new.__dict__[name] = old.__dict__[name]


def refuse_others(module: nn.Module, name: str) -> None:
    """Raises ModelError where hooks stand on `module` that mean nothing on what replaces it."""
    for kind, words in OTHERS.items():
        if any(not _torchs_own(hook) for hook in module.__dict__.get(kind, {}).values()):
            raise ModelError(
                f"{name} has {words}, which cannot be kept: no gradient passes the quantized layer that replaces it, "
                "and its state has other names; remove them first"
            )
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # weight_norm, spectral_norm, prune: they set `weight`
            raise ModelError(
                f"{name} has the hook {type(hook).__name__} of torch.nn.utils, which computes its weight anew in each "
                "call; make it permanent first (torch.nn.utils.remove_weight_norm, prune.remove ...), or use "
                "torch.nn.utils.parametrizations"
            )


def _torchs_own(hook: Any) -> bool:
    """Whether torch registered `hook` for itself (parametrizations do)."""
    return (getattr(getattr(hook, "hook", hook), "__module__", None) or "").startswith("torch.")


#: What runs when a module is called, besides its `forward`.
CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")


def runs_library_code(
    module: nn.Module, kind: type | None = None, method: str = "forward", libraries: tuple[str, ...] = ()
) -> bool:
    """Whether `module` (of the class `kind`, default: its own) computes what its library's class does: no subclass
    overrides `method` or what calls it, and none is set on the object. `libraries`: what counts besides `LIBRARIES`."""
    return _foreign_method(kind or type(module), method, libraries) is None and _set_on_object(module) is None


def _foreign_method(kind: type, method: str, libraries: tuple[str, ...]) -> str | None:
    for name in (method, *(CALLS if method == "forward" else ())):
        home = getattr(getattr(kind, name, None), "__module__", None) or ""
        if not any(home == library or home.startswith(f"{library}.") for library in (*LIBRARIES, *libraries)):
            return name
    return None


def forward_of_its_class(module: nn.Module) -> bool:
    """Whether the `forward` on this object is that of its class: transformers 4 leaves it there after a call with
    `output_hidden_states`."""
    held = module.__dict__.get("forward")
    return isinstance(held, MethodType) and held.__self__ is module and held.__func__ is type(module).forward


def forward_set(module: nn.Module) -> bool:
    """Whether `module` computes by a `forward` that stands on the object, not by that of its class."""
    return "forward" in module.__dict__ and not forward_of_its_class(module)


def _set_on_object(module: nn.Module) -> str | None:
    return "forward" if forward_set(module) else next((name for name in CALLS if name in module.__dict__), None)


def refuse_foreign_code(
    module: nn.Module,
    name: str,
    kind: type | None = None,
    method: str = "forward",
    libraries: tuple[str, ...] = (),
) -> None:
    """Raises ModelError where `runs_library_code` is false."""
    if found := _set_on_object(module):
        raise ModelError(
            f"{name} has a {found} of its own, set on the object, which the quantized model would not run; remove it "
            "first (accelerate: remove_hook_from_module)"
        )
    if found := _foreign_method(kind or type(module), method, libraries):
        raise ModelError(f"{name} is a {_of(kind or type(module))} with a {found} of its own, {MORE}")


def refuse_layer(module: nn.Module, name: str) -> None:
    """Raises ModelError where a linear layer, convolution or lookup is not what its weight says: LoRA and the like."""
    if isinstance(module, Tensor):  # a parameter that a parametrization replaced by what it computes
        raise ModelError(
            f"{name} is no parameter but computed in each call, which works for weights of layers only; make "
            "it permanent first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    refuse_foreign_code(module, name)
    plain = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    if not plain or (isinstance(module, nn.Embedding) and module.max_norm is not None):
        raise ModelError(f"{name} is a {_of(type(module))}, {MORE}")


def _of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
