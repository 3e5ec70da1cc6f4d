"""Image towers of timm inside open_clip, EVA, Perception Encoder, ViTamin, MobileCLIP, Swin: from float to artifact."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

import qclip
from qclip import models, recipes
from qclip.errors import ModelError
from qclip.layers import QuantizedAttention, QuantizedMlp
from qclip.models import replay
from qclip.models.tower import Rotary
from qkernels import cpu

from ..small import IMAGES, TEXTS, small_clip
from .small_timm import SMALL, build, trunk

ALL = list(SMALL)
needs_kernels = pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")


@functools.cache
def kept(name: str) -> Any:
    return build(name)


@torch.no_grad()
def embed(model: Any, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    run = models.encoders(model)
    return run.encode_image(images), run.encode_text(model.tokenizer(TEXTS))


def nearest(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.float(), b.float()).min())


@pytest.mark.parametrize("name", ALL)
def test_explicit_form_equals_the_original(name: str) -> None:
    model = copy.deepcopy(kept(name))
    before = embed(model)
    with models.explicit_form(model) as towers:
        assert set(towers) == {"vision", "text"}
        after = embed(model)
        intermediates = model.visual.forward_intermediates(IMAGES)["image_features"]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5 * max(1.0, float(old.abs().max())))
    if not name.startswith("fastvit"):  # timm's own forward_intermediates leaves out the final convolution's pooling
        torch.testing.assert_close(intermediates, before[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(embed(model)[0], before[0])


EXPECTED = {
    "eva02": ["q", "k", "v", "out", "gate", "fc1", "fc2"],
    "eva": ["q", "k", "v", "out", "fc1", "fc2"],
    "pe": ["q", "k", "v", "out", "fc1", "fc2"],
    "vitamin": ["q", "k", "v", "out", "gate", "fc1", "fc2"],
    "swin": ["q", "k", "v", "out", "fc1", "fc2"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_have_the_names_of_a_vision_transformer(name: str) -> None:
    with models.explicit_form(copy.deepcopy(kept(name))) as towers:
        block = towers["vision"].blocks[0]
        assert list(block.sites) == EXPECTED[name]
        parts = {kind: "mlp" if kind in ("gate", "fc1", "fc2") else "attn" for kind in block.sites}
        assert [site.name for site in block.sites.values()] == [f"vision.blocks.0.{parts[k]}.{k}" for k in block.sites]
        assert ("vision.patch" in towers["vision"].sites) == (name != "vitamin")
        if "gate" in block.sites:
            assert block.sites["gate"].shared == block.sites["fc1"].shared


@pytest.mark.parametrize("name", ALL)
def test_every_site_is_quantized_and_what_stays_float_is_counted(name: str) -> None:
    model = kept(name)
    done = qclip.quantize(model, "w8a8")
    coverage = qclip.coverage(done)
    float_rows = {row.kind for row in coverage.rows if row.state == "float"}
    assert float_rows <= {"attention", "convolution", "other"}
    assert ("convolution" in float_rows) == name.startswith(("fastvit", "vitamin"))
    assert sum(row.parameters for row in coverage.rows) == sum(p.numel() for p in model.parameters()) - 1  # logit scale
    before, after = embed(model), embed(done)
    assert nearest(after[0], before[0]) > 0.99 and nearest(after[1], before[1]) > 0.99
    assert not torch.equal(after[0], before[0])
    cores = [m for m in done.visual.modules() if isinstance(m, QuantizedAttention | QuantizedMlp)]
    assert all(core.shares_input for core in cores if isinstance(core, QuantizedAttention) and "pool" not in name)


@pytest.mark.parametrize("name", ["eva02", "fastvit", "swin"])
@pytest.mark.parametrize("recipe", [name for name in recipes.presets() if name != "w8a8"])
def test_presets(name: str, recipe: str) -> None:
    model, wanted = kept(name), dataclasses.replace(recipes.parse(recipe), towers=("vision",))
    done = qclip.quantize(model, wanted, calibration=IMAGES)
    before, after = embed(model), embed(done)
    least = 0.5 if recipe in ("w4a4", "w3.3a8-raana") else 0.98 if wanted.default.weight_bits > 4 else 0.8
    assert nearest(after[0], before[0]) > least and not torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-5)  # the text tower stays float


@needs_kernels
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ALL]
    + [(name, torch.bfloat16) for name in ("eva02", "pe", "vitamin", "fastvit", "relpos", "swin")],
)
def test_replay_and_artifact_have_the_bits_of_the_modules(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = qclip.quantize(kept(name), "w8a8").to(dtype)
    for _ in range(3):
        replayed = embed(done, IMAGES.to(dtype))
    assert replay.counts(done.visual)["replayed"] >= 1 and replay.counts(done.visual)["why"] is None
    monkeypatch.setenv("QKERNELS_PROGRAM", "0")
    by_modules = embed(done, IMAGES.to(dtype))
    again = embed(qclip.load(qclip.save(done, tmp_path / "artifact")), IMAGES.to(dtype))
    for one, two, three in zip(replayed, by_modules, again, strict=True):
        assert one.dtype == dtype and torch.equal(one, two) and torch.equal(two, three)
    assert nearest(by_modules[0], embed(kept(name))[0]) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eva02", "vitamin", "fastvit", "swin"])
@torch.no_grad()
def test_compiles_without_a_graph_break(name: str) -> None:
    model = copy.deepcopy(kept(name))
    wanted = model.visual(IMAGES)
    models.towers(model)
    torch.compiler.reset()  # of other towers: it compiles only so many versions of one method
    whole = torch.compile(model.visual, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(IMAGES), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eva02", "vitamin", "fastvit", "swin"])
@torch.no_grad()
def test_hooks_on_layers_see_what_they_saw(name: str) -> None:
    model = copy.deepcopy(kept(name))
    seen: dict[str, list[Tensor]] = {"norm": [], "block": [], "mlp": []}
    blocks = [m for m in model.visual.modules() if type(m).__name__.endswith("Block") and hasattr(m, "mlp")]
    watched = {"block": blocks[-1], "mlp": blocks[-1].mlp}
    norms = [m for n, m in blocks[-1].named_children() if n in ("norm", "norm1")]
    watched |= {"norm": norms[0]} if norms else {}
    for key, module in watched.items():
        module.register_forward_hook(lambda _, __, out, key=key: seen[key].append(out))
    embed(model)
    qclip.quantize_(model, "w8a8")
    embed(model)
    for key in watched:
        before, after = seen[key]
        assert before.shape == after.shape and nearest(after.flatten(1), before.flatten(1)) > 0.99


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("heads", ["one table", "a table for each head", "and for each sample"])
@torch.no_grad()
def test_rotary_positions_are_those_of_timm(halves: bool, heads: str) -> None:
    angles = torch.randn({"one table": (7, 4), "a table for each head": (2, 7, 4)}.get(heads, (3, 2, 7, 4)))
    layout = torch.cat((angles, angles), -1) if halves else angles.repeat_interleave(2, -1)
    rope = torch.cat((layout.sin(), layout.cos()), -1)
    q, k = torch.randn(3, 9, 2, 8), torch.randn(3, 9, 2, 8)
    found = Rotary(2, halves)(q, k, rope)
    for x, y in zip((q, k), found, strict=True):
        assert torch.equal(y[:, :2], x[:, :2])
        wanted = apply_rot_embed_cat(x[:, 2:].transpose(1, 2), rope, half=halves).transpose(1, 2)
        torch.testing.assert_close(y[:, 2:], wanted)
    assert Rotary(2, halves)(q.bfloat16(), k.bfloat16(), rope)[0].dtype == torch.bfloat16


# ---- refused ---------------------------------------------------------------------------------------------------------


class Other(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def _attention(model: Any) -> None:
    model.visual.trunk.blocks[1].attn = Other()


def _mlp(model: Any) -> None:
    model.visual.trunk.blocks[1].mlp = Other()


def _last_block(model: Any) -> None:
    stages = getattr(model.visual.trunk, "stages", None) or model.visual.trunk.layers
    stages[-1].blocks[0] = Other()


ALMOST: dict[str, tuple[str, Callable[[Any], None]]] = {
    "attention of EVA": ("eva02", _attention),
    "MLP of EVA": ("eva02", _mlp),
    "MLP of ViTamin": ("vitamin", _mlp),
    "attention of relative positions": ("relpos", _attention),
    "block of FastViT": ("fastvit", _last_block),
    "block of Swin": ("swin", _last_block),
}


@pytest.mark.parametrize("what", ALMOST)
def test_a_model_that_is_almost_known_is_refused_by_the_module_that_differs(what: str) -> None:
    name, spoil = ALMOST[what]
    model = copy.deepcopy(kept(name))
    spoil(model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=r"test_timm_families\.Other is not supported"):
        qclip.quantize_(model, "w8a8")
    assert [type(module) for module in model.modules()] == before


def test_settings_without_an_explicit_form_are_named() -> None:
    gated, grouped = copy.deepcopy(kept("eva02")), copy.deepcopy(kept("eva02"))
    gated.visual.trunk.blocks[1].attn.gate = nn.Linear(24, 24)
    grouped.visual.trunk.blocks = trunk("eva02", num_kv_heads=1, attn_type="rope").blocks
    for model, why in ((gated, "gated attention"), (grouped, "grouped-query attention")):
        with pytest.raises(ModelError, match=why):
            models.towers(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["eva02", "pe", "relpos", "swin"])
def test_images_of_another_size_are_refused(name: str) -> None:
    done = qclip.quantize(kept(name), {"name": "images", "towers": ["vision"]})
    for side in (4, 24, 40):
        with pytest.raises(AssertionError, match=rf"{side}\) doesn't match model"):
            done.encode_image(torch.zeros(1, 3, side, side))


@torch.no_grad()
def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="a patch of 8 x 8 does not fit"):
        qclip.quantize(small_clip(), {"name": "images", "towers": ["vision"]}).encode_image(torch.zeros(1, 3, 4, 4))
