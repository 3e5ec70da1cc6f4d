"""The explicit form computes what the model computed, and its sites are what runs."""

import copy
import functools

import pytest
import torch
from torch import nn

from qclip import models
from qclip.models.tower import FEEDS, KINDS, Attention, Mlp
from tests.models.architectures import OPEN_CLIP, TIMM, images, perturb, tokens, with_trunk
from tests.models.small_timm import SMALL
from tests.models.small_timm import trunk as small_trunk

TRUNKS = {
    f"trunk_{name}_{proj}": (name, proj)
    for name, proj in [("vit_siglip", "none"), ("convnext", "linear"), ("convnext_1x1", "mlp"), ("vit_clip", "none")]
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in OPEN_CLIP:
        return perturb(OPEN_CLIP[name]())
    trunk, proj = TRUNKS[name]
    trunk = TIMM[trunk]()
    if proj != "none" or trunk.num_features == 24:
        trunk.reset_classifier(0)
    return perturb(with_trunk(trunk, proj))


@torch.no_grad()
def embed(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    run = models.encoders(model)
    return run.encode_image(images()), run.encode_text(tokens())


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


ALL = [*OPEN_CLIP, *TRUNKS]
RAW = TIMM | {name: functools.partial(small_trunk, name, num_classes=10) for name in SMALL}


@pytest.mark.parametrize("name", ALL)
def test_explicit_form_equals_the_original(name: str) -> None:
    model = build(name)
    before = embed(model)
    towers = models.towers(model)
    after = embed(model)
    assert close(after[0], before[0]) and close(after[1], before[1])
    assert set(towers) == {"vision", "text"}
    cores = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    decoder = list(getattr(model, "text_decoder", nn.Module()).modules())
    assert not [m for m in cores if m not in decoder], "packed attention is left in an encoder"


@pytest.mark.parametrize("name", [*ALL, *RAW])
def test_sites_are_what_runs(name: str) -> None:
    """Every site sees exactly `rows` rows per sample of width K, and equal `shared` means the same tensor."""
    model = perturb(RAW[name]()) if name in RAW else build(name)
    towers = models.towers(model)
    seen: dict[str, list[torch.Tensor]] = {}
    for tower in towers.values():
        for site in tower:
            site.module.register_forward_pre_hook(lambda _, args, n=site.name: seen.setdefault(n, []).append(args[0]))
    with torch.no_grad():
        if name in RAW:
            model(images())
        else:
            model.encode_image(images())
            model.encode_text(tokens(lengths=(16, 16, 16)))
    inputs: dict[str, torch.Tensor] = {}
    for tower in towers.values():
        assert len(tower.blocks) >= 2
        for site in tower:
            assert site.kind in KINDS and site.feed in FEEDS and site.tower == tower.name
            (x,) = seen[site.name]
            weight = tower.weight(site)
            if site.kind == "embedding":
                assert x.numel() == site.rows * 3
            elif isinstance(site.module, nn.Conv2d):
                n, k = weight.shape
                side = (x.shape[2] // site.module.stride[0]) * (x.shape[3] // site.module.stride[1])
                assert (side, n, k) == (site.rows, site.module.out_channels, x.shape[1] * site.module.stride[0] ** 2)
            else:
                assert x.shape[-1] == weight.shape[1]
                assert x.numel() == 3 * site.rows * weight.shape[1]
            first = inputs.setdefault(site.shared, x)
            assert first is x or torch.equal(first, x)
    assert len({s.shared for t in towers.values() for s in t}) == len(inputs)


@pytest.mark.parametrize("name", ["clip", "coca", "trunk_vit_siglip_none", "trunk_convnext_linear"])
def test_towers_is_idempotent(name: str) -> None:
    model = build(name)
    first = models.towers(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    second = models.towers(model)
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    for tower in first:
        assert [s.name for s in first[tower]] == [s.name for s in second[tower]]
        assert all(a.module is b.module for a, b in zip(first[tower], second[tower], strict=True))


def test_site_names_of_clip() -> None:
    towers = models.towers(build("clip"))
    block = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.fc1", "mlp.fc2"]
    blocks = [f"blocks.{i}.{part}" for i in range(2) for part in block]
    assert list(towers["vision"].sites) == [f"vision.{n}" for n in ["patch", *blocks, "projection"]]
    assert list(towers["text"].sites) == [f"text.{n}" for n in ["embedding", *blocks, "projection"]]
    sites = towers["vision"].sites
    assert {sites[f"vision.blocks.0.attn.{n}"].shared for n in "qkv"} == {"vision.blocks.0.attn.in"}
    assert [s.smoothable for s in towers["vision"].blocks[0].sites.values()] == [True] * 5 + [False]
    assert not sites["vision.patch"].smoothable and sites["vision.projection"].smoothable
    assert sites["vision.blocks.1.mlp.fc2"].feed == "activation"
    assert sites["vision.blocks.1.attn.out"].feed == "attention"
    assert towers["vision"].tokens == 17 and towers["text"].tokens == 16


def test_pool_sites() -> None:
    for name in ("coca", "trunk_vit_siglip_none"):
        tower = models.towers(build(name))["vision"]
        pool = tower.blocks[-1]
        assert pool.name == "vision.pool"
        assert [f"pool_{n}" in pool.sites for n in ("q", "k", "v", "out")] == [True] * 4
        assert pool.sites["pool_k"].shared == pool.sites["pool_v"].shared != pool.sites["pool_q"].shared
        assert pool.sites["pool_q"].name == "vision.pool.q"


def test_convnext_sites() -> None:
    tower = models.towers(build("trunk_convnext_linear"))["vision"]
    assert [n for n in tower.sites if n.endswith("downsample")] == [f"vision.blocks.{i}.downsample" for i in (1, 2, 4)]
    assert "vision.projection" in tower.sites and "vision.patch" in tower.sites and len(tower.blocks) == 5
    assert tower.blocks[1].sites["downsample"].kind == "downsample"


@pytest.mark.parametrize("name", RAW)
def test_raw_timm_models(name: str) -> None:
    model = perturb(RAW[name]())
    with torch.no_grad():
        before = model(images())
        tower = models.towers(model)["vision"]
        assert close(model(images()), before)
        assert close(copy.deepcopy(model)(images()), before)
    assert tower.module is model


def test_activation_is_told_by_its_values() -> None:
    for name, act in [("clip", "gelu"), ("quick_gelu", "quick_gelu"), ("siglip_text", "gelu_tanh")]:
        towers = models.towers(build(name))
        assert towers["text"].blocks[0].module.mlp.activation == act
    with pytest.raises(models.UnknownModelError.__base__, match="activation .*SiLU"):
        bad = build("clip")
        bad.transformer.resblocks[1].mlp.gelu = nn.SiLU()
        models.towers(bad)


def test_cores_are_plain() -> None:
    """Whoever fuses them changes their class in place, so an adapter must not subclass them."""
    for name in ("clip", "own_attention_all_norms", "trunk_vit_siglip_none", "coca"):
        for tower in models.towers(build(name)).values():
            for block in tower.blocks:
                assert block.attention is None or type(getattr(*block.attention)) is Attention
                assert block.mlp is None or type(getattr(*block.mlp)) is Mlp


def test_write_replaces_what_runs() -> None:
    model = build("clip")
    tower = models.towers(model)["vision"]
    before = embed(model)[0]
    site = tower.sites["vision.blocks.0.mlp.fc1"]
    old = tower.write(site, nn.Linear(48, 192))
    assert not close(embed(model)[0], before)
    tower.write(site, old)
    assert torch.equal(embed(model)[0], before)


def test_refused_half_way_still_computes_the_same() -> None:
    model = build("clip")
    before = embed(model)
    model.transformer.resblocks[1].mlp.gelu = nn.SiLU()
    changed = embed(model)
    with pytest.raises(ValueError, match="SiLU"):
        models.towers(model)
    after = embed(model)
    assert close(after[0], before[0]) and close(after[1], changed[1])
