"""Whole image towers beside compiled bf16, and one training step with and without fake quantization."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels

from . import timing, vit
from .machine import Machine
from .ops import Row, ask, best, raiser

ASKED = {("ViT-L/14", 1): 1.15, ("ViT-L/14", 64): 1.6, ("ViT-L/14", 256): 1.6}


@torch.no_grad()
def tower(machine: Machine, name: str, batch: int) -> Iterator[Row]:
    """W8A8 in bf16, dynamic and static, as the modules in a CUDA graph and as the product runs them (`Program`)."""
    config = vit.CONFIGS["tiny" if machine.tiny else name]
    batch = min(batch, 2) if machine.tiny else batch
    generator = torch.Generator(machine.device).manual_seed(0)
    size = (batch, 3, config.image, config.image)
    x = torch.randn(size, generator=generator, device=machine.device).bfloat16()
    floats = vit.image_tower(config).to(machine.device)
    few = x[: min(batch, 16)]
    want = F.normalize(floats.encode(few.float()).double(), dim=-1)  # type: ignore[operator]
    half = vit.FusedFloat(vit.image_tower(config)).to(machine.device, torch.bfloat16).eval()
    if not machine.tiny:
        torch._dynamo.reset()
        half.compile()
    contenders: dict[str, timing.Contender] = {"bf16 compiled, fused qkv": lambda _: half(x)}
    cosines = {"bf16 compiled, fused qkv": _cosine(half(x), want)}
    for backend in machine.backends():
        os.environ.update(QKERNELS_BACKEND=backend, QKERNELS_STRICT="1")
        for recipe, samples in (("w8a8", None), ("w8a8-static", few)):
            model = vit.image_tower(config).to(machine.device, torch.bfloat16)
            model = vit.quantized(model, config, samples)
            for way, on in (("graph", "0"), ("program", "1")):

                def run(_: int, model: nn.Module = model, on: str = on, backend: str = backend) -> Tensor:
                    os.environ.update(QKERNELS_BACKEND=backend, QKERNELS_PROGRAM=on)
                    return model(x)

                label = f"ours {backend} {recipe} {way}"
                try:
                    cosines[label] = min(_cosine(run(0), want) for _ in range(3))  # by modules, recorded, replayed
                    contenders[label] = run
                except Exception as error:  # a backend that fails must not cost the others their time
                    machine.usable()
                    contenders[label] = raiser(error)
    for label, cosine in cosines.items():
        if not cosine > 0.98:
            contenders.pop(label)  # who computes something else is not timed
    programs = tuple(label for label in contenders if label.endswith("program"))
    times = timing.compare(machine, contenders, 1, seconds=1.5, eager=programs)
    asked = ASKED.get((name, batch))
    rival = times.get("bf16 compiled, fused qkv", {}).get("seconds")
    rows = []
    if asked is not None and rival:
        for recipe in ("w8a8", "w8a8-static"):
            mine = best(times, *(c for c in times if f" {recipe} " in c))
            rows.append(ask(f"{name} b{batch} {recipe}: over compiled bf16", asked, rival / mine))
    yield {
        "op": "tower",
        "case": f"{name} b{batch}",
        "times": times,
        "cosines": cosines,
        "asked": rows,
        "images_a_second": {c: batch / t["seconds"] for c, t in times.items() if "seconds" in t},
    }


def _cosine(y: Tensor, want: Tensor) -> float:
    """Smallest over the images that are looked at."""
    return float((F.normalize(y[: len(want)].double(), dim=-1) * want).sum(-1).min())


class FakeQuantized(nn.Module):
    """A linear layer that trains on the 4-bit grid: LSQ on its input (per tensor) and weight (per channel)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.x_scale = nn.Parameter(torch.tensor(0.2))
        self.w_scale = nn.Parameter(linear.weight.detach().abs().amax(1) / 7)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        x = qkernels.fake_quantize(x, self.x_scale, None, -8, 7, "lsq", grad_scale=1e-3)
        weight = qkernels.fake_quantize(weight, self.w_scale, None, -8, 7, "lsq", axis=0, grad_scale=1e-3)
        return F.linear(x, weight, self.linear.bias)


def training(machine: Machine) -> Iterator[Row]:
    """Forward, backward and SGD of ViT-B/32's image tower in bf16 at batch 128."""
    config = vit.CONFIGS["tiny" if machine.tiny else "ViT-B/32"]
    batch = 2 if machine.tiny else 128
    x = torch.randn(batch, 3, config.image, config.image, device=machine.device).bfloat16()
    goal = torch.randn(batch, config.out, device=machine.device).bfloat16()

    def step_of(model: nn.Module) -> Callable[[int], Any]:
        model.to(machine.device, torch.bfloat16).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def step(_: int) -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss = F.mse_loss(model.encode(x), goal)  # type: ignore[operator]
            loss.backward()
            optimizer.step()
            return loss

        return step

    contenders: dict[str, timing.Contender] = {"bf16": step_of(vit.image_tower(config))}
    for backend in machine.backends():
        model = vit.image_tower(config)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name in ("q", "k", "v", "out", "fc1", "fc2"):
                    setattr(module, name, FakeQuantized(child))
        step = step_of(model)

        def run(number: int, step: Callable = step, backend: str = backend) -> Any:
            os.environ.update(QKERNELS_BACKEND=backend, QKERNELS_STRICT="1")
            return step(number)

        contenders[f"ours {backend} lsq"] = run
    times = timing.compare(machine, contenders, 1, seconds=1.5)
    mine = best(times, *(c for c in times if c.startswith("ours")))
    rows = [
        ask("LSQ training step of ViT-B/32 / bf16 step (at most)", 1.25, mine / times["bf16"]["seconds"], "x at most")
    ]
    yield {"op": "training", "case": "ViT-B/32 b128", "times": times, "asked": rows}
