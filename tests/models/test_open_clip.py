"""A model in explicit form goes on being the user's open_clip model."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qclip import models
from qclip.errors import ModelError
from tests.models.architectures import BASE, COCA, OPEN_CLIP, TEXT, VISION, clip, images, perturb, tokens


def explicit(model: nn.Module) -> nn.Module:
    models.towers(model)
    return model


def twins(name: str = "clip") -> tuple[nn.Module, nn.Module]:
    """The original, and its copy in explicit form."""
    torch.manual_seed(0)
    model = perturb(OPEN_CLIP[name]())
    return model, explicit(copy.deepcopy(model))


@pytest.mark.parametrize("name", ["clip", "custom_text", "nonscalar_scale"])
@torch.no_grad()
def test_the_callers_interface_is_unchanged(name: str) -> None:
    model, ours = twins(name)
    x, t = images(), tokens()
    assert isinstance(ours, type(model)) and isinstance(ours.visual, open_clip.transformer.VisionTransformer)
    torch.testing.assert_close(ours.encode_image(x, normalize=True), model.encode_image(x, normalize=True))
    torch.testing.assert_close(ours.encode_text(t, normalize=True), model.encode_text(t, normalize=True))
    torch.testing.assert_close(ours(x, t), model(x, t))
    torch.testing.assert_close(
        ours(image=x)[0] if name == "clip" else ours.visual(x), model(image=x)[0] if name == "clip" else model.visual(x)
    )
    torch.testing.assert_close(ours.get_logits(x, t), model.get_logits(x, t))


@pytest.mark.parametrize("name", ["clip", "custom_text", "coca", "siglip_text", "no_text_projection"])
@torch.no_grad()
def test_forward_intermediates(name: str) -> None:
    model, ours = twins(name)
    wants = model.forward_intermediates(images(), tokens(), image_indices=1, output_logit_scale_bias=True)
    gets = ours.forward_intermediates(images(), tokens(), image_indices=1, output_logit_scale_bias=True)
    assert wants.keys() == gets.keys() and "text_features" in gets
    torch.testing.assert_close(gets, wants, rtol=0, atol=2e-5)


@torch.no_grad()
def test_coca_forward() -> None:
    model, ours = twins("coca")
    x, t = images(), tokens(15, (15, 15, 15))
    wants, gets = model(x, t), ours(x, t)
    torch.testing.assert_close(gets, wants, rtol=0, atol=2e-5)
    torch.testing.assert_close(models.encoders(ours).encode_text(t), model.encode_text(t, normalize=False))


def test_deepcopy_and_state_dict() -> None:
    _, ours = twins()
    with torch.no_grad():
        twin = copy.deepcopy(ours)
        assert torch.equal(twin.encode_text(tokens()), ours.encode_text(tokens()))
        other = explicit(clip())
        assert not torch.equal(other.encode_image(images()), ours.encode_image(images()))
        other.load_state_dict(ours.state_dict())
        assert torch.equal(other.eval().encode_image(images()), ours.encode_image(images()))
    twin.visual.proj.weight.data.zero_()
    assert ours.visual.proj.weight.abs().max() > 0, "the copy shares memory with the original"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_follow(dtype: torch.dtype) -> None:
    model, ours = twins()
    ours.to(dtype)
    assert ours.transformer.get_cast_dtype() == ours.visual.transformer.resblocks[0].get_weight_dtype() == dtype
    with torch.no_grad():
        out = ours.encode_text(tokens())
        assert out.dtype == dtype and models.encoders(ours).dtype == dtype
        assert F.cosine_similarity(out.float(), model.encode_text(tokens())).min() > 0.999
        assert ours.encode_image(images().to(dtype)).dtype == dtype
    ours.half()
    assert ours.transformer.get_cast_dtype() == torch.float16


def test_train_eval_and_gradients() -> None:
    model, ours = twins()
    for m in (model, ours):
        m.train()
        (m.encode_image(images()).square().sum() + m.encode_text(tokens()).square().sum()).backward()
    block = ours.visual.transformer.resblocks[0]
    assert block.attn.training and block.mlp.training and block.attn.q.training
    packed = model.visual.transformer.resblocks[0].attn.in_proj_weight.grad.chunk(3)
    for name, grad in zip("qkv", packed, strict=True):
        torch.testing.assert_close(getattr(block.attn, name).weight.grad, grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.text_projection.weight.grad, model.text_projection.grad.T, rtol=1e-4, atol=1e-5)
    ours.eval()
    assert not block.attn.q.training


def test_frozen_parameters_stay_frozen() -> None:
    model = clip()
    model.visual.lock()
    models.towers(model)
    assert not any(p.requires_grad for p in model.visual.parameters())
    assert model.text_projection.weight.requires_grad
    model.visual.lock(unlocked_groups=1)
    assert model.visual.proj.weight.requires_grad


def test_forward_hooks_on_blocks() -> None:
    _, ours = twins()
    seen = []
    ours.visual.transformer.resblocks[1].register_forward_hook(lambda m, args, out: seen.append(out))
    ours.visual.register_forward_hook(lambda m, args, out: seen.append(out))
    out = ours.encode_image(images())
    assert seen[0].shape == (3, 17, 48) and torch.equal(seen[1], out)


def test_hooks_registered_before_stay() -> None:
    model = perturb(clip())
    seen = []
    model.visual.transformer.resblocks[0].register_forward_hook(lambda *_: seen.append(1))
    explicit(model).encode_image(images())
    assert seen == [1]


@torch.no_grad()
def test_compiles_without_a_graph_break() -> None:
    model, ours = twins()
    whole = torch.compile(ours, backend="eager", fullgraph=True)
    for t in (tokens(), tokens(lengths=(16, 2, 11))):  # a length fixed at the first call would be wrong at the second
        torch.testing.assert_close(whole(images(), t)[:2], model(images(), t)[:2])
    model, ours = twins("custom_text")
    text = torch.compile(ours.text, backend="eager", fullgraph=True)
    torch.testing.assert_close(text(tokens()), model.text(tokens()), rtol=0, atol=1e-5)


def test_gradient_checkpointing() -> None:
    _, ours = twins()
    want = ours.encode_text(tokens())
    ours.set_grad_checkpointing()
    got = ours.train().encode_text(tokens())
    torch.testing.assert_close(got, want)
    got.sum().backward()


# ---- text truncation and the causal mask -----------------------------------------------------------------------------


def lengths_seen(model: nn.Module, run=None) -> list[int]:
    text = getattr(model, "text", model)
    seen: list[int] = []
    handle = text.transformer.resblocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        (run or model.encode_text)(tokens())
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("clip", 9),
        ("custom_text", 9),
        ("eos_pool", 9),
        ("own_attention", 9),
        ("siglip_text", 16),
        ("no_causal_mask", 16),
        ("coca", 17),
    ],
)
@torch.no_grad()
def test_text_stops_at_the_last_eot_where_that_is_exact(name: str, length: int) -> None:
    model, ours = twins(name)
    assert lengths_seen(ours) == [length]
    torch.testing.assert_close(ours.encode_text(tokens()), model.encode_text(tokens()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_text_is_whole_while_tracing_on_other_devices_and_for_intermediates(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = twins()
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        assert lengths_seen(ours) == [16]
    assert lengths_seen(ours, lambda t: ours.forward_intermediates(text=t)) == [16]
    assert ours.visible_tokens(torch.zeros(2, 16, dtype=torch.long, device="meta")).shape == (2, 16)
    custom = explicit(perturb(clip(custom=True, text={"output_tokens": True})))
    assert lengths_seen(custom) == [16]


@torch.no_grad()
def test_encoders_cut_text_in_host_memory_before_it_moves() -> None:
    """So that a GPU need not be asked for the length; the meta device stands in for one."""
    _, ours = twins()
    ours.to("meta")
    assert lengths_seen(ours, models.encoders(ours).encode_text) == [9]
    assert lengths_seen(ours, lambda t: ours.encode_text(t.to("meta"))) == [16]


@torch.no_grad()
def test_odd_batches_of_text() -> None:
    model, ours = twins()
    assert ours.encode_text(tokens()[:0]).shape == (0, 24)
    full = tokens(lengths=(16, 2, 16))
    torch.testing.assert_close(ours.encode_text(full), model.encode_text(full), rtol=0, atol=1e-5)
    empty = torch.zeros(2, 16, dtype=torch.long)
    torch.testing.assert_close(ours.encode_text(empty), model.encode_text(empty), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens()[:, :9]), model.encode_text(tokens()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "length"), [("clip", 17), ("custom_text", 17), ("siglip_text", 20), ("coca", 17)])
def test_texts_longer_than_the_positions_are_refused(name: str, length: int) -> None:
    _, ours = twins(name)
    long = tokens(length, (length, 3, length))
    with pytest.raises(ModelError, match=f"texts of {length} tokens are longer than the 16 positions"):
        ours.encode_text(long)
    ours.encode_text(long[:, :16])


@torch.no_grad()
def test_the_triangular_mask_reaches_the_cores_as_causal() -> None:
    for name, want in (("clip", (None, True)), ("custom_text", (None, True)), ("no_causal_mask", (None, False))):
        _, ours = twins(name)
        text = getattr(ours, "text", ours)
        seen = []
        text.transformer.resblocks[0].attn.register_forward_pre_hook(
            lambda m, args, kwargs, s=seen: s.append((kwargs["mask"], kwargs["causal"])), with_kwargs=True
        )
        ours.encode_text(tokens())
        assert seen == [want]


@torch.no_grad()
def test_another_mask_is_not_taken_for_causal() -> None:
    model = perturb(clip())
    model.attn_mask = model.attn_mask.clone()
    model.attn_mask[:4, :4] = 0  # the first four tokens see each other
    want = model.encode_text(tokens())
    ours = explicit(copy.deepcopy(model))
    assert lengths_seen(ours) == [16]
    torch.testing.assert_close(ours.encode_text(tokens()), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_masks_handed_to_the_transformer_by_the_caller() -> None:
    model, ours = twins()
    x = torch.randn(2, 16, 32)
    for mask in (None, model.attn_mask, torch.randn(16, 16), torch.randn(8, 16, 16)):
        torch.testing.assert_close(
            ours.transformer(x, attn_mask=mask), model.transformer(x, attn_mask=mask), rtol=0, atol=1e-5
        )
    own, ours = twins("own_attention")
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    torch.testing.assert_close(
        ours.transformer(x, attn_mask=hidden), own.transformer(x, attn_mask=hidden), rtol=0, atol=1e-5
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_resnet_is_refused_by_name() -> None:
    config = BASE | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}
    with pytest.raises(ModelError, match="ResNet.*ModifiedResNet.*RN50"):
        models.towers(open_clip.CLIP(**config))


def test_unknown_classes_are_named() -> None:
    with pytest.raises(ModelError, match=r"torch\.nn\.modules\.linear\.Linear is not supported"):
        models.towers(nn.Linear(2, 2))
    model = clip()
    model.visual = nn.Identity()
    with pytest.raises(ModelError, match="Identity is not supported"):
        models.towers(model)
    with pytest.raises(ModelError, match="Linear has no encode_image"):
        models.encoders(nn.Linear(2, 2))


def test_settings_without_an_explicit_form_are_named() -> None:
    with pytest.raises(ModelError, match="scaled cosine"):
        models.towers(clip({"scaled_cosine_attn": True}))
    model = clip()
    model.visual.transformer.resblocks[0].attn.batch_first = False
    with pytest.raises(ModelError, match="batch_first"):
        models.towers(model)
    with pytest.warns(UserWarning, match="dropout"):
        model = clip()
        model.visual.transformer.resblocks[0].attn.dropout = 0.1
        models.towers(model)


# ---- encoders --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encoders() -> None:
    model = perturb(clip(init_logit_bias=-3.0))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    for m in (model, explicit(copy.deepcopy(model))):
        run = models.encoders(m)
        assert run.logit_scale == pytest.approx(7.389056) and run.logit_bias == -3.0
        assert (run.image_size, run.device, run.dtype) == (32, torch.device("cpu"), torch.float32)
        assert run.preprocess.config["image_size"] == 32
        torch.testing.assert_close(run.encode_image(images().double()), model.encode_image(images()))
    coca = perturb(open_clip.CoCa(**COCA))
    norms = models.encoders(coca).encode_image(images()).norm(dim=-1)
    assert (norms - 1).abs().max() > 1e-3, "CoCa's embeddings must come unnormalised"


def test_small_configs_cover_both_towers() -> None:
    assert VISION["width"] != TEXT["width"], "equal widths would hide a mixed-up tower"
