"""Transforms of a site's input that change its weight to match, so that the float product stays what it is:

    input(x) @ weight(w).T + bias(w) == x @ w.T        (bias(w) = 0 where it is None)

for x `[..., K]` and w `[N, K]`. A site has a list of them, applied one after the other before its input is quantized.
Sites that share an input share the instances, so that they go on sharing the quantized input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import qkernels
from qkernels.hadamard import base_order

from ..errors import ArtifactError
from ..registry import Registry
from ..untrusted.schema import one_of, record, text, whole
from .fixed import Fixed
from .values import check_finite, check_normal


class Transform(Fixed):
    """One transform of inputs of `width` channels. Its tensors are float32 buffers, named in `FIXED`."""

    PER_CHANNEL: ClassVar[tuple[str, ...]] = ()  # buffers float32 [width] that the constructor takes, in its order

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @property
    def fused(self) -> Tensor | None:
        """Float32 `[K]`, the vector that kernels multiply the input by in one pass with its quantization, where that is
        all there is to do; None: `input` runs before the quantizer."""
        return None

    def input(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def weight(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def undo(self, w: Tensor) -> Tensor:
        """The inverse of `weight`."""
        raise NotImplementedError

    def bias(self, w: Tensor) -> Tensor | None:
        """What must be added to the product, float32 `[N]`, from the weight before the transform; None: nothing."""
        return None

    def same(self, other: Transform) -> bool:
        """Whether both do the same to an input."""
        if self is other:
            return True
        if type(self) is not type(other) or self.width != other.width:
            return False
        return all(equal(getattr(self, name), getattr(other, name)) for name in self.FIXED)

    def facts(self) -> dict[str, Any]:
        """What `from_facts` needs to make an empty one, as JSON."""
        return {"class": type(self).__name__, "width": self.width}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Transform:
        """One of this form whose tensors are empty, on the current default device."""
        width = int(facts["width"])
        return cls(*(torch.empty(width) for _ in cls.PER_CHANNEL)) if cls.PER_CHANNEL else cls(width)

    def check_tensor(self, attribute: str, tensor: Tensor, what: str, turned: bool = False) -> None:
        """Raises ArtifactError for numbers that this transform cannot hold; `what` names the tensor."""
        check_finite(tensor, what)

    def extra_repr(self) -> str:
        return str(self.width)


class Scale(Transform):
    """`x * factor`, and the weight's columns divided by it: SmoothQuant, AWQ. `factor` float32 `[K]`, without zeros."""

    FIXED = PER_CHANNEL = ("factor",)
    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__(len(factor))
        self.register_buffer("factor", factor.float())

    @property
    def fused(self) -> Tensor | None:
        return self.factor

    def check_tensor(self, attribute: str, tensor: Tensor, what: str, turned: bool = False) -> None:
        check_normal(tensor, what, positive=False)

    def input(self, x: Tensor) -> Tensor:
        return x.float() * self.factor

    def weight(self, w: Tensor) -> Tensor:
        return w / self.factor

    def undo(self, w: Tensor) -> Tensor:
        return w * self.factor


class Shift(Transform):
    """`x - shift`, and what that takes away is a bias: RepQ-ViT, GELU outputs made one-sided. `shift` float32 `[K]`."""

    FIXED = PER_CHANNEL = ("shift",)
    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__(len(shift))
        self.register_buffer("shift", shift.float())

    def input(self, x: Tensor) -> Tensor:
        return x.float() - self.shift

    def weight(self, w: Tensor) -> Tensor:
        return w

    def undo(self, w: Tensor) -> Tensor:
        return w

    def bias(self, w: Tensor) -> Tensor:
        return w.float() @ self.shift


class Hadamard(Transform):
    """The orthonormal Hadamard transform of the channels, which spreads outliers over all of them (QuaRot). After a
    `Scale` by random signs it is a random rotation."""

    def input(self, x: Tensor) -> Tensor:
        return qkernels.hadamard_transform(x.float())

    def weight(self, w: Tensor) -> Tensor:
        return qkernels.hadamard_transform(w.float().contiguous())

    def undo(self, w: Tensor) -> Tensor:
        return qkernels.hadamard_transform(w.float().contiguous(), transpose=True)


class RandomHadamard(Transform):
    """A random rotation of any width in O(K log K): random signs, then a Hadamard transform. Where `hadamard_transform`
    has none of that width: signs and the transform of the first 2^k channels, signs and that of the last 2^k (RaBitQ-H
    of RaanA, arXiv 2504.03717), 2^k the largest power of two within. `signs` int8 `[rounds, K]`, -1 or 1."""

    FIXED = ("signs",)
    signs: Tensor

    def __init__(self, signs: Tensor) -> None:
        super().__init__(signs.shape[1])
        self.register_buffer("signs", signs)

    @classmethod
    def shape(cls, width: int) -> tuple[int, int]:
        """Of the signs for that width."""
        return (1 if base_order(width) is not None else 2), width

    @classmethod
    def drawn(cls, width: int, draw: np.random.Generator) -> RandomHadamard:
        return cls(torch.from_numpy(draw.choice(np.array([-1, 1], np.int8), cls.shape(width))))

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Transform:
        return cls(torch.empty(cls.shape(int(facts["width"])), dtype=torch.int8))

    def check_tensor(self, attribute: str, tensor: Tensor, what: str, turned: bool = False) -> None:
        if (tensor.abs() != 1).any():
            raise ArtifactError(f"{what} holds {int(tensor[tensor.abs() != 1][0])}; signs are -1 or 1")

    def _rounds(self) -> list[tuple[Tensor, int, int]]:
        """Signs, and which channels are transformed."""
        if len(self.signs) == 1:
            return [(self.signs[0], 0, self.width)]
        part = 1 << (self.width.bit_length() - 1)
        return [(self.signs[0], 0, part), (self.signs[1], self.width - part, self.width)]

    def input(self, x: Tensor) -> Tensor:
        for signs, low, high in self._rounds():
            x = x.float() * signs
            turned = qkernels.hadamard_transform(x[..., low:high].contiguous())
            x = torch.cat([x[..., :low], turned, x[..., high:]], -1) if high - low < self.width else turned
        return x

    def weight(self, w: Tensor) -> Tensor:
        return self.input(w)

    def undo(self, w: Tensor) -> Tensor:
        w = w.float()
        for signs, low, high in reversed(self._rounds()):
            turned = qkernels.hadamard_transform(w[..., low:high].contiguous(), transpose=True)
            w = torch.cat([w[..., :low], turned, w[..., high:]], -1) * signs
        return w


#: Transforms by class name: ours, those of entry points "qclip.transforms", and registered ones.
TRANSFORMS: Registry[type[Transform]] = Registry(
    "transform",
    "qclip.transforms",
    {name: f"{__name__}:{name}" for name in ("Scale", "Shift", "Hadamard", "RandomHadamard")},
    attributes=("from_facts",),
    error=ArtifactError,
)


_FACTS = {"class": text(100), "width": whole(1, 1 << 20)}


def check(facts: Any, where: str) -> None:
    """What `facts` of a transform may hold, for `untrusted.schema`."""
    record(_FACTS, tuple(_FACTS))(facts, where)
    one_of(*TRANSFORMS)(facts["class"], f"{where}.class")


def from_facts(facts: dict[str, Any], width: int) -> Transform:
    """The transform that `facts()` of another one describes, empty. Raises ArtifactError where it does not fit an input
    of `width` channels."""
    if facts["width"] != width:
        raise ArtifactError(f"a transform of {facts['width']} channels stands before an input of {width}")
    return TRANSFORMS.get(facts["class"]).from_facts(facts)


def transformed(x: Tensor, transforms: Iterable[Transform]) -> Tensor:
    """An input behind all of `transforms`."""
    for transform in transforms:
        x = transform.input(x)
    return x


def folded(w: Tensor, bias: Tensor | None, transforms: Iterable[Transform]) -> tuple[Tensor, Tensor | None]:
    """Weight `[N, K]` and bias `[N]` to an input behind all of `transforms`."""
    for transform in transforms:
        if (extra := transform.bias(w)) is not None:
            bias = extra if bias is None else bias.float() + extra
        w = transform.weight(w)
    return w, bias


def unfolded(w: Tensor, bias: Tensor | None, transforms: Iterable[Transform]) -> tuple[Tensor, Tensor | None]:
    """The inverse of `folded`: weight and bias to the input as it comes."""
    for transform in reversed(list(transforms)):
        w = transform.undo(w)
        if (extra := transform.bias(w)) is not None:
            bias = -extra if bias is None else bias.float() - extra
    return w, bias


def same(a: Iterable[Transform], b: Iterable[Transform]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(x.same(y) for x, y in zip(a, b, strict=True))


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two constants are the same number by number."""
    if a is None or b is None:
        return a is b
    if a.device.type == "meta":  # a skeleton: what is written into it later comes from one quantized model
        return a.shape == b.shape
    return torch.equal(a, b)
