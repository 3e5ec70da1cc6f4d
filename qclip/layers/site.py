"""What every quantized site has in common: codes that keep their dtype, packed in memory, canonical on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import qkernels
from qkernels import Int4Weight, Int8Weight
from qkernels.grids import KINDS, Grid
from qkernels.weights import (
    Weight,
    levels,
    pack_bits,
    unpack_bits,
    weight_from_levels,
    zero_point_bias,
)

from ..errors import ArtifactError
from ..untrusted.schema import Check, flag, listing, one_of, optional, record, whole
from . import transforms as site_transforms
from .branch import Branch
from .fixed import Fixed
from .shown_weight import ShownWeight
from .transforms import Transform
from .values import check_finite, check_normal

MOST = 1 << 20  # rows, columns or groups that a description may speak of
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a layer says of itself to the coverage table."""

    shape: tuple[int, int]  # of its weight [N, K]
    state: Literal["real", "simulated"]  # kernels run it / float arithmetic on the quantization grid
    weight_bits: int
    activation_bits: int | None  # None: float
    op: str | None = None  # the function of qkernels that computes it
    stored_bits: int | None = None  # that a file holds of it, without the bias; None: not told


class QuantizedSite(Fixed):
    """Holds one quantized weight `[N, K]`; subclasses compute with it.

    Buffers: `codes`, `scales`, `zeros` (None where symmetric) as in `Int8Weight` / `Int4Weight`, made on `grid`;
    `input_scale` float32 `[]` is the static scale of the input, None = dynamic per token; `input_zero` int32 `[]` its
    zero point, None = 0. The `transforms` run on the input before it is quantized, so the weight carries their inverse.
    A `branch` adds a float low-rank product of the input behind them; the codes are what it leaves of the weight.
    The packed form replaces the canonical one in memory; `state_dict` holds the canonical form, bit for bit.

    A subclass whose constructor takes more than this one's lists those keywords in `SETTINGS`, each with the check of
    its JSON: attributes of the same names. A file may leave out those in `USUAL`, which then have these values.
    """

    FIXED = ("codes", "scales", "zeros", "input_scale", "input_zero", "zero_bias")
    STANDS_FOR: ClassVar[tuple[type, ...]] = (nn.Linear,)  # float modules that it may replace
    CONTAINERS: ClassVar[tuple[type, ...]] = (Int8Weight, Int4Weight)  # of the weights that it takes
    SETTINGS: ClassVar[dict[str, Check]] = {}
    USUAL: ClassVar[dict[str, Any]] = {}
    packs: ClassVar[bool] = True  # whether its backend wants the weight in a form of its own
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    zero_bias: Tensor | None
    witness: Tensor

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        transforms: Iterable[Transform] = (),
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        grid: Grid | None = None,
        branch: Branch | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.group, self.layout = weight.shape, getattr(weight, "group", None), weight.layout
        self.grid = _usual_grid(weight) if grid is None else grid
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", getattr(weight, "zeros", None))
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())
        self.register_buffer("input_zero", None if input_zero is None else input_zero.to(torch.int32))
        # What codes with a zero point add to every output: float32 `[N]`, since it can be much larger than the result.
        self.register_buffer("zero_bias", None, persistent=False)
        self._derive()
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        # No empty child: a module without children is a leaf to the guards of recorded programs.
        self.transforms = nn.ModuleList(transforms) if (transforms := list(transforms)) else ()
        self.branch = branch
        # An empty tensor that follows `.half()` and `.to()`: it tells others our compute dtype and device.
        self.register_buffer("witness", torch.empty(0, dtype=dtype, device=weight.codes.device), persistent=False)

    @property
    def weight(self) -> ShownWeight:
        """For readers of `weight.dtype` and `weight.device` (open_clip, transformers)."""
        return ShownWeight(self.witness.dtype, self.witness.device, self.shape)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """`x @ model.visual.proj`, which is a parameter in open_clip's own model."""
        return self(x)  # type: ignore[no-any-return]

    @property
    def quantized(self) -> Weight:
        """The weight as the ops take it, in whatever form it is held."""
        if self.group is None:
            return Int8Weight(self.codes, self.scales, self.shape, self.layout)
        return Int4Weight(self.codes, self.scales, self.zeros, self.shape, self.group, self.layout)

    @property
    def smooth(self) -> Tensor | None:
        """Float32 `[K]`: what kernels multiply the input by in one pass with its quantization (see `transforms`)."""
        return self.transforms[-1].fused if self.transforms else None

    @property
    def before(self) -> list[Transform]:
        """The transforms that run before that pass."""
        transforms = list(self.transforms)
        return transforms[:-1] if self.smooth is not None else transforms

    # -- what it is --------------------------------------------------------------------------------------------------

    def describe(self) -> Description:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What `from_facts` needs to make an empty layer of this form, as JSON."""
        return {
            "class": type(self).__name__,
            "shape": list(self.shape),
            "grid": dataclasses.asdict(self.grid),
            "zeros": self.zeros is not None,
            "bias": self.bias is not None,
            "transforms": [transform.facts() for transform in self.transforms],
            "input_scale": self.input_scale is not None,
            "input_zero": self.input_zero is not None,
            "dtype": str(self.witness.dtype).removeprefix("torch."),
            **({} if self.branch is None else {"branch": self.branch.rank}),
            **{
                name: getattr(self, name)
                for name in self.SETTINGS
                if name not in self.USUAL or getattr(self, name) != self.USUAL[name]
            },
        }

    @classmethod
    def schema(cls) -> Check:
        """What `facts` may hold."""
        grid = {"bits": whole(1, 8), "kind": one_of(*KINDS), "group": optional(whole(1, MOST))}
        fields: dict[str, Check] = {
            "class": one_of(cls.__name__),
            "shape": listing(whole(1, MOST), 2, 2),
            "grid": record(grid, tuple(grid)),
            "transforms": listing(site_transforms.check, 0, 8),
            **dict.fromkeys(("zeros", "bias", "input_scale", "input_zero"), flag),
            "dtype": one_of(*DTYPES),
            "branch": whole(1, MOST),
            **cls.SETTINGS,
        }
        return record(fields, [name for name in fields if name not in cls.USUAL and name != "branch"])

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> QuantizedSite:
        """A layer of this form on the meta device. Raises ArtifactError where the facts contradict each other."""
        grid = Grid(**facts["grid"])
        (n, k), dtype = facts["shape"], getattr(torch, facts["dtype"])
        with torch.device("meta"):
            weight = _empty_weight(grid, n, k, facts["zeros"])
            if not isinstance(weight, cls.CONTAINERS):
                raise ArtifactError(f"{cls.__name__} does not run weights on {grid}")
            if facts["input_zero"] and not facts["input_scale"]:
                raise ArtifactError(f"{cls.__name__} has a zero point of its input, but no static scale")
            return cls(
                weight,
                torch.empty(n, dtype=dtype) if facts["bias"] else None,
                [site_transforms.from_facts(each, k) for each in facts["transforms"]],
                torch.empty(()) if facts["input_scale"] else None,
                torch.empty((), dtype=torch.int32) if facts["input_zero"] else None,
                dtype,
                grid,
                Branch.empty(facts["branch"], n, k) if "branch" in facts else None,
                **cls.USUAL | {name: facts[name] for name in cls.SETTINGS if name in facts},
            )

    def misfit(self, module: nn.Module) -> str:
        """Why this layer cannot stand for a float module; empty where it can."""
        weight = module.weight.flatten(1)  # type: ignore[union-attr, operator]
        if tuple(weight.shape) != self.shape:
            return f"has the shape {self.shape} instead of {tuple(weight.shape)}"
        if not isinstance(module, self.STANDS_FOR):
            return f"is of class {type(self).__name__!r} and stands for a {type(module).__name__}"
        has = getattr(module, "bias", None) is not None
        if has != (self.bias is not None) and not (self.transforms and not has):  # some transforms make a bias
            return "lacks the bias" if has else "has a bias" + ", unlike its architecture"
        return ""

    def check_tensor(self, attribute: str, tensor: Tensor, what: str, turned: bool = False) -> None:
        """Raises ArtifactError for numbers that this layer cannot hold; `what` names the tensor. `turned`: negative
        scales of weights are allowed."""
        if attribute == "codes":
            self._check_codes(tensor, what)
        elif attribute in ("scales", "input_scale"):
            check_normal(tensor, what, positive=attribute == "input_scale" or not turned)
        elif attribute == "input_zero":
            if not -128 <= int(tensor) <= 127:
                raise ArtifactError(f"{what} is {int(tensor)}; a zero point lies between -128 and 127")
        else:
            check_finite(tensor, what)

    def _check_codes(self, codes: Tensor, what: str) -> None:
        if self.group is not None:
            return  # both codes of a byte use every value of the 4 bits
        low, high = self.grid.low, self.grid.high
        if self.grid.kind == "midrise":
            low, high = -high, high
        least, most = (int(v) for v in torch.aminmax(codes))
        if not (low <= least and most <= high):
            raise ArtifactError(
                f"{what} holds the code {least if least < low else most}; codes of {self.grid.bits} bits lie between "
                f"{low} and {high}"
            )

    # -- on disk -----------------------------------------------------------------------------------------------------

    @property
    def dense(self) -> bool:
        """Whether a file holds the codes packed bit by bit: where they leave bits of their container empty."""
        return self.grid.bits < (8 if self.group is None else 4)

    def to_disk(self) -> dict[str, Tensor]:
        """Entries of `state_dict` that a file holds in another form."""
        if not self.dense:
            return {}
        return {"codes": pack_bits(levels(self.quantized.canonical(), self.grid), self.grid.bits)}

    def disk_form(self, attribute: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype that a file holds this tensor in; None: as it is."""
        if attribute != "codes" or not self.dense:
            return None
        n, k = self.shape
        return (-(-n * k * self.grid.bits // 8),), torch.uint8

    def from_disk(self, attribute: str, tensor: Tensor) -> Tensor:
        """The inverse of `to_disk`. Raises ArtifactError for what it has not made."""
        if self.disk_form(attribute) is None:
            return tensor
        n, k = self.shape
        try:
            found = unpack_bits(tensor, self.grid.bits, n * k).view(n, k)
            return weight_from_levels(found, self.grid, self.scales, self.zeros).codes
        except ValueError as error:
            raise ArtifactError(f"codes cannot be unpacked: {error}") from None

    @property
    def stored_bits(self) -> int:
        """As `stored_bits` of this module counts."""
        return stored_bits(self.quantized, self.grid, self.transforms, self.branch)

    # -- taken out again ---------------------------------------------------------------------------------------------

    def dequantized(self) -> nn.Module:
        """The float module that computes with the effective weight."""
        weight, bias = self.dequantized_weight(), self.dequantized_bias()
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        module.weight = nn.Parameter(weight.to(self.witness.dtype))
        if bias is not None:
            module.bias = nn.Parameter(bias.to(self.witness.dtype))
        return module.train(self.training)

    def dequantized_weight(self) -> Tensor:
        """The effective weight, float32 `[N, K]`, to the input as it comes, before the transforms."""
        return self._unfolded()[0]

    def dequantized_bias(self) -> Tensor | None:
        """The bias that belongs to it, `[N]`, a copy."""
        bias = self._unfolded()[1]
        return None if bias is None else bias.detach().clone()

    def from_steps(self) -> Callable[[Tensor], Tensor]:
        """A function: what units `[N, K]`, each in steps of its value's grid, add to the effective weight, float32."""
        weight = self.quantized.canonical()
        steps = weight.scales.float().abs()
        if self.group is not None:
            steps = steps.repeat_interleave(self.group, dim=1)[:, : self.shape[1]]
        else:  # an Int8Weight holds a midrise code as an odd number: two of its units are one step
            steps = steps[:, None] * (2 if self.grid.kind == "midrise" else 1)
        return lambda units: site_transforms.unfolded(units.float() * steps, None, self.transforms)[0]

    def _unfolded(self) -> tuple[Tensor, Tensor | None]:
        weight = self.quantized.canonical().dequantize()
        weight = weight if self.branch is None else weight + self.branch.weight()
        return site_transforms.unfolded(weight, self.bias, self.transforms)

    # -- forms of the weight -----------------------------------------------------------------------------------------

    @property
    def product_bias(self) -> Tensor | None:
        """What is added to the product of codes: the bias, and what a zero point of the input makes."""
        if self.zero_bias is None:
            return self.bias
        return self.zero_bias if self.bias is None else self.zero_bias + self.bias.float()

    def _derive(self) -> None:
        """Compute anew what follows from the other constants."""
        if self.input_scale is not None and self.input_zero is not None and not self.codes.is_meta:
            self.zero_bias = zero_point_bias(self.quantized, self.input_scale, self.input_zero)

    def _hold(self, weight: Weight) -> None:
        self.codes, self.scales, self.layout = weight.codes, weight.scales, weight.layout
        if isinstance(weight, Int4Weight):
            self.zeros = weight.zeros

    def pack(self) -> None:
        """Replace the weight by the form that the backend of its device wants. Nothing on the meta device."""
        if self.codes.device.type != "meta":
            self._derive()
            self._hold(qkernels.pack(self.quantized))

    def unpack(self) -> None:
        self._hold(self.quantized.canonical())

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantizedSite:
        packed = self.layout != "canonical"
        if packed:
            self.unpack()
        super()._apply(fn, recurse)
        if packed:
            self.pack()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.quantized.canonical()
        for name in ("codes", "scales", "zeros"):
            tensor = getattr(weight, name, None)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        packed = self.layout != "canonical"
        if packed:
            self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self._derive()
        if packed:
            self.pack()

    def extra_repr(self) -> str:
        n, k = self.shape
        static = ", static" if self.input_scale is not None else ""
        return f"{k}, {n}, {self.grid}{static}, layout={self.layout!r}"


def stored_bits(weight: Weight, grid: Grid, transforms: Iterable[Transform], branch: Branch | None = None) -> int:
    """Bits that a file holds of a weight: codes, scales, zeros, and what its transforms and its branch hold."""
    parts = [*transforms] if branch is None else [*transforms, branch]
    held = [buffer for part in parts for buffer in part.buffers()]
    return grid_bits(grid, *weight.shape) + sum(8 * buffer.numel() * buffer.element_size() for buffer in held)


def grid_bits(grid: Grid, n: int, k: int) -> int:
    """Bits that a file holds of a weight `[n, k]` on `grid`: its codes without empty bits, float32 scales of channels,
    or float16 scales of groups and as many zeros where the grid has some."""
    codes = -(-n * k * grid.bits // 8) * 8
    if grid.container == "Int8Weight":
        return codes + 32 * n
    return codes + 16 * n * -(-k // (grid.group or k)) * (1 if grid.zero == 0 else 2)


def _usual_grid(weight: Weight) -> Grid:
    """The grid of a weight that none is given for: the largest one of its container."""
    if isinstance(weight, Int8Weight):
        return Grid(8, "sym")
    return Grid(4, "symfull" if weight.zeros is None else "floatzero", weight.group)


def _empty_weight(grid: Grid, n: int, k: int, zeros: bool) -> Weight:
    """A weight without values. Raises ArtifactError for a grid that no weight has."""
    try:
        container = grid.container
    except ValueError as error:
        raise ArtifactError(str(error)) from None
    if container == "Int8Weight":
        if zeros:
            raise ArtifactError(f"weights on {grid} have no zero points")
        return Int8Weight(torch.empty(n, k, dtype=torch.int8), torch.empty(n), (n, k))
    group = k if grid.group is None else min(grid.group, k)
    if group not in (32, 64, 128, k):
        raise ArtifactError(f"{k} inputs have no weight groups of {group}")
    groups = -(-k // group)
    codes, scales = torch.empty(n, -(-k // 2), dtype=torch.uint8), torch.empty(n, groups, dtype=torch.float16)
    return Int4Weight(codes, scales, torch.empty_like(scales) if zeros else None, (n, k), group)
