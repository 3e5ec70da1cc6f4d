"""Patch embeddings: the last block in which every token attends to itself alone, then what the class token meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import ModelError

from ..small import IMAGES, small_clip
from .architectures import OPEN_CLIP, TIMM, images, perturb, with_trunk
from .small_timm import build as small_timm
from .small_timm import trunk as small_trunk
from .test_huggingface import build as build_hf
from .test_structure import BUILDERS, seen


def headless(name: str) -> nn.Module:
    trunk = TIMM[name]()
    trunk.reset_classifier(0)
    return with_trunk(trunk, "mlp")


def eva(name: str) -> nn.Module:
    return with_trunk(small_trunk(name, num_classes=0, global_pool="token"), "linear")


# model, its last block, the name of the mask of a block
DEFINED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module], str]] = {
    "clip": (small_clip, lambda m: m.visual.transformer.resblocks[-1], "attn_mask"),
    "layer_scale": (OPEN_CLIP["layer_scale"], lambda m: m.visual.transformer.resblocks[-1], "attn_mask"),
    "all_norms": (OPEN_CLIP["own_attention_all_norms"], lambda m: m.visual.transformer.resblocks[-1], "attn_mask"),
    "timm": (lambda: with_trunk(TIMM["vit_inner_norms"](), "linear"), lambda m: m.visual.trunk.blocks[-1], "attn_mask"),
    "timm_layer_scale": (
        lambda: headless("vit_qk_norm_layer_scale"),
        lambda m: m.visual.trunk.blocks[-1],
        "attn_mask",
    ),
    "timm_registers": (
        lambda: with_trunk(TIMM["vit_registers"](), "linear"),
        lambda m: m.visual.trunk.blocks[-1],
        "attn_mask",
    ),
    "eva": (lambda: eva("eva"), lambda m: m.visual.trunk.blocks[-1], "attn_mask"),
    "eva02": (lambda: eva("eva02"), lambda m: m.visual.trunk.blocks[-1], "attn_mask"),
    "hf_clip": (lambda: build_hf("clip"), lambda m: m.vision_model.encoder.layers[-1], "attention_mask"),
}


def caught(model: nn.Module, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into and out of the last block, and the embedding of the image."""
    found: list[Any] = []
    see = lambda module, args, kwargs, out: found.append((args[0] if args else kwargs["hidden_states"], out))  # noqa: E731
    handle = block.register_forward_hook(see, with_kwargs=True)
    embedding = models.encoders(model).encode_image(x)
    handle.remove()
    inside, out = found[0]
    return inside, out[0] if isinstance(out, tuple) else out, embedding


def alone(block: nn.Module, mask: str, x: Tensor) -> Tensor:
    """The block by its own code, with a mask that hides every other token."""
    hidden = torch.full((x.shape[1], x.shape[1]), float("-inf")).fill_diagonal_(0)
    out = block(x, **{mask: hidden if mask == "attn_mask" else hidden.expand(len(x), 1, -1, -1)})
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
@pytest.mark.parametrize("name", DEFINED)
def test_a_patch_attends_to_itself_and_is_embedded_like_the_class_token(name: str) -> None:
    build, last, mask = DEFINED[name]
    model, x = perturb(build()), images()
    path, encode = models.value_path(model), models.encoders(model).encode_image
    inside, out, embedding = caught(model, last(model), x)
    torch.testing.assert_close(path.tail(out)[:, 0], embedding, atol=1e-5, rtol=1e-4)
    expected = path.tail(alone(last(model), mask, inside)[:, -16:])  # registers are no patches
    found = path.patches(encode, x)
    assert found.shape == (len(x), 16, embedding.shape[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - path.tail(out[:, -16:])).abs().max() > 1e-3  # attention would have changed it


@torch.no_grad()
def test_a_quantized_model_embeds_patches_by_its_quantized_layers() -> None:
    model = small_clip()
    quantized = qclip.quantize(
        model, {"name": "only v", "exceptions": {"*": "float", "vision.blocks.1.attn.v": "w2a16"}}
    )
    path = models.value_path(quantized)
    found = path.patches(models.encoders(quantized).encode_image, IMAGES)
    block = quantized.visual.transformer.resblocks[-1]
    inside, _, _ = caught(quantized, block, IMAGES)
    x = inside + block.attn.out(block.attn.v(block.ln_1(inside)))
    expected = (x + block.mlp(block.ln_2(x)))[:, 1:]
    torch.testing.assert_close(found, path.tail(expected))
    apart = found - models.value_path(model).patches(models.encoders(model).encode_image, IMAGES)
    assert apart.abs().max() > 1e-3


@torch.no_grad()
def test_all_sites_of_the_path_are_quantized_together() -> None:
    model = small_clip()
    quantized = qclip.quantize(model, "w8a8")
    float_patches, patches = (
        models.value_path(m).patches(models.encoders(m).encode_image, IMAGES) for m in (model, quantized)
    )
    assert torch.cosine_similarity(float_patches, patches, dim=-1).min() > 0.999 and not torch.equal(
        float_patches, patches
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "hf_clip"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = BUILDERS[name]().eval()
    before, encode = seen(model), models.encoders(model).encode_image
    values = encode(images())
    models.value_path(model).patches(encode, images())
    assert seen(model) == before and torch.equal(encode(images()), values)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (OPEN_CLIP["no_ln_pre_avg"], "VisionTransformer: it does not pool a class token"),
        (OPEN_CLIP["coca"], "VisionTransformer: it does not pool a class token"),
        (BUILDERS["trunk_siglip"], "VisionTransformer: it does not pool a class token"),
        (BUILDERS["trunk_convnext"], "ConvNeXt: it does not pool a class token"),
        (BUILDERS["hf_siglip"], "SiglipModel: it pools by attention"),
        (lambda: small_timm("eva_post_norm"), "Eva: the norms of its blocks stand behind"),
        (lambda: small_timm("pe"), "Eva: it does not pool a class token"),
    ],
)
def test_towers_without_a_class_token_are_refused_by_name(build: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ModelError, match=f"patch embeddings are not defined for .*{why}"):
        models.value_path(build())
