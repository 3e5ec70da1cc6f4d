"""Puts layers into a model, fuses the cores around them, counts what is covered, and takes layers out again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

import qkernels

from . import models
from .layers import AttentionOperands, Description, QuantizedAttention, QuantizedMlp, QuantizedSite
from .models.tower import Attention, Block, Site, Tower
from .recipes import Recipe, Treatment

STATES = ("real", "simulated", "float")  # kernels run it / float arithmetic on the quantization grid / untouched

POSITIONS = "qclip_conv_positions"  # at how many positions of an image each convolution is evaluated


@dataclasses.dataclass(frozen=True)
class SiteCoverage:
    """One row of the coverage table. `macs`: multiply-accumulates for one image or one full caption."""

    site: str
    kind: str
    state: str  # one of STATES
    weight_bits: int | None
    activation_bits: int | None
    macs: int
    parameters: int
    backend: str  # "cpu:avx512vnni", "cpu:avx2, 2 pair sums" (a kernel for few bits), "torch" ...
    weights: int = 0  # of the parameters, without the bias
    stored_bits: int | None = None  # of those weights with scales, zeros and transforms; None: float, or not told


@dataclasses.dataclass(frozen=True)
class Coverage:
    rows: list[SiteCoverage]

    def share(self, state: str, of: str = "macs") -> float:
        """Share of `macs` or `parameters` in this state, 0..1."""
        total = sum(getattr(row, of) for row in self.rows)
        return sum(getattr(row, of) for row in self.rows if row.state == state) / total if total else 0.0

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits, with scales, zeros and transforms, over the weights of quantized linear sites: not of lookups
        and of patches, which recipes leave at 8 bits. None where there are none."""
        rows = [row for row in self.rows if row.stored_bits is not None and row.kind not in ("embedding", "patch")]
        return sum(row.stored_bits or 0 for row in rows) / sum(row.weights for row in rows) if rows else None

    def shares(self) -> dict[str, dict[str, float]]:
        """Every share: state -> "macs" or "parameters" -> 0..1."""
        return {state: {of: self.share(state, of) for of in ("macs", "parameters")} for state in STATES}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What was done to a model; kept on it as `qclip_quantization`."""

    recipe: Recipe
    plans: dict[str, Treatment]  # by site name; the others stay float
    provenance: dict
    source: str
    model: nn.Module = dataclasses.field(repr=False, compare=False)

    def __deepcopy__(self, memo: dict) -> Quantization:
        model = memo.get(id(self.model))  # the copy of our model, where deepcopy is making one
        return dataclasses.replace(self, model=self.model if model is None else model)

    @property
    def coverage(self) -> Coverage:
        """Counted afresh: the backend is the one that would run now."""
        return coverage(self.model)


def quantization(model: nn.Module) -> Quantization | None:
    """What was done to `model`, or None for a float model as it was loaded."""
    return model.__dict__.get("qclip_quantization")


def is_quantized(model: nn.Module) -> bool:
    """Whether any site is: a float model that was trained on by a recipe has a record, too."""
    done = quantization(model)
    return done is not None and bool(done.plans)


def mark(model: nn.Module, recipe: Recipe, plans: dict[str, Treatment], provenance: dict, source: str) -> nn.Module:
    # Straight into __dict__: as an attribute of nn.Module it would be looked at as a child.
    model.__dict__["qclip_quantization"] = Quantization(recipe, plans, provenance, source, model)
    model.__dict__[POSITIONS] = {}
    return model


def weight_hash(model: nn.Module) -> str:
    """sha256 of the state dict (`tensors_hash`)."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def refuse_hooks(sites: Iterable[Site], names: dict[nn.Module, str]) -> None:
    """Raises ModelError naming, by `names`, the first module that is to be replaced and has hooks that cannot stay."""
    for site in sites:
        models.refuse_others(site.module, names.get(site.module, site.name))


def write(
    towers: dict[str, Tower],
    built: dict[str, nn.Module],
    operands: Mapping[str, AttentionOperands] | None = None,
    trained: bool = False,
) -> None:
    """Write the modules of `built` (by site name) and `operands` of attention (by block name), fuse the cores of every
    block that got a site, pack the weights. `trained`: weights and scales were learned with attention in the compute
    dtype, so it keeps that."""
    for tower in towers.values():
        for site in tower:
            if site.name in built:
                tower.write(site, built[site.name].train(site.module.training))
        for block in tower.blocks:
            if any(site.name in built for site in block.sites.values()):
                _fuse(block)
            if operands and block.name in operands and block.attention is not None:
                getattr(*block.attention).operands = operands[block.name]
            if block.attention is not None:
                getattr(*block.attention).keeps_dtype = trained
    for tower in towers.values():
        pack(tower.module)
        tower.use_programs()


def pack(module: nn.Module) -> None:
    """Bring every quantized weight below `module` into the form that its device's backend wants."""
    for child in module.modules():
        if isinstance(child, QuantizedSite):
            child.pack()
    for child in module.modules():
        if isinstance(child, QuantizedAttention):
            child.join()


def _fuse(block: Block) -> None:
    if block.attention is not None:
        QuantizedAttention.fuse(getattr(*block.attention))
    if block.mlp is not None:
        QuantizedMlp.fuse(getattr(*block.mlp))


def _unfuse(block: Block) -> None:
    for place in (block.attention, block.mlp):
        core = None if place is None else getattr(*place)
        if isinstance(core, QuantizedAttention | QuantizedMlp):
            core.unfuse()
        if isinstance(core, Attention):
            core.operands, core.keeps_dtype = None, False


@torch.no_grad()
def dequantize_(model: nn.Module) -> nn.Module:
    """Take the layers out again: every quantized site becomes a float module with the dequantized weight."""
    for tower in models.towers(model).values():
        for block in tower.blocks:
            _unfuse(block)
        for site in tower:
            if hasattr(site.module, "dequantized"):
                tower.write(site, site.module.dequantized())  # type: ignore[operator, arg-type]
        tower.use_programs(False)
    model.__dict__.pop("qclip_quantization", None)
    model.__dict__.pop(POSITIONS, None)
    return model


def coverage(model: nn.Module) -> Coverage:
    """Every site, convolutions that are none, the products inside attention, and the other parameters: what runs how.
    Works on float models too.
    """
    with models.explicit_form(model) as towers:
        return Coverage([row for tower in towers.values() for row in _tower_rows(model, tower)])


def _tower_rows(model: nn.Module, tower: Tower) -> list[SiteCoverage]:
    rows = [_site_row(site) for site in tower]
    convolutions = _convolutions(model, tower)
    other = sum(p.numel() for p in tower.module.parameters()) - _site_parameters(tower)
    other -= sum(row.parameters for row in convolutions)
    for block in tower.blocks:
        if block.attention is not None:
            core = getattr(*block.attention)
            key = block.sites.get("k", block.sites.get("pool_k"))
            width = 0 if key is None else _described(key).shape[0]
            pairs = tower.tokens**2 if block.pairs is None else block.pairs
            name, macs = f"{block.name}.attn.scores", 2 * pairs * width
            state, bits, backend = "float", None, _attention_backend(core)
            if isinstance(core.operands, AttentionOperands):
                state, bits, backend = "simulated", core.operands.bits, "torch"
            rows.append(SiteCoverage(name, "attention", state, None, bits, macs, 0, backend))
    rows += convolutions
    rows.append(SiteCoverage(f"{tower.name}.other", "other", "float", None, None, 0, max(0, other), "torch"))
    return rows


def _convolutions(model: nn.Module, tower: Tower) -> list[SiteCoverage]:
    """Convolutions that are not sites (ConvNeXt's depthwise ones, stems that overlap): they stay float."""
    sites = {id(site.module) for site in tower}
    found = {
        name: module
        for name, module in tower.module.named_modules()
        if isinstance(module, nn.Conv2d) and id(module) not in sites
    }
    positions = _positions(model, found) if found else {}
    return [
        SiteCoverage(
            f"{tower.name}.{name}",
            "convolution",
            "float",
            None,
            None,
            positions[name] * conv.weight.numel(),
            sum(p.numel() for p in conv.parameters()),
            "torch",
        )
        for name, conv in found.items()
    ]


@torch.no_grad()
def _positions(model: nn.Module, convolutions: dict[str, nn.Conv2d]) -> dict[str, int]:
    """At how many positions of an image each convolution is evaluated: seen once, on an empty image, and kept."""
    kept: dict[str, int] = model.__dict__.setdefault(POSITIONS, {})
    if not convolutions.keys() <= kept.keys():
        encoders = models.encoders(model)
        handles = [
            conv.register_forward_hook(lambda _, __, y, name=name: kept.update({name: y[0, 0].numel()}))
            for name, conv in convolutions.items()
        ]
        try:
            with models.evaluating(model):  # batch norm would learn from it
                encoders.encode_image(torch.zeros(1, 3, encoders.image_size, encoders.image_size))
        finally:
            for handle in handles:
                handle.remove()
    return {name: kept.get(name, 0) for name in convolutions}


def _device(site: Site) -> torch.device:
    return site.module.weight.device  # type: ignore[union-attr, return-value]


def _backend_name(op: str, device: torch.device) -> str:
    """ "cpu:avx512vnni", "triton", "reference" ...: what runs the op on this device now."""
    name, _ = qkernels.runner(op, device)
    return f"cpu:{qkernels.info()['tier']}" if name == "cpu" else name


def _site_backend(site: Site, said: Description | _FloatSite) -> str:
    """The same, and which kernel for few bits it is."""
    if said.op is None:
        return "torch"
    name = _backend_name(said.op, _device(site))
    if not name.startswith("cpu:") or said.activation_bits is None:
        return name
    layer = getattr(site.module, "site", site.module)  # of patches: the linear one within
    pairs = qkernels.cpu.pair_sums(layer.quantized)  # type: ignore[union-attr, arg-type]
    return f"{name}, {pairs} pair sum{'s' * (pairs > 1)}" if pairs else name


def _attention_backend(core: nn.Module) -> str:
    if not isinstance(core, QuantizedAttention):
        return "torch"
    return _backend_name("attention", core.q.weight.device)  # type: ignore[union-attr, arg-type]


@dataclasses.dataclass(frozen=True)
class _FloatSite:
    """Describes a float module as quantized layers describe themselves."""

    shape: tuple[int, int]
    state: str = "float"
    weight_bits: int | None = None
    activation_bits: int | None = None
    op: str | None = None
    stored_bits: int | None = None


def _described(site: Site) -> Description | _FloatSite:
    if hasattr(site.module, "describe"):
        return site.module.describe()  # type: ignore[operator, no-any-return]
    weight = site.module.weight.flatten(1)  # type: ignore[operator, union-attr]
    return _FloatSite((weight.shape[0], weight.shape[1]))


def _site_parameters(tower: Tower) -> int:
    """Float parameters below the tower that belong to sites (so that the rest can be named)."""
    return sum(p.numel() for site in tower for p in site.module.parameters())


def _site_row(site: Site) -> SiteCoverage:
    said = _described(site)
    n, k = said.shape
    bias = getattr(site.module, "bias", None)
    rows = 0 if site.kind == "embedding" else site.rows  # a lookup multiplies nothing
    return SiteCoverage(
        site.name,
        site.kind,
        said.state,
        said.weight_bits,
        said.activation_bits,
        rows * n * k,
        n * k + (0 if bias is None else bias.numel()),
        _site_backend(site, said),
        n * k,
        said.stored_bits,
    )
