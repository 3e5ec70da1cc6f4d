"""What every adapter needs to bring a foreign model into explicit form: subclasses set on an object, split projections,
activations known by their values, and blocks described by their sites."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .hooks import carry, forward_of_its_class
from .tower import ACTIVATIONS, UNFUSED, Attention, Block, Mlp, Site, activate

Place = tuple[nn.Module, str]  # getattr(*place) is the module


class Form:
    """What `become` lays over an object: written as if it were the foreign class, whose attributes it reads."""

    #: Methods that call those of the foreign class, so that a subclass may override these.
    WRAPS: ClassVar[frozenset[str]] = frozenset()
    #: Methods of the foreign class that do not run any more.
    REPLACES: ClassVar[frozenset[str]] = frozenset()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def overridden(cls, base: type) -> list[str]:
        """The methods of `base` that do not run in this form."""
        forms = [form for form in cls.__mro__[1:] if issubclass(form, Form) and form is not Form]
        own = {name for form in forms for name, value in vars(form).items() if callable(value)}
        return sorted(name for name in (own - cls.WRAPS) | cls.REPLACES if callable(getattr(base, name, None)))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles name the two classes that the object's own is made of: no module holds that one."""
        return _blank, type(self).__bases__, self.__dict__


def _blank(form: type, base: type) -> Any:
    kind: Any = _subclass(form, base)
    return kind.__new__(kind)


@functools.cache
def _subclass(form: type, base: type) -> type:
    # Under the name of the foreign class: transformers, accelerate and FSDP look classes up by their names.
    names = {"__doc__": form.__doc__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (form, base), names)


def become(module: nn.Module, form: type) -> None:
    """Lay the methods of `form` over those of the object's own class: the object stays itself (`isinstance`, hooks,
    `deepcopy`), only what it computes with is explicit."""
    if not isinstance(module, form):
        if forward_of_its_class(module):
            del module.__dict__["forward"]
        module.__class__ = _subclass(form, type(module))


def linear(weight: Tensor, bias: Tensor | None = None, like: Tensor | None = None) -> nn.Linear:
    """An nn.Linear `[N, K]` over the memory of `weight` and `bias` (a copy where that is not contiguous); trained or
    frozen as `like` is."""
    n, k = weight.shape
    new = nn.Linear(k, n, bias=bias is not None, device="meta")
    grad = True if like is None else like.requires_grad
    new.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=grad)
    return new


class Projection(nn.Linear):
    """A linear map that was a parameter `[K, N]`: `x @ projection` goes on working."""

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self(x)  # type: ignore[no-any-return]


def projection(weight: nn.Parameter, training: bool) -> nn.Linear:
    """A parameter `[K, N]` as a linear module."""
    new = linear(weight.detach().T, like=weight)
    new.__class__ = Projection
    return new.train(training)


def succeed(old: nn.Module, new: Any, positional: bool = False) -> Any:
    """`new` in the mode of `old` and with its hooks, see `hooks.carry`."""
    carry(old, new, positional)
    return new.train(old.training)


def split(weight: Tensor, bias: Tensor | None, parts: int, like: Tensor | None = None) -> list[nn.Linear]:
    """A fused projection `[parts * N, K]` as `parts` linears."""
    biases = [None] * parts if bias is None else bias.chunk(parts)
    return [linear(w, b, like) for w, b in zip(weight.chunk(parts), biases, strict=True)]


def activation_name(module: nn.Module, unfused: bool = False) -> str:
    """Which of the kernels' activations this is, or of all with `unfused`, told by its values. Raises ModelError."""
    known = (*ACTIVATIONS, *UNFUSED) if unfused else ACTIVATIONS
    x = torch.linspace(-6, 6, 97, device="cpu")
    with torch.no_grad():
        y = module.forward(x.clone())  # hooks on it are not asked
    for name in known:  # exact and tanh GELU are 5e-4 apart, QuickGELU 2e-2
        if torch.allclose(y, activate(x, name), rtol=0, atol=1e-5):
            return name
    raise UnsupportedError(module, f"activation {_of(module)} is not supported; known are {', '.join(known)}")


class UnsupportedError(ModelError):
    """A module that no adapter knows. Who made it does not know where in the model it stands: see `telling_where`."""

    def __init__(self, module: nn.Module, message: str) -> None:
        super().__init__(message)
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:  # a model that keeps it can be copied
        return type(self), (self.module, str(self))


@contextlib.contextmanager
def telling_where(names: Mapping[nn.Module, str]) -> Iterator[None]:
    """An UnsupportedError raised inside begins with the module's name, of those that a model had before. A module that
    lacks what those of its kind have is one, too."""
    try:
        yield
    except (UnsupportedError, AttributeError) as error:
        if not isinstance(error, UnsupportedError):
            if not isinstance(error.obj, nn.Module) or error.obj not in names:
                raise
            error = unsupported(error.obj, f"it has no {error.name!r}")
        if name := names.get(error.module):
            raise ModelError(f"{name}: {error}") from error
        raise error


def _of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def unsupported(module: nn.Module, why: str = "") -> UnsupportedError:
    """The error for a class that no adapter knows, or one of its settings."""
    reason = f": {why}" if why else ""
    return UnsupportedError(
        module,
        f"{_of(module)} is not supported{reason}; supported are open_clip's CLIP, CustomTextCLIP and "
        "CoCa with ViT towers, timm's VisionTransformer, Eva, FastVit, SwinTransformer and ConvNeXt, Hugging Face's "
        "CLIPModel and SiglipModel; 'qclip models --supported' lists names",
    )


def present(module: nn.Module | None) -> nn.Module | None:
    """None for the Identity that libraries put where a norm is switched off."""
    return None if isinstance(module, nn.Identity) else module


def no_dropout(module: nn.Module, *rates: float) -> None:
    if any(rate > 0 for rate in rates):
        warnings.warn(
            f"{_of(module)} has dropout inside attention or MLP, which the explicit form leaves out; "
            "it changes training only",
            stacklevel=2,
        )


def from_multihead_attention(mha: nn.MultiheadAttention) -> Attention:
    """torch's packed attention (`batch_first`) as a core; the keys and values may have widths of their own."""
    if not mha.batch_first:
        raise unsupported(mha, "batch_first=False")
    if mha.bias_k is not None or mha.bias_v is not None or mha.add_zero_attn:
        raise unsupported(mha, "bias_k, bias_v or add_zero_attn is set")
    no_dropout(mha, mha.dropout)
    if mha.in_proj_weight is not None:
        q, k, v = split(mha.in_proj_weight, mha.in_proj_bias, 3, mha.in_proj_weight)
    else:
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        q, k, v = (linear(w, b, w) for w, b in zip(weights, biases, strict=True))
    return Attention(q, k, v, mha.out_proj, mha.num_heads).train(mha.training)


def affine(norm: nn.Module | None) -> bool:
    """Whether a scale per channel can be folded into this norm."""
    return getattr(norm, "weight", None) is not None


def attention_sites(
    name: str, core: Attention, norm: Place | None, rows: int, pool: str = "", queries: int = 0, feed: str = "norm"
) -> dict[str, Site]:
    """The four sites of an attention core by kind. With `pool="pool_"` queries are no projection of the same input."""
    foldable = norm is not None and affine(getattr(*norm))
    sites = {}
    for kind in ("q", "k", "v"):
        own = bool(pool) and kind == "q"
        sites[pool + kind] = Site(
            f"{name}.{kind}",
            pool + kind,
            "raw" if own and norm is None else feed,
            f"{name}.{'query' if own else 'in'}",
            core,
            kind,
            foldable and not (own and norm is None),
            queries if own else rows,
        )
    inner = getattr(core, "inner_norm", None)
    sites[pool + "out"] = Site(
        f"{name}.out",
        pool + "out",
        "attention" if inner is None else "norm",
        f"{name}.context",
        core,
        "out",
        True,
        queries or rows,
    )
    # A pool without projections (timm allows it) has no such site.
    return {kind: site for kind, site in sites.items() if not isinstance(site.module, nn.Identity)}


def mlp_sites(
    name: str, core: Mlp, norm: Place | None, rows: int, foldable: bool | None = None, feed: str = "norm"
) -> dict[str, Site]:
    """(gate,) fc1 and fc2 by kind. A scale cannot pass through the activation, so fc2 is smoothable only behind a
    norm."""
    inner = getattr(core, "inner_norm", None)
    first = norm is not None and affine(getattr(*norm)) if foldable is None else foldable
    return {
        kind: Site(f"{name}.{kind}", kind, feed, f"{name}.in", core, kind, first, rows)
        for kind in ("gate", "fc1")
        if getattr(core, kind, None) is not None
    } | {
        "fc2": Site(
            f"{name}.fc2",
            "fc2",
            "activation" if inner is None else "norm",
            f"{name}.hidden",
            core,
            "fc2",
            affine(inner),
            rows,
        ),
    }


def transformer_block(
    name: str,
    module: nn.Module,
    attention: Place,
    attention_norm: Place | None,
    mlp: Place,
    mlp_norm: Place | None,
    rows: int,
    feed: str = "norm",
) -> Block:
    """A residual block: norm, attention, norm, MLP. Norms are None, and `feed` is "raw", where a core reads the
    residual stream as it is."""
    sites = attention_sites(f"{name}.attn", getattr(*attention), attention_norm, rows, feed=feed)
    sites |= mlp_sites(f"{name}.mlp", getattr(*mlp), mlp_norm, rows, feed=feed)
    return Block(name, module, attention, attention_norm, mlp, mlp_norm, sites)


def patch_site(tower: str, owner: nn.Module, attribute: str, rows: int) -> list[Site]:
    """The patch embedding, where it is one convolution."""
    return [Site(f"{tower}.patch", "patch", "raw", f"{tower}.pixels", owner, attribute, False, rows)]


def embedding_site(owner: nn.Module, attribute: str, rows: int) -> list[Site]:
    return [Site("text.embedding", "embedding", "raw", "text.tokens", owner, attribute, False, rows)]


def projection_site(tower: str, owner: nn.Module, attribute: str, rows: int = 1) -> list[Site]:
    """The map into the joint space, behind the tower's last norm; none where the model has none."""
    if present(getattr(owner, attribute, None)) is None:
        return []
    return [Site(f"{tower}.projection", "projection", "norm", f"{tower}.features", owner, attribute, True, rows)]


def by_name(*groups: list[Site]) -> dict[str, Site]:
    return {site.name: site for group in groups for site in group}
