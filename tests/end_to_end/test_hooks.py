"""Hooks fire on a quantized model with what they saw on the float one, set before quantize_ or after, or are refused by
name; code of a user's own is never left out without a word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import qclip
from qclip import models
from qclip.errors import ModelError
from qclip.models import replay

from ..models.architectures import TIMM, images, with_trunk
from ..models.test_huggingface import build as build_hf
from ..models.test_huggingface import features, tokens
from ..small import IMAGES, TEXTS, small_clip

BLOCK = "visual.transformer.resblocks.0"
CLIP = [
    *("visual.conv1", "visual.ln_pre", "visual.ln_post", "token_embedding", "ln_final", BLOCK),
    *(f"{BLOCK}.{name}" for name in ("ln_1", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj")),
    *(f"transformer.resblocks.1.{name}" for name in ("ln_1", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj")),
]
TRUNK = [f"visual.trunk.{n}" for n in ("patch_embed.proj", "blocks.1", "norm")]
TRUNK += [f"visual.trunk.blocks.0.{n}" for n in ("norm1", "attn", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")]
HF = [f"{t}_model.encoder.layers.0" for t in ("vision", "text")]
HF += [f"{layer}.{n}" for layer in HF for n in ("layer_norm1", "layer_norm2", "mlp", "mlp.fc1", "mlp.fc2")]
HF += [f"{layer}.self_attn.{n}" for layer in HF[:2] for n in ("q_proj", "k_proj", "v_proj", "out_proj")]
HF += ["vision_model.embeddings.patch_embedding", "text_model.embeddings.token_embedding"]


def trunk() -> nn.Module:
    return with_trunk(TIMM["vit_siglip"](), "none")


@torch.no_grad()
def run(model: nn.Module) -> tuple[Tensor, ...]:
    if hasattr(model, "vision_model"):
        return features(model)
    if hasattr(model.visual, "trunk"):
        return (model.encode_image(images()),)
    return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


def near(found: Any, wanted: Any, least: float = 0.99) -> bool:
    if wanted.ndim > 1 and found.shape[1] < wanted.shape[1]:
        wanted = wanted[:, : found.shape[1]]  # text behind the last EOT is left out
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    return found.shape == wanted.shape and float(F.cosine_similarity(found.flatten(), wanted.flatten(), 0)) > least


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Watch:
    """Hooks of both kinds on every named module; `seen[name]` is what each got."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.seen: dict[str, list] = {name: [] for name in names}
        self.handles = []
        for name in names:
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(lambda _, args, n=name: self.seen[n].append(args[0])))
            self.handles.append(
                module.register_forward_hook(lambda _, args, y, n=name: self.seen[n].extend([args[0], first(y)]))
            )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w8a8-static"])
@pytest.mark.parametrize(
    ("build", "names"),
    [(small_clip, CLIP), (trunk, TRUNK), (lambda: build_hf("clip"), HF), (lambda: build_hf("siglip"), HF)],
)
def test_hooks_set_before_see_what_they_saw(build: Callable[[], nn.Module], names: list[str], recipe: str) -> None:
    model = build()
    float_model = copy.deepcopy(model)
    wanted = Watch(float_model, names)
    run(float_model)
    if not hasattr(model, "tokenizer"):
        model.tokenizer = lambda texts: tokens()
    found = Watch(model, names)
    qclip.quantize_(model, recipe, images() if recipe == "w8a8-static" else None)
    for _ in range(4):  # a program would be recorded and replayed
        for seen in found.seen.values():
            seen.clear()
        run(model)
        for name in names:
            assert len(found.seen[name]) == len(wanted.seen[name]) == 3, name
            least = 0.93 if recipe == "w4a8" else 0.99
            assert all(near(a, b, least) for a, b in zip(found.seen[name], wanted.seen[name], strict=True)), name
    found.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if build is small_clip:
        for _ in range(3):
            run(model)
        assert replay.programs(model.visual)


@pytest.mark.parametrize("name", [name for name in CLIP if "conv1" not in name])
def test_hooks_set_afterwards_see_what_they_would_have_seen(name: str) -> None:
    """Also where a fused core would not have called the module at all."""
    float_model, model = small_clip(), qclip.quantize_(small_clip(), "w8a8")
    wanted = Watch(float_model, [name])
    run(float_model)
    found = Watch(model, [name])
    run(model)
    assert len(found.seen[name]) == 3
    assert all(near(a, b) for a, b in zip(found.seen[name], wanted.seen[name], strict=True))


def test_every_site_and_core_can_be_watched_afterwards() -> None:
    float_model, model = small_clip(), qclip.quantize_(small_clip(), "w8a8")
    models.towers(float_model)
    names = [
        name for name, _ in float_model.named_modules() if name.endswith((".attn", ".q", ".k", ".v", ".out", ".fc1"))
    ]
    wanted, found = Watch(float_model, names), Watch(model, names)
    run(float_model), run(model)
    for name in names:
        assert len(found.seen[name]) == 3, name
        assert all(near(a, b) for a, b in zip(found.seen[name], wanted.seen[name], strict=True)), name
    inner = Watch(model, ["visual.conv1.site"])
    run(model)
    assert inner.seen["visual.conv1.site"][0].shape == (6, 16, 192)


def test_global_hooks_see_every_module() -> None:
    model = qclip.quantize_(small_clip(), "w8a8")
    wanted = run(model)
    for _ in range(3):
        run(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    found = run(model)
    handle.remove()
    assert all(near(a, b) for a, b in zip(found, wanted, strict=True))
    leaves = {m for m in model.modules() if not m._modules and not isinstance(m, nn.Identity)}
    assert leaves <= set(seen)
    count = len(seen)
    assert all(torch.equal(a, b) for a, b in zip(run(model), wanted, strict=True)) and len(seen) == count


def test_order_keywords_always_call_and_what_hooks_change() -> None:
    model, said = small_clip(), []
    block = model.visual.transformer.resblocks[0]
    mlp, norm = block.mlp, block.ln_2
    mlp.register_forward_hook(lambda *a: said.append("second"))
    mlp.register_forward_hook(lambda *a: said.append("first"), prepend=True)
    mlp.register_forward_hook(lambda m, args, kwargs, y: said.append(kwargs), with_kwargs=True)
    norm.register_forward_pre_hook(lambda m, args, kwargs: said.append(kwargs), with_kwargs=True)
    qclip.quantize_(model, "w8a8")
    plain = run(model)[0]
    assert said == [{}, "first", "second", {}]

    once = []
    handle = norm.register_forward_hook(lambda *a: (once.append(1), handle.remove())[0])  # gone in the middle of a call
    assert near(run(model)[0], plain) and once == [1]
    handle = norm.register_forward_hook(lambda m, args, y: torch.zeros_like(y))
    assert not near(run(model)[0], plain)
    handle.remove()
    assert torch.equal(run(model)[0], plain)

    always = []
    block.mlp.register_forward_hook(lambda *a: always.append(1), always_call=True)
    block.mlp.fc2.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model)
    assert always == [1]


def test_attention_hooks_of_hugging_face_keep_their_keywords() -> None:
    seen: dict[str, list] = {"float": [], "quantized": []}
    for key, names in seen.items():
        model = build_hf("clip")
        model.vision_model.encoder.layers[1].self_attn.register_forward_hook(
            lambda m, args, kwargs, y, names=names: names.append((args, kwargs, y[0])), with_kwargs=True
        )
        run(model if key == "float" else qclip.quantize_(model, "w8a8"))
    (wanted,), (found,) = seen.values()
    assert found[0] == wanted[0] == () and found[1].keys() == wanted[1].keys()
    assert near(found[1]["hidden_states"], wanted[1]["hidden_states"]) and near(found[2], wanted[2])


# ---- refused --------------------------------------------------------------------------------------------------------


def on(name: str, act: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    return lambda model: act(model.get_submodule(name)) and None


class LoraLinear(nn.Linear):
    """As loralib has it."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features)
        self.weight, self.bias = of.weight, of.bias
        self.a, self.b = nn.Parameter(torch.randn(2, of.in_features)), nn.Parameter(torch.randn(of.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class PeftLinear(nn.Module):
    """As peft has it: a wrapper that shows the weight of what it holds."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.a = nn.Linear(base_layer.weight.shape[1], 2)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + (self.a(x).sum(-1, keepdim=True) if x.is_floating_point() else 1)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, weights = super().forward(*args, **kwargs)
        return 2 * y, weights


class OwnCall(nn.MultiheadAttention):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y, weights = super().__call__(*args, **kwargs)
        return 2 * y, weights


class OwnEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 1


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def swap(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))

    return change


def recast(name: str, kind: type) -> Callable[[nn.Module], None]:
    """The same object, of a subclass."""
    return on(name, lambda module: setattr(module, "__class__", kind))


def own(base: type, method: str = "forward") -> type:
    def double(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * getattr(super(type(self), self), method)(*args, **kwargs)

    return type("Own", (base,), {"__module__": __name__, method: double})


def patch_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 3 * forward(*args, **kwargs)


FC, ATTN = f"{BLOCK}.mlp.c_fc", f"{BLOCK}.attn"
REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "hook on packed attention": (
        on(ATTN, lambda m: m.register_forward_hook(lambda *a: None)),
        f"{ATTN} has forward hooks",
    ),
    "hook on an activation": (
        on(f"{BLOCK}.mlp.gelu", lambda m: m.register_forward_pre_hook(lambda *a: None)),
        "mlp.gelu has forward hooks",
    ),
    "backward hook": (on(FC, lambda m: m.register_full_backward_hook(lambda *a: None)), f"{FC} has backward hooks"),
    "backward pre-hook on attention": (
        on(ATTN, lambda m: m.register_full_backward_pre_hook(lambda *a: None)),
        f"{ATTN} has backward hooks",
    ),
    "old weight_norm": (on(FC, nn.utils.weight_norm), f"{FC} has the hook WeightNorm"),
    "pruning": (on(FC, lambda m: prune.random_unstructured(m, "weight", 0.5)), f"{FC} has the hook Random"),
    "loralib": (swap(FC, LoraLinear), f"{FC} is a .*LoraLinear .*merge the adapter first"),
    "loralib on the last layer": (swap("transformer.resblocks.1.mlp.c_proj", LoraLinear), "c_proj is a .*LoraLinear"),
    "peft": (swap(FC, PeftLinear), f"{FC} is a .*PeftLinear.* merge the adapter first"),
    "peft on the lookup": (swap("token_embedding", PeftLinear), "token_embedding is a .*PeftLinear"),
    "own lookup": (recast("token_embedding", OwnEmbedding), "token_embedding is a .*OwnEmbedding"),
    "own convolution": (recast("visual.conv1", OwnConv), "visual.conv1 is a .*OwnConv"),
    "own attention": (recast(ATTN, OwnAttention), f"{ATTN} is a .*OwnAttention"),
    "own MLP": (on(f"{BLOCK}.mlp", lambda m: m.add_module("adapter", nn.Linear(64, 64))), "'adapter'"),
    "own sequence": (
        on(f"{BLOCK}.mlp", lambda m: setattr(m, "__class__", own(nn.Sequential))),
        f"{BLOCK}.mlp is a .*Own",
    ),
    "own __call__": (recast(FC, own(nn.Linear, "__call__")), f"{FC} is a .*Own with a __call__ of its own"),
    "own _call_impl": (recast(FC, own(nn.Linear, "_call_impl")), f"{FC} is a .*Own with a _call_impl of its own"),
    "own __call__ of attention": (recast(ATTN, OwnCall), f"{ATTN} is a .*OwnCall with a __call__"),
    "_call_impl set on a layer": (
        on(FC, lambda m: setattr(m, "_call_impl", lambda x: 3 * m.forward(x))),
        f"{FC} has a _call_impl of its own, set on the object",
    ),
    "parametrized projection": (
        on("visual", lambda m: parametrize.register_parametrization(m, "proj", Twice())),
        "projection is no parameter but computed in each call, .*make it permanent first",
    ),
    "forward set on a layer": (on(FC, patch_forward), f"{FC} has a forward of its own"),
    "forward set on attention": (on(ATTN, patch_forward), f"{ATTN} has a forward of its own"),
    "forward set on a block": (on(BLOCK, patch_forward), f"{BLOCK} has a forward of its own"),
    "forward set on a tower": (on("visual", patch_forward), "visual has a forward of its own"),
    "own block": (
        lambda model: setattr(m := model.visual.transformer.resblocks[0], "__class__", own(type(m))),
        f"{BLOCK} is a .*Own",
    ),
    "own tower": (lambda model: setattr(model.visual, "__class__", own(type(model.visual))), "visual is a .*Own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_left_out_is_refused_by_name(case: str) -> None:
    change, message = REFUSED[case]
    model = small_clip()
    change(model)
    wanted, keys = run(model), list(model.state_dict())
    with pytest.raises(ModelError, match=message.replace("[", r"\[")) as caught:
        qclip.quantize_(model, "w8a8")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(run(model), wanted, strict=True)) and keys == list(model.state_dict())


def test_an_adapter_is_refused_by_an_analysis_too() -> None:
    model = small_clip()
    swap(FC, PeftLinear)(model)
    with pytest.raises(ModelError, match="merge the adapter"):
        qclip.weight_spectrum(model, {}, seeds=8)


def test_an_own_norm_is_run_as_it_is() -> None:
    """It is not replaced, so that there is nothing to refuse; only fused it cannot be."""
    model, plain = small_clip(), small_clip()
    norm = model.visual.transformer.resblocks[0].ln_1
    norm.__class__ = own(type(norm))
    wanted = run(model)[0]
    assert not near(wanted, run(plain)[0] * 1.0001) or not torch.equal(wanted, run(plain)[0])
    assert near(run(qclip.quantize_(model, "w8a8"))[0], wanted)


# ---- parametrizations -----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "own": lambda module: parametrize.register_parametrization(module, "weight", Twice()),
}


@pytest.mark.parametrize("name", [FC, f"{BLOCK}.attn.out_proj", "visual.conv1", "token_embedding"])
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_the_effective_weight_of_a_parametrization_is_quantized(kind: str, name: str) -> None:
    model = small_clip()
    model.get_submodule(name).weight.data.mul_(0.5)
    PARAMETRIZED[kind](model.get_submodule(name))
    model.eval()
    wanted = run(model)
    effective = model.get_submodule(name).weight.detach().flatten(1).clone()
    qclip.quantize_(model, "w8a8")
    assert all(near(a, b) for a, b in zip(run(model), wanted, strict=True))
    site = {FC: f"{BLOCK}.mlp.fc1", f"{BLOCK}.attn.out_proj": f"{BLOCK}.attn.out"}.get(name, name)
    held = model.get_submodule(site)
    assert near(held.dequantized_weight(), effective)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())  # what was trained apart is one weight now
    qclip.dequantize_(model)
    assert all(near(a, b) for a, b in zip(run(model), wanted, strict=True))


def test_a_parametrized_packed_projection_is_quantized() -> None:
    model = small_clip()
    parametrize.register_parametrization(model.visual.transformer.resblocks[0].attn, "in_proj_weight", Twice())
    wanted = run(model)
    assert near(run(qclip.quantize(model, "w8a8"))[0], wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(run(copy.deepcopy(model)), wanted, strict=True))
