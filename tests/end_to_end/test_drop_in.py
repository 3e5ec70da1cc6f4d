"""The quantized model is the user's own model: what worked on the float one works on it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import qclip

RECIPES = ["w8a8", "w4a8", "w4a16"]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def load(tiny_model: str) -> nn.Module:
    return qclip.load_model(tiny_model)


def pixels(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).min())


def zero_shot(model: nn.Module, preprocess, tokenizer) -> Tensor:
    """open_clip's README, unchanged but for the picture."""
    model.eval()
    image = preprocess(picture()).unsqueeze(0)
    text = tokenizer(["a diagram", "a dog", "a cat"])

    with torch.no_grad(), torch.autocast("cuda"):
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        image_features /= image_features.norm(dim=-1, keepdim=True)
        text_features /= text_features.norm(dim=-1, keepdim=True)

        text_probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    return text_probs


@pytest.mark.parametrize("recipe", RECIPES)
def test_open_clips_own_example_runs_unchanged(tiny_model: str, recipe: str) -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(tiny_model)
    tokenizer = open_clip.get_tokenizer(tiny_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast("cuda") says that there is no GPU here
        before = zero_shot(model, preprocess, tokenizer)
        kind = type(model)
        assert qclip.quantize_(model, recipe) is model and isinstance(model, kind)
        after = zero_shot(model, preprocess, tokenizer)
    assert after.shape == before.shape == (1, 3) and torch.allclose(after.sum(), torch.ones(()))
    assert (after - before).abs().max() < 0.1
    assert not torch.equal(after, before)  # it is quantized


def test_whole_forward_and_autocast(tiny_model: str) -> None:
    model = load(tiny_model)
    small = qclip.quantize(model, "w8a8")
    tokens = model.tokenizer(["a dog", "a red star on grass"])
    with torch.no_grad():
        wanted, found = model(pixels(), tokens), small(pixels(), tokens)
        assert cosine(found[0], wanted[0]) > 0.99 and cosine(found[1], wanted[1]) > 0.99
        assert torch.equal(found[2], wanted[2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert cosine(small.encode_image(pixels()), wanted[0]) > 0.98


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_deep_copy_is_equal_and_independent(tiny_model: str, recipe: str) -> None:
    small = qclip.quantize_(load(tiny_model), recipe)
    with torch.no_grad():
        wanted = small.encode_image(pixels())
        twin = copy.deepcopy(small)
        assert torch.equal(twin.encode_image(pixels()), wanted)
        twin.visual.ln_post.weight.zero_()
        twin.visual.ln_post.bias.zero_()
        assert torch.equal(small.encode_image(pixels()), wanted)
        assert not torch.equal(twin.encode_image(pixels()), wanted)
    assert twin.qclip_quantization.recipe == small.qclip_quantization.recipe


def test_a_whole_model_can_be_pickled(tiny_model: str, tmp_path: Path) -> None:
    small = qclip.quantize_(load(tiny_model), "w8a8")
    torch.save(small, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    tokens = small.tokenizer(["a dog"])
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels()), small.encode_image(pixels()))
        assert torch.equal(again.encode_text(tokens), small.encode_text(tokens))
    assert type(again) is type(small) and qclip.coverage(again).share("real") == qclip.coverage(small).share("real")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_dict_goes_round(tiny_model: str, recipe: str) -> None:
    one, other = qclip.quantize_(load(tiny_model), recipe), load(tiny_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    qclip.quantize_(other, recipe)
    tokens = one.tokenizer(["a dog"])
    with torch.no_grad():
        wanted = one.encode_image(pixels()), one.encode_text(tokens)
        assert not torch.equal(other.encode_image(pixels()), wanted[0])
        state = one.state_dict()
        other.load_state_dict(state)
        assert torch.equal(other.encode_image(pixels()), wanted[0])
        assert torch.equal(other.encode_text(tokens), wanted[1])
        again = other.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiles_without_a_graph_break(tiny_model: str, recipe: str) -> None:
    small = qclip.quantize_(load(tiny_model), recipe)
    tokens = small.tokenizer(["a dog", "a red star on grass"])
    torch.compiler.reset()
    with torch.no_grad():
        for encode, x in ((small.encode_image, pixels()), (small.encode_text, tokens)):
            wanted = encode(x)
            compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
            assert cosine(compiled(x), wanted) > 0.9999


def test_hooks_on_a_block_fire_and_may_change_its_output(tiny_model: str) -> None:
    small = qclip.quantize_(load(tiny_model), "w8a8")
    block = small.visual.transformer.resblocks[0]
    seen: list[tuple[int, ...]] = []
    with torch.no_grad():
        wanted = small.encode_image(pixels())
        handle = block.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
        assert torch.equal(small.encode_image(pixels()), wanted)
        handle.remove()
        handle = block.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        assert not torch.equal(small.encode_image(pixels()), wanted)
        handle.remove()
        assert torch.equal(small.encode_image(pixels()), wanted)
    assert seen == [(2, 17, 64)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_half_moves_what_is_float_and_keeps_codes_and_scales(tiny_model: str, recipe: str, dtype: torch.dtype) -> None:
    small = qclip.quantize_(load(tiny_model), recipe)
    tokens = small.tokenizer(["a dog"])
    with torch.no_grad():
        wanted = small.encode_image(pixels()), small.encode_text(tokens)
        before = small.state_dict()
        small.half() if dtype == torch.float16 else small.bfloat16()
        after = small.state_dict()
        for name, tensor in before.items():
            quantized = tensor.dtype in (torch.int8, torch.uint8) or name.rpartition(".")[2] in ("scales", "zeros")
            assert after[name].dtype == (tensor.dtype if quantized else dtype), name
            if quantized:
                assert torch.equal(after[name], tensor), name
        image, text = small.encode_image(pixels().to(dtype)), small.encode_text(tokens)
    assert image.dtype == text.dtype == dtype
    assert cosine(image, wanted[0]) > 0.995 and cosine(text, wanted[1]) > 0.995
    norm = small.visual.ln_post
    assert norm.weight.dtype == dtype
    block = small.transformer.resblocks[0]
    assert block.get_weight_dtype() == dtype


def test_to_and_train_and_eval(tiny_model: str) -> None:
    small = qclip.quantize_(load(tiny_model), "w8a8")
    with torch.no_grad():
        wanted = small.encode_image(pixels())
        assert small.train().training and all(m.training for m in small.modules())
        assert not any(m.training for m in small.eval().modules())
        assert torch.equal(small.to("cpu").encode_image(pixels()), wanted)
        assert small.to(torch.bfloat16).encode_image(pixels().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_artifact_is_the_model(tiny_model: str, recipe: str, tmp_path: Path) -> None:
    small = qclip.quantize_(load(tiny_model), recipe)
    qclip.save(small, tmp_path / "artifact")
    again = qclip.load(tmp_path / "artifact")
    tokens = small.tokenizer(["a dog"])
    with torch.no_grad():
        assert torch.equal(again.tokenizer(["a dog"]), tokens)
        x = small.preprocess(picture())[None]
        assert torch.equal(again.preprocess(picture())[None], x)
        assert torch.equal(again.encode_image(x), small.encode_image(x))
        assert torch.equal(again.encode_text(tokens), small.encode_text(tokens))
    assert again.qclip_quantization.recipe == small.qclip_quantization.recipe
