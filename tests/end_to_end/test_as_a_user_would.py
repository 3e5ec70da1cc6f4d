"""What users do to a model besides calling it: none of it may be wrong without a word on a quantized one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import qclip
from qclip import models
from qclip.layers import QuantizedAttention

from ..models.test_huggingface import build as build_hf
from ..small import IMAGES, TEXTS, small_clip

pytestmark = pytest.mark.slow  # whole commands


@pytest.fixture
def model() -> nn.Module:
    return qclip.quantize_(small_clip(), "w8a8")


@torch.no_grad()
def test_norms_stay_where_they_are(model: nn.Module) -> None:
    plain = small_clip()
    for name in ("visual.transformer.resblocks.0.ln_1", "transformer.resblocks.1.ln_2"):
        mine, norm = model.get_submodule(name), plain.get_submodule(name)
        x = torch.randn(2, 3, norm.normalized_shape[0])
        assert torch.equal(mine(x), norm(x)) and torch.equal(mine.weight, norm.weight)
        assert f"{name}.weight" in model.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w6a8"])
def test_x_times_a_projection(recipe: str) -> None:
    plain, small = small_clip(), qclip.quantize_(small_clip(), recipe)
    for name, width in (("visual.proj", 64), ("text_projection", 32)):
        owner, _, child = name.rpartition(".")
        x = torch.randn(5, width)
        wanted = x @ getattr(plain.get_submodule(owner), child)
        found = x @ getattr(small.get_submodule(owner), child)
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.99
    with models.explicit_form(plain):
        y = torch.randn(5, 64)
        torch.testing.assert_close(y @ plain.visual.proj, y @ plain.visual.proj.weight.T)


@torch.no_grad()
@pytest.mark.parametrize("form", ["explicit", "w8a8", "w4a8"])
def test_the_packed_projection_is_there_to_read(form: str) -> None:
    plain, small = small_clip(), small_clip()
    models.towers(small) if form == "explicit" else qclip.quantize_(small, form)
    wanted, found = (m.visual.transformer.resblocks[1].attn for m in (plain, small))
    limit = {"explicit": 0.0, "w8a8": 0.01, "w4a8": 0.15}[form]
    error = (found.in_proj_weight - wanted.in_proj_weight).norm() / wanted.in_proj_weight.norm()
    assert found.in_proj_weight.shape == (192, 64) and error <= limit
    assert torch.equal(found.in_proj_bias, wanted.in_proj_bias)
    assert found.out_proj is found.out
    with pytest.raises(RuntimeError):
        found.in_proj_weight.mul_(2)
    with pytest.raises(RuntimeError):
        found.in_proj_weight[0] = 0


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["visual.conv1", "token_embedding", "visual.proj", "visual.transformer.resblocks.0.mlp.c_fc"]
)
def test_a_weight_shows_what_it_is_and_gives_no_numbers(name: str, model: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    module = getattr(model.get_submodule(owner), child)
    weight, bias = module.weight, getattr(getattr(small_clip().get_submodule(owner), child), "weight", None)
    assert weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.requires_grad
    if bias is not None:
        assert weight.shape == bias.shape and weight.numel() == bias.numel()
    for use in (
        lambda: weight.norm(),
        lambda: weight.data,
        lambda: weight.T,
        lambda: torch.mean(weight),
        lambda: torch.ones(2, 3) @ weight,
        lambda: weight * 2,
        lambda: weight[0],
        lambda: torch.nn.functional.linear(torch.ones(2, 3), weight),
        lambda: nn.init.zeros_(weight),
    ):
        with pytest.raises((AttributeError, TypeError), match=r"held as quantized codes; .* dequantized_weight\(\)"):
            use()
    assert module.dequantized_weight().numel() == weight.numel()


def test_copies_of_every_kind(model: nn.Module) -> None:
    tokens = model.tokenizer(TEXTS)
    with torch.no_grad():
        wanted = model.encode_image(IMAGES), model.encode_text(tokens)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
            assert torch.equal(other.encode_image(IMAGES), wanted[0])
            assert torch.equal(other.encode_text(tokens), wanted[1])
        # What DataParallel makes for each device.
        replica = copy.copy(model)
        replica._modules = dict(model._modules)
        replica.visual = model.visual._replicate_for_data_parallel()
        for name, value in model.visual._parameters.items():
            setattr(replica.visual, name, value)
        assert torch.equal(replica.encode_image(IMAGES), wanted[0])
        alone = nn.DataParallel(model)  # without a GPU: the model itself
        assert torch.equal(alone.module.encode_image(IMAGES), wanted[0])


def test_meta_and_back(model: nn.Module) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model.encode_image(IMAGES)
        empty = copy.deepcopy(model).to("meta")
        assert all(t.is_meta for t in empty.state_dict().values())
        assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in state.items()
        }
        empty.to_empty(device="cpu").load_state_dict(state)
        empty.attn_mask = model.attn_mask
        assert torch.allclose(empty.encode_image(IMAGES), wanted, atol=1e-4)  # not packed: a warning says so


def test_other_dtypes(model: nn.Module) -> None:
    with torch.no_grad():
        wanted = model.encode_image(IMAGES)
        back = copy.deepcopy(model).half().float()
        assert torch.nn.functional.cosine_similarity(back.encode_image(IMAGES), wanted, dim=-1).min() > 0.999
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            copy.deepcopy(model).double().encode_image(IMAGES.double())


def test_state_dicts_of_other_models_do_not_fit(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(small_clip().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch|key"):
        model.load_state_dict(qclip.quantize_(small_clip(), "w4a8").state_dict())


def test_tied_weights_and_shared_blocks() -> None:
    model = small_clip()
    model.visual.transformer.resblocks[1].mlp.c_fc.weight = model.visual.transformer.resblocks[0].mlp.c_fc.weight
    model.transformer.resblocks[1] = model.transformer.resblocks[0]
    tokens = model.tokenizer(TEXTS)
    with torch.no_grad():
        wanted = model.encode_image(IMAGES), model.encode_text(tokens)
        qclip.quantize_(model, "w8a8")
        found = model.encode_image(IMAGES), model.encode_text(tokens)
    for a, b in zip(found, wanted, strict=True):
        assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.99


def test_cores_replaced_by_hand_are_used(model: nn.Module) -> None:
    core = model.visual.transformer.resblocks[0].attn
    assert isinstance(core, QuantizedAttention)
    with torch.no_grad():
        before = model.encode_image(IMAGES)
        core.out = nn.Linear(64, 64)
        assert not torch.equal(model.encode_image(IMAGES), before)
        core.q = nn.Linear(64, 64)
        after = model.encode_image(IMAGES)
        assert after.isfinite().all() and not torch.equal(after, before)
        model.visual.transformer.resblocks[0].mlp.fc1 = nn.Linear(64, 256)
        model.visual.transformer.resblocks[0].mlp.fc2 = nn.Linear(256, 64)
        assert not torch.equal(model.encode_image(IMAGES), after)


def test_hugging_face_in_half_and_copied() -> None:
    model = qclip.quantize_(build_hf("clip"), "w8a8")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model))).bfloat16()
    assert twin.dtype == torch.bfloat16 and type(twin) is type(model)
    assert twin.get_input_embeddings is not None and model.num_parameters() > 0
