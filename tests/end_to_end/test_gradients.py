"""A gradient through a quantized layer is refused in words; whatever needs none goes on working, and is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import GradientError

from ..models.architectures import TIMM, images, with_trunk
from ..models.test_huggingface import build as build_hf
from ..small import IMAGES, TEXTS, small_clip

RECIPES = ["w8a8", "w8a8-static", "w4a8", "w4a16", "w6a8", "w4a4"]
WORDS = "gradients do not pass a quantized layer: .* float model .*requires_grad_"


def quantized(recipe: str | dict = "w8a8") -> nn.Module:
    return qclip.quantize_(small_clip(), recipe, IMAGES if "static" in str(recipe) else None)


def convnext() -> nn.Module:
    trunk = TIMM["convnext"]()
    trunk.reset_classifier(0)
    return with_trunk(trunk, "linear")


def refused(loss: Tensor) -> None:
    assert loss.requires_grad
    with pytest.raises(GradientError, match=WORDS):
        loss.backward()


def image_features(model: nn.Module, x: Tensor) -> Tensor:
    return models.encoders(model).encode_image(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_image_and_parameter_gradients_are_refused(recipe: str) -> None:
    model = quantized(recipe)
    with torch.no_grad():
        wanted = model.encode_image(IMAGES)
    found = model.encode_image(IMAGES)  # parameters around the layers require gradients
    assert torch.allclose(found, wanted, atol=1e-6)
    refused(found.sum())
    model.requires_grad_(False)
    refused(model.encode_image(IMAGES.clone().requires_grad_()).sum())
    assert not model.encode_image(IMAGES).requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("build", [lambda: build_hf("clip"), lambda: build_hf("siglip"), convnext])
def test_other_families(build: Callable[[], nn.Module]) -> None:
    model = qclip.quantize_(build(), "w8a8").requires_grad_(False)
    refused(image_features(model, images().requires_grad_()).sum())


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_a_prompt_gradient_is_refused_with_the_projection_float(recipe: str) -> None:
    """What came back before was the part that goes around the blocks: cosine 0.04 to the float model's."""
    model = quantized(
        qclip.Recipe.from_dict(qclip.recipes.get(recipe).to_dict() | {"exceptions": {"*.projection": "float"}})
    )
    model.requires_grad_(False)
    assert isinstance(model.text_projection, nn.Linear)
    prompt = model.token_embedding(model.tokenizer(TEXTS)).detach().requires_grad_()
    x = model.transformer(prompt + model.positional_embedding, attn_mask=model.attn_mask)
    refused(model.text_projection(model.ln_final(x)[:, -1]).sum())
    assert prompt.grad is None


def test_one_site_is_enough() -> None:
    model = quantized(
        {
            "name": "one",
            "weight_bits": 8,
            "activation_bits": 8,
            "towers": ["vision"],
            "exceptions": {
                f"vision.{n}": "float"
                for n in ("patch", "projection", "blocks.0.*", "blocks.1.attn.*", "blocks.1.mlp.fc1")
            },
        }
    )
    refused(model.encode_image(IMAGES).sum())
    x = torch.randn(2, 5, 64, requires_grad=True)
    model.visual.transformer.resblocks[0](x).sum().backward()  # float: as ever
    assert x.grad is not None


def test_what_lies_behind_frozen_layers_is_trained_rightly() -> None:
    model = quantized()
    model.requires_grad_(False)
    model.visual.ln_post.requires_grad_(True)
    head = nn.Linear(64, 3)
    model.visual.proj = head  # float
    loss = model.encode_image(IMAGES).square().sum()
    loss.backward()
    found = [p.grad.clone() for p in (*model.visual.ln_post.parameters(), *head.parameters())]
    with torch.no_grad():
        normed = F.layer_norm(model.visual.transformer(model.visual._embeds(IMAGES))[:, 0], (64,))
    gamma, beta = (p.detach().clone().requires_grad_() for p in model.visual.ln_post.parameters())
    weight, bias = (p.detach().clone().requires_grad_() for p in head.parameters())
    F.linear(normed * gamma + beta, weight, bias).square().sum().backward()
    for a, b in zip(found, (gamma, beta, weight, bias), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-4)


def test_a_head_on_features_and_the_logit_scale() -> None:
    model = quantized()
    tokens = model.tokenizer(TEXTS)
    image, text = F.normalize(model.encode_image(IMAGES), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    (found,) = torch.autograd.grad(logits.sum(), model.logit_scale)
    torch.testing.assert_close(found, logits.detach().sum())
    head = nn.Linear(48, 2)
    with torch.no_grad():
        features = model.encode_image(IMAGES)
    head(features).sum().backward()
    torch.testing.assert_close(head.weight.grad[0], features.sum(0))


def test_biases_norms_and_unlocked_groups_count() -> None:
    model = quantized().requires_grad_(False)
    site = model.visual.transformer.resblocks[1].mlp.fc2
    site.bias.requires_grad_(True)
    refused(model.encode_image(IMAGES).sum())
    site.bias.requires_grad_(False)
    model.visual.transformer.resblocks[1].ln_2.requires_grad_(True)
    refused(model.encode_image(IMAGES).sum())
    model.lock_image_tower()
    assert not model.encode_image(IMAGES).requires_grad
    model.lock_image_tower(unlocked_groups=2)
    refused(model.encode_image(IMAGES).sum())


def test_checkpointing_and_training_mode() -> None:
    model = quantized().train()
    model.set_grad_checkpointing(True)
    refused(model.encode_image(IMAGES).sum())
    refused(model.encode_text(model.tokenizer(TEXTS)).sum())
    with torch.no_grad():
        assert model.encode_image(IMAGES).isfinite().all()


@pytest.mark.slow
def test_a_compiled_model_refuses_in_backward_too() -> None:
    model = quantized()
    torch.compiler.reset()
    compiled = torch.compile(model.encode_image, fullgraph=True, backend="aot_eager")
    found = compiled(IMAGES)
    with torch.no_grad():
        assert torch.allclose(found, model.encode_image(IMAGES), atol=1e-5)
    refused(found.sum())


def test_functional_transforms() -> None:
    model = quantized().requires_grad_(False)
    with pytest.raises((GradientError, RuntimeError)):
        torch.func.grad(lambda x: model.encode_image(x).sum())(IMAGES)
    with pytest.raises((GradientError, RuntimeError, NotImplementedError)):
        torch.func.jvp(model.encode_image, (IMAGES,), (IMAGES,))


def test_back_in_float_the_gradients_are_those_of_float() -> None:
    model = qclip.dequantize_(quantized())
    x = IMAGES.clone().requires_grad_()
    model.encode_image(x).sum().backward()
    y = IMAGES.clone().requires_grad_()
    small_clip().encode_image(y).sum().backward()
    assert F.cosine_similarity(x.grad.flatten(), y.grad.flatten(), 0) > 0.99
