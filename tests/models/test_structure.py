"""Whoever only looks at a model, or fails to quantize it, leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qclip
from qclip import models, rewrite
from qclip.errors import ModelError, QclipError
from qclip.ptq import base
from qclip.spectral import weight_spectrum
from qkernels import cpu

from ..small import IMAGES, small_clip
from .architectures import OPEN_CLIP, TIMM, perturb, with_trunk
from .test_huggingface import build as build_hf


def convnext() -> nn.Module:
    trunk = TIMM["convnext_1x1"]()
    trunk.reset_classifier(0)
    return with_trunk(trunk, "linear")


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "clip": small_clip,
    "coca": OPEN_CLIP["coca"],
    "own_attention": OPEN_CLIP["own_attention_all_norms"],
    "trunk_siglip": lambda: with_trunk(TIMM["vit_siglip"](), "none"),
    "trunk_convnext": convnext,
    "hf_clip": lambda: build_hf("clip"),
    "hf_siglip": lambda: build_hf("siglip"),
}


def seen(model: nn.Module) -> dict[str, Any]:
    """All of a model that its owner can see; tensors by identity and by value."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: list(module._forward_hooks.values()) for name, module in model.named_modules()},
        "tensors": {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())},
        "keys": list(model.state_dict()),
    }


@contextlib.contextmanager
def unchanged(model: nn.Module):
    model.train()
    frozen = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for module in frozen[::2]:
        module.eval()  # a mode of its own
    before, values = seen(model), {key: value.clone() for key, value in model.state_dict().items()}
    yield
    after = seen(model)
    for what in before:
        assert after[what] == before[what], what
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", BUILDERS)
def test_the_explicit_form_goes_away_again(name: str) -> None:
    model = perturb(BUILDERS[name]())
    handle = next(m for m in model.modules() if isinstance(m, nn.LayerNorm)).register_forward_hook(lambda *a: None)
    with unchanged(model), models.explicit_form(model) as towers:
        assert "vision" in towers and any(".q." in key for key in model.state_dict()) or "convnext" in name
    with unchanged(model), pytest.raises(KeyboardInterrupt), models.explicit_form(model):
        raise KeyboardInterrupt
    handle.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_the_explicit_form_shares_the_memory_of_the_weights() -> None:
    model = small_clip()
    packed = model.visual.transformer.resblocks[0].attn.in_proj_weight
    with models.explicit_form(model) as towers:
        q = towers["vision"].sites["vision.blocks.0.attn.q"].module.weight
        assert q.data_ptr() == packed.data_ptr() and torch.equal(q, packed[:64])


@pytest.mark.parametrize("name", BUILDERS)
def test_coverage_and_spectra_of_a_float_model(name: str) -> None:
    model = perturb(BUILDERS[name]())
    with unchanged(model):
        assert qclip.coverage(model).share("float") == 1
    with unchanged(model):
        assert weight_spectrum(model, {}, sites="vision.blocks.0.mlp.fc1", seeds=8)


def test_coverage_of_a_quantized_model_leaves_it() -> None:
    model = qclip.quantize_(small_clip(), "w8a8")
    with unchanged(model):
        assert qclip.coverage(model).share("real") > 0.9


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


def _unknown_block(model: nn.Module) -> None:
    model.transformer.resblocks[1].mlp.gelu = Broken()


def _infinite(model: nn.Module) -> None:
    model.transformer.resblocks[1].mlp.c_proj.weight.data[0, 0] = torch.inf


FAILURES = {
    "unknown activation": (_unknown_block, "w8a8", None, "activation"),
    "infinite weight in the last block": (_infinite, "w8a8", None, "NaN or Inf"),
    "calibration of another size": (None, "w8a8-static", torch.zeros(2, 3, 7, 7), "calibration images"),
    "calibration that is not finite": (None, "w8a8-static", IMAGES * torch.nan, "NaN or Inf"),
    "calibration that is missing": (None, "w8a8-smoothquant", None, "needs data"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_quantization_leaves_the_model(failure: str) -> None:
    spoil, recipe, calibration, message = FAILURES[failure]
    model = small_clip()
    if spoil is not None:
        spoil(model)
    with unchanged(model):
        with pytest.raises(QclipError, match=message):
            qclip.quantize_(model, recipe, calibration)
    assert rewrite.quantization(model) is None


def test_a_recipe_for_a_tower_that_is_missing_leaves_the_model() -> None:
    model = TIMM["vit_clip"]()
    model.logit_scale = nn.Parameter(torch.zeros(()))
    with unchanged(model), pytest.raises(QclipError, match="wants the text tower"):
        qclip.quantize_(model, {"name": "texts", "towers": ["text"]})


@pytest.mark.parametrize("at", [0, 1, 9, 25])
def test_ctrl_c_while_rounding_leaves_the_model(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    quantize_weight = base.quantize_weight

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        return quantize_weight(*args)

    monkeypatch.setattr(base, "quantize_weight", interrupted)
    model = small_clip()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        qclip.quantize_(model, "w8a8-smoothquant" if at == 9 else "w8a8", IMAGES)


def test_ctrl_c_while_layers_are_written_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    join = qclip.layers.QuantizedAttention.join

    def interrupted(core: nn.Module) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        join(core)

    monkeypatch.setattr(qclip.layers.QuantizedAttention, "join", interrupted)
    model = small_clip()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        qclip.quantize_(model, "w8a8")


def test_modes_of_single_modules_outlive_quantization() -> None:
    model = small_clip().train()
    model.visual.ln_post.eval()
    model.visual.transformer.resblocks[1].eval()
    qclip.quantize_(model, "w8a8")
    assert model.training and not model.visual.ln_post.training
    first, second = model.visual.transformer.resblocks
    assert all(m.training for m in first.modules()) and not any(m.training for m in second.modules())


@torch.no_grad()
def test_a_forward_of_its_own_class_on_an_object_is_no_code_of_the_users() -> None:
    """transformers 4 leaves it on layers that have given hidden states."""
    model = small_clip()
    block = model.visual.transformer.resblocks[0]
    block.forward = block.forward
    want = model.encode_image(IMAGES)
    with models.explicit_form(model):
        assert "forward" not in block.__dict__
        torch.testing.assert_close(model.encode_image(IMAGES), want)
    assert block.__dict__["forward"].__func__ is type(block).forward
    done = qclip.quantize(model, "w8a8")
    done.visual.transformer.resblocks[1].forward = done.visual.transformer.resblocks[1].forward
    for _ in range(12):
        done.encode_image(IMAGES)
    if cpu.native is not None:
        assert qclip.program_counts(done)["visual"]["replayed"] >= 1
    block.forward = small_clip().visual.transformer.resblocks[0].forward
    with pytest.raises(ModelError, match="resblocks.0 has a forward of its own"):
        qclip.quantize(model, "w8a8")
