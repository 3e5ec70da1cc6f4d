"""Towers of Hugging Face's CLIP and SigLIP by themselves, with a projection and without."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import qclip
from qclip import models, rewrite
from qclip.errors import DataError, InputError, ModelError, RecipeError
from qclip.spectral import weight_spectrum
from tests.models import families
from tests.models.architectures import images, perturb, tokens
from tests.models.test_huggingface import TEXT, VISION

transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")

NAMES = (
    "CLIPVisionModelWithProjection",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPTextModel",
    "SiglipVisionModel",
    "SiglipTextModel",
)


IMAGES, TOKENS = images(), tokens()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    settings = (VISION if "Vision" in name else TEXT) | {"projection_dim": 24}
    return perturb(kind(kind.config_class(**settings)))


def output(model: nn.Module) -> torch.Tensor:
    out = model(pixel_values=IMAGES) if "Vision" in type(model).__name__ else model(input_ids=TOKENS)
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(out)


def calls(name: str) -> families.Calls:
    return {"vision" if "Vision" in name else "text": output}


def calibration(name: str) -> torch.Tensor:
    return images(6) if "Vision" in name else tokens(lengths=(5, 9, 7, 16, 3))


@pytest.mark.parametrize("name", NAMES)
def test_explicit_form_and_sites(name: str) -> None:
    model = build(name)
    families.explicit_form_equals(model, calls(name))
    tower = "vision" if "Vision" in name else "text"
    names = families.sites_are_what_runs(model, calls(name), {tower: (3, 17 if "CLIPV" in name else 16)})
    assert names[0] == ("vision.patch" if tower == "vision" else "text.embedding")
    last = {"SiglipVisionModel": "vision.pool.mlp.fc2", "SiglipTextModel": "text.projection"}.get(name)
    projection = f"{tower}.projection" if "Projection" in name else f"{tower}.blocks.1.mlp.fc2"
    assert names[-1] == (last or projection)


@torch.no_grad()
def test_encoders_have_one_tower() -> None:
    model = build("CLIPVisionModelWithProjection")
    run = models.encoders(qclip.quantize(model, "w8a8"))
    assert run.towers == ("vision",) and run.encode_image(images()).shape == (3, 24)
    assert run.image_size == 32 and run.tokenizer is None and run.preprocess is not None and run.logit_bias is None
    with pytest.raises(ModelError, match="CLIPVisionModelWithProjection has no text tower"):
        run.encode_text(tokens())
    with pytest.raises(ModelError, match="one tower and no logit_scale"):
        run.logit_scale  # noqa: B018
    assert weight_spectrum(model, {}, sites="vision.blocks.0.mlp.fc1", seeds=8)
    with pytest.raises(InputError, match="has no text tower"):
        qclip.evaluate({"a": model}, data="scenes:test?samples=2")
    run = models.encoders(build("CLIPTextModel"))
    assert run.towers == ("text",) and run.encode_text(tokens()).shape == (3, 32) and run.preprocess is None
    assert run.device == torch.device("cpu") and run.dtype == torch.float32
    assert models.preprocess_config(run.model) is None


@torch.no_grad()
def test_a_text_tower_without_a_projection_is_read_to_the_end() -> None:
    """Diffusion models read all its tokens, so none is cut off, and all count when it is calibrated."""
    for name, length in (("CLIPTextModelWithProjection", 9), ("CLIPTextModel", 16)):
        model = build(name)
        tower = models.towers(model)["text"]
        seen: list[int] = []
        tower.blocks[0].module.mlp.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0].shape[1]))
        models.encoders(model).encode_text(tokens())
        assert seen == [length]


def test_a_text_tower_is_calibrated_with_texts() -> None:
    model = build("CLIPTextModelWithProjection")
    done = qclip.quantize(model, "w8a8-static", tokens())
    assert rewrite.quantization(done).provenance["calibration"]["captions"] == 3
    with pytest.raises(DataError, match="takes texts alone, so it is calibrated with .* not a torch.float32 tensor"):
        qclip.quantize(model, "w8a8-static", images())
    with pytest.raises(DataError, match="no tokenizer; calibrate with token ids"):
        qclip.quantize(model, "w8a8-static", ["a dog"])
    model.tokenizer = lambda texts: tokens()[: len(texts)]
    done = qclip.quantize(model, "w8a8-static", ["a dog", "a cat"])
    assert rewrite.quantization(done).provenance["calibration"]["captions_from"] == "the set's captions"
    with pytest.raises(RecipeError, match="wants the vision tower, but this model has only: text"):
        qclip.quantize(model, {"name": "images", "towers": ["vision"]})


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_folders(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = models.load(f"hf:{tmp_path}")
    assert type(again) is type(model)
    torch.testing.assert_close(output(again), output(model))


@torch.no_grad()
def test_texts_longer_than_positions_are_refused() -> None:
    for name in ("CLIPTextModel", "SiglipTextModel"):
        model = qclip.quantize(build(name), "w8a8")
        with pytest.raises(ModelError, match="positions for 16 tokens and was given 17"):
            model(input_ids=torch.ones(1, 17, dtype=torch.int64))


def test_a_part_of_another_kind_is_refused_by_its_name() -> None:
    for place, part, name in (
        (lambda m: m.vision_model.encoder.layers, nn.TransformerEncoderLayer(48, 4, 96), "TransformerEncoderLayer"),
        (lambda m: m.vision_model.encoder.layers[1], None, "Other"),
    ):
        model = build("CLIPVisionModelWithProjection")
        if part is None:

            class Other(nn.Module):
                def __init__(self, old: nn.Module) -> None:
                    super().__init__()
                    self.__dict__.update(old.__dict__)

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return self.fc2(self.activation_fn(self.fc1(x))).sin()

            place(model).mlp = Other(place(model).mlp)
        else:
            place(model)[1] = part
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ModelError, match=f"{name} is not supported"):
            qclip.quantize_(model, "w8a8")
        assert model.state_dict().keys() == before.keys()


@torch.no_grad()
def test_hidden_states_are_there_in_every_call() -> None:
    for name, given in (("CLIPTextModel", {"input_ids": TOKENS}), ("SiglipVisionModel", {"pixel_values": IMAGES})):
        model = qclip.quantize(build(name), "w8a8")
        for _ in range(6):  # no program takes over
            assert len(model(**given, output_hidden_states=True).hidden_states) == 3


def test_dropout_that_is_left_out_is_told() -> None:
    model = build("CLIPVisionModel")
    next(module for module in model.modules() if type(module).__name__ == "CLIPAttention").dropout = 0.1
    with pytest.warns(UserWarning, match="has dropout inside attention or MLP"):
        models.towers(model)


def test_token_embeddings_are_resized_before() -> None:
    model = build("CLIPTextModelWithProjection")
    model.resize_token_embeddings(108, mean_resizing=False)
    want = output(model)
    towers = models.towers(model)
    assert towers["text"].sites["text.embedding"].module.weight.shape[0] == 108
    model.resize_token_embeddings(110, mean_resizing=False)
    assert towers["text"].sites["text.embedding"].module.weight.shape[0] == 110
    done = qclip.quantize(model, "w8a8")
    assert models.config_of(done)["config"]["vocab_size"] == 110
    assert torch.cosine_similarity(output(done), want).min() > 0.99
    with pytest.raises(ModelError, match="resize the float model, then quantize it"):
        done.resize_token_embeddings(120)
