"""Image towers of timm inside open_clip, EVA, Perception Encoder, ViTamin, MobileCLIP, Swin: from float to artifact."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import ModelError
from qclip.layers import QuantizedAttention, QuantizedMlp
from qclip.models import replay
from qclip.models.timm_vit import _is_patch
from qclip.models.tower import Rotary
from qkernels import cpu

from ..small import IMAGES, TEXTS, small_clip
from . import families
from .architectures import SMALL_CONVNEXT, SMALL_VIT, TIMM, perturb
from .small_timm import CONVOLUTIONAL, SMALL, build, strong, trunk

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


@needs_kernels
@pytest.mark.parametrize("name", ["eva02", "relpos", "swin"])
def test_tables_that_no_file_holds_come_back_in_bfloat16(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, x = qclip.quantize(kept(name), "w8a8").to(torch.bfloat16), IMAGES.bfloat16()
    for _ in range(3):
        replayed = embed(done, x)
    assert replay.counts(done.visual)["replayed"] >= 1 and replay.counts(done.visual)["why"] is None
    monkeypatch.setenv("QKERNELS_PROGRAM", "0")
    again = embed(qclip.load(qclip.save(done, tmp_path / "artifact")), x)
    for one, two in zip(replayed, again, strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, two)


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


#: What else timm's classes can be made with: the trunk, its settings.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "angles of halves": ("eva02", {"rope_rotate_half": True}),
    "mean pooling": ("eva02", {"global_pool": "avg"}),
    "positions that blocks share": ("relpos", {"shared_rel_pos": True}),
    "positions from a table": ("relpos", {"rel_pos_type": "bias"}),
    "windows with padding": ("swin", {"img_size": 40}),
}


@pytest.mark.parametrize("what", OPTIONS)
@torch.no_grad()
def test_options_of_trunks(what: str) -> None:
    name, settings = OPTIONS[what]
    tower, side = strong(perturb(trunk(name, **settings))), settings.get("img_size", 32)
    call = {"vision": lambda m: m(torch.nn.functional.interpolate(IMAGES, side))}
    families.explicit_form_equals(tower, call)
    families.rows_and_pairs_are_those_that_run(tower, call, len(IMAGES))


@pytest.mark.parametrize("name", ["fastvit_mci0", "convnext_tiny", "convnext_atto"])
def test_rows_and_pairs_of_images_that_are_no_squares(name: str) -> None:
    small = CONVOLUTIONAL if name.startswith("fastvit") else SMALL_CONVNEXT
    tower = timm.create_model(name, **small | {"pretrained_cfg_overlay": {"input_size": (3, 40, 68)}}).eval()
    families.rows_and_pairs_are_those_that_run(tower, {"vision": lambda m: m(torch.zeros(2, 3, 40, 68))}, 2)


@pytest.mark.parametrize("name", ["eva02", "eva_post_norm", "vit_clip"])
@torch.no_grad()
def test_blocks_take_masks(name: str) -> None:
    tower = strong(perturb(TIMM[name]() if name in TIMM else trunk(name)))
    x, mask = torch.randn(2, 5, 24), torch.zeros(5, 5).masked_fill(torch.rand(5, 5) > 0.6, -torch.inf).fill_diagonal_(0)
    settings = ({"attn_mask": mask}, {"is_causal": True})
    wants = [tower.blocks[0](x, **each) for each in settings]
    with models.explicit_form(tower):
        for each, want in zip(settings, wants, strict=True):
            torch.testing.assert_close(tower.blocks[0](x, **each), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_attention_pool_takes_masks() -> None:
    tower = strong(perturb(trunk("pe")))
    x, mask = torch.randn(2, 5, 24), torch.tensor([0.0, 0.0, -torch.inf, 0.0, -torch.inf]).expand(2, 1, 1, 5)
    want = tower.attn_pool(x, attn_mask=mask)
    with models.explicit_form(tower):
        torch.testing.assert_close(tower.attn_pool(x, attn_mask=mask), want, rtol=0, atol=1e-5)


def test_what_may_be_scaled() -> None:
    """Keys and values of a pool, where nothing stands between them and the norm; what a batch norm feeds."""
    pe, other = copy.deepcopy(kept("pe")), TIMM["vit_other_pool"]()
    with models.explicit_form(pe) as of_pe, models.explicit_form(other) as of_other:
        for towers, between in ((of_pe, False), (of_other, True)):
            pool = towers["vision"].blocks[-1].sites
            assert [pool[f"pool_{kind}"].smoothable for kind in "qkv"] == [False, not between, not between]
    with models.explicit_form(copy.deepcopy(kept("fastvit"))) as towers:
        assert all(block.sites["fc1"].smoothable for block in towers["vision"].blocks)


def test_registers_are_no_rows_of_a_pool_that_leaves_them_out() -> None:
    tower = timm.create_model("vit_base_patch16_siglip_224", **SMALL_VIT, num_classes=0, reg_tokens=4).eval()
    tower.pool_include_prefix = False
    families.rows_and_pairs_are_those_that_run(tower, {"vision": lambda m: m(IMAGES)}, len(IMAGES))


def test_an_overlapping_convolution_is_no_patch_embedding() -> None:
    assert _is_patch(nn.Conv2d(3, 8, 4, 4)) and not _is_patch(nn.Conv2d(3, 8, 3, 2)) and not _is_patch(nn.Identity())


def test_the_post_norm_block_reads_the_residual_stream() -> None:
    with models.explicit_form(copy.deepcopy(kept("eva_post_norm"))) as towers:
        sites = towers["vision"].blocks[0].sites
        assert {sites[kind].feed for kind in ("q", "k", "v", "fc1")} == {"raw"}
        assert not any(sites[kind].smoothable for kind in ("q", "fc1"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("eva02", "blocks.1.attn.attn_drop"),
        ("relpos", "blocks.0.mlp.drop1"),
        ("vitamin", "blocks.1.mlp.drop2"),
        ("swin", "layers.0.blocks.1.attn.proj_drop"),
    ],
)
def test_dropout_that_is_left_out_is_told(name: str, part: str) -> None:
    model = copy.deepcopy(kept(name))
    model.visual.trunk.get_submodule(part).p = 0.1
    with pytest.warns(UserWarning, match="has dropout inside attention or MLP"):
        models.towers(model)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_settings_without_an_explicit_form_are_named() -> None:
    gated, grouped = copy.deepcopy(kept("eva02")), copy.deepcopy(kept("eva02"))
    gated.visual.trunk.blocks[1].attn.gate = nn.Linear(24, 24)
    grouped.visual.trunk.blocks = trunk("eva02", num_kv_heads=1, attn_type="rope").blocks
    for model, why in ((gated, "gated attention"), (grouped, "grouped-query attention")):
        with pytest.raises(ModelError, match=f"trunk.blocks.[01].attn: .*{why}"):
            models.towers(model)
    pooled = copy.deepcopy(kept("relpos"))
    pooled.visual.head.add_module("pool", nn.Identity())
    with pytest.raises(ModelError, match="visual.head.pool: .*attention pooling over a feature map"):
        models.towers(pooled)
    swin, fastvit = copy.deepcopy(kept("swin")), copy.deepcopy(kept("fastvit"))
    swin.visual.trunk.dynamic_img_size, fastvit.visual.trunk.fork_feat = True, True
    for model, why in ((swin, "dynamic_img_size"), (fastvit, "the features of its stages")):
        with pytest.raises(ModelError, match=f"visual.trunk: .*{why}"):
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
