"""CLIP's image tower in plain torch, for machines without open_clip: the explicit cores of qclip between a patch
convolution and a projection, random weights. Its quantized form is made of qclip's own layers, and a float form with
fused q, k, v is the rival."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .machine import ROOT


def reachable() -> None:
    """Make `qclip.layers` and `qclip.models.tower` importable where open_clip is not installed: these two packages'
    own `__init__` imports every adapter, which a tower that is its own adapter does not need."""
    if importlib.util.find_spec("open_clip") is None:
        for name in ("qclip", "qclip.models"):
            if name not in sys.modules:
                package = types.ModuleType(name)
                package.__path__ = [str(ROOT / name.replace(".", "/"))]
                sys.modules[name] = package
                if "." in name:
                    sys.modules["qclip"].models = package


@dataclass(frozen=True)
class Config:
    width: int
    layers: int
    heads: int
    patch: int
    out: int
    image: int = 224
    activation: str = "quick_gelu"

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


CONFIGS = {
    "ViT-L/14": Config(1024, 24, 16, 14, 768),
    "ViT-B/32": Config(768, 12, 12, 32, 512),
    "tiny": Config(32, 2, 2, 8, 16, image=16),
}


def image_tower(config: Config, seed: int = 0) -> nn.Module:
    """Float32, in eval mode. `tower(x)`: `[B, 3, S, S]` -> `[B, out]`."""
    reachable()
    from qclip.models import replay
    from qclip.models.tower import Attention, Mlp

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = config.width
            self.ln_1, self.ln_2 = nn.LayerNorm(w), nn.LayerNorm(w)
            self.attn = Attention(*(nn.Linear(w, w) for _ in range(4)), config.heads)
            self.mlp = Mlp(nn.Linear(w, 4 * w), nn.Linear(4 * w, w), config.activation)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class ImageTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = config.width
            self.patch = nn.Conv2d(3, w, config.patch, config.patch, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(w) * w**-0.5)
            self.positions = nn.Parameter(torch.randn(config.tokens, w) * w**-0.5)
            self.ln_pre, self.ln_post = nn.LayerNorm(w), nn.LayerNorm(w)
            self.blocks = nn.ModuleList(Block() for _ in range(config.layers))
            self.projection = nn.Linear(w, config.out, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return replay.run(self, self.encode, x)

        def encode(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.positions.to(x.dtype)
            x = self.ln_pre(x)
            for block in self.blocks:
                x = block(x)
            return self.projection(self.ln_post(x[:, 0]))

    torch.manual_seed(seed)
    return ImageTower().eval()


@torch.no_grad()
def quantized(tower: nn.Module, config: Config, static_for: Tensor | None = None) -> nn.Module:
    """The tower, in place, on INT8 layers: every linear map but the projection's input is W8A8, dynamic per token, or
    with static scales taken from a float run on `static_for`."""
    from qclip import rewrite
    from qclip.layers import Int8Linear, QuantizedPatch
    from qclip.models.tower import Block, Site, Tower
    from qkernels import Int8Weight

    blocks, sites = [], {}
    for number, block in enumerate(tower.blocks):  # type: ignore[arg-type]
        name, found = f"vision.blocks.{number}", {}
        for kind, owner in [(k, block.attn) for k in ("q", "k", "v", "out")] + [(k, block.mlp) for k in ("fc1", "fc2")]:
            part = "attn" if owner is block.attn else "mlp"
            found[kind] = Site(f"{name}.{part}.{kind}", kind, "norm", f"{name}.{part}.{kind}", owner, kind)
        sites |= {site.name: site for site in found.values()}
        blocks.append(Block(name, block, (block, "attn"), (block, "ln_1"), (block, "mlp"), (block, "ln_2"), found))
    sites["vision.patch"] = Site("vision.patch", "patch", "raw", "vision.patch", tower, "patch")
    described = Tower("vision", tower, blocks, sites, config.tokens)
    scales = {} if static_for is None else _input_scales(described, static_for)

    def layer(name: str, module: nn.Module) -> nn.Module:
        weight = module.weight.flatten(1).float()  # type: ignore[union-attr, operator]
        site = Int8Linear(
            Int8Weight.quantize(weight),
            module.bias,  # type: ignore[arg-type]
            input_scale=scales.get(name),
            dtype=module.weight.dtype,  # type: ignore[union-attr, arg-type]
        )
        return QuantizedPatch(site, (config.patch, config.patch)) if name == "vision.patch" else site

    rewrite.write({"vision": described}, {name: layer(name, site.module) for name, site in sites.items()})
    return tower


def _input_scales(tower, x: Tensor) -> dict[str, Tensor]:
    """Largest magnitude / 127 of every site's input but the patches', float32 `[]`."""
    found: dict[str, Tensor] = {}
    handles = [
        site.module.register_forward_pre_hook(
            lambda _, args, name=site.name: found.update({name: args[0].float().abs().amax() / 127})
        )
        for site in tower
        if site.kind != "patch"
    ]
    tower.module.encode(x)
    for handle in handles:
        handle.remove()
    for block in tower.blocks:  # q, k and v read one input
        for kind in ("k", "v"):
            found[block.sites[kind].name] = found[block.sites["q"].name]
    return found


class FusedFloat(nn.Module):
    """The rival: the same tower with q, k, v as one product, written so that a compiled block holds everything that
    can be fused: the residual before it is added where its norm reads it."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.qkv = nn.ModuleList()
        for block in tower.blocks:  # type: ignore[union-attr]
            parts = [getattr(block.attn, name) for name in "qkv"]
            fused = nn.Linear(parts[0].in_features, 3 * parts[0].out_features)
            fused.weight = nn.Parameter(torch.cat([p.weight for p in parts]).detach())
            fused.bias = nn.Parameter(torch.cat([p.bias for p in parts]).detach())
            self.qkv.append(fused)
        self.step = block_step

    def compile(self, mode: str | None = None) -> FusedFloat:  # type: ignore[override]
        self.step = torch.compile(block_step, dynamic=False, mode=mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        tower = self.tower
        x = tower.patch(x).flatten(2).transpose(1, 2)  # type: ignore[operator]
        x = torch.cat([tower.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + tower.positions.to(x.dtype)  # type: ignore[union-attr, operator, arg-type]
        x, y = tower.ln_pre(x), None  # type: ignore[operator]
        for block, qkv in zip(tower.blocks, self.qkv, strict=True):  # type: ignore[arg-type]
            x, y = self.step(x, y, block, qkv)
        return tower.projection(tower.ln_post(x[:, 0] + y[:, 0]))  # type: ignore[operator, index]


def block_step(x: Tensor, y: Tensor | None, block: nn.Module, qkv: nn.Linear) -> tuple[Tensor, Tensor]:
    """x and what is still to be added to it -> the same, after a block."""
    from qclip.models.tower import activate

    x = x if y is None else x + y
    heads = block.attn.heads  # type: ignore[union-attr]
    q, k, v = qkv(block.ln_1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + block.attn.out(y)  # type: ignore[union-attr, operator]
    mlp = block.mlp
    return x, mlp.fc2(activate(mlp.fc1(block.ln_2(x)), mlp.activation))  # type: ignore[union-attr, operator, arg-type]
