"""SigLIP 2, which takes patches of grids of any shape, with masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import qclip
from qclip import models
from qclip.errors import ModelError
from qclip.models.huggingface_naflex import patches
from tests.models import families
from tests.models.architectures import images, perturb, tokens
from tests.models.test_huggingface import TEXT, VISION

transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
if not hasattr(transformers, "Siglip2Model"):
    pytest.skip("needs transformers with SigLIP 2", allow_module_level=True)

GRIDS = ((4, 4), (2, 5), (3, 3))


IMAGES, TOKENS = images(), tokens()


def build(name: str = "Siglip2Model", **more: object) -> nn.Module:
    torch.manual_seed(0)
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
    kind = getattr(transformers, name)
    if name == "Siglip2VisionModel":
        return perturb(kind(kind.config_class(**vision | more)))
    text = TEXT | {"hidden_size": 48}
    config = transformers.Siglip2Config(text_config=text | more, vision_config=vision | more)
    model = perturb(kind(config))
    model.tokenizer = lambda texts: tokens().repeat(len(texts), 1)[: len(texts)]
    return model


def inputs(grids: tuple[tuple[int, int], ...] = GRIDS, length: int = 16) -> dict[str, torch.Tensor]:
    """As the processor gives them: padding is zeros."""
    shapes = torch.tensor(grids)
    mask = (torch.arange(length) < shapes.prod(1)[:, None]).long()
    pixels = torch.randn(len(grids), length, 192, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def pooled(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


GIVEN = inputs()


def naflex(model: nn.Module, given: dict[str, torch.Tensor] = GIVEN) -> torch.Tensor:
    return pooled(getattr(model, "get_image_features", model)(**given))


def texts(model: nn.Module) -> torch.Tensor:
    return pooled(model.get_text_features(input_ids=TOKENS))


CALLS = {"vision": naflex, "text": texts}
SQUARES = {"vision": lambda model: models.encoders(model).encode_image(IMAGES), "text": texts}


def test_explicit_form_with_masks_and_without() -> None:
    model = build()
    families.explicit_form_equals(model, CALLS)
    families.explicit_form_equals(model, SQUARES)
    for length in (10, 25):  # all of one shape without padding; more patches than there are positions
        grids = ((2, 5),) * 2 if length == 10 else ((5, 5), (12, 1))
        families.explicit_form_equals(
            model, {"vision": lambda m, g=grids, n=length: pooled(m.get_image_features(**inputs(g, n))), "text": texts}
        )
    families.explicit_form_equals(build("Siglip2VisionModel"), {"vision": naflex})
    names = families.sites_are_what_runs(model, CALLS, {"vision": (3, 16), "text": (3, 16)})
    assert names[0] == "vision.patch" and "vision.pool.mlp.fc2" in names and names[-1] == "text.projection"


@torch.no_grad()
def test_hidden_states_are_those_of_the_model() -> None:
    model = build("Siglip2VisionModel")
    want = model(**inputs(), output_hidden_states=True)
    models.towers(model)
    for _ in range(2):  # transformers watches its layers from the first such call on
        got = model(**inputs())
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=0, atol=1e-5)
        states = model(**inputs(), output_hidden_states=True).hidden_states
        assert len(states) == 3
        torch.testing.assert_close(states, want.hidden_states, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="output_attentions"):
        model(**inputs(), output_attentions=True)


def test_artifacts_of_the_image_tower_alone(tmp_path: Path) -> None:
    families.artifact_gives_the_same_bits(
        build("Siglip2VisionModel"), {"vision": naflex}, tmp_path / "a", "w8a8", images(6)
    )


@torch.no_grad()
def test_a_program_serves_other_grids_and_masks() -> None:
    """Of the same number of patches: positions and masks are its inputs."""
    model = qclip.quantize(build(), "w8a8")
    for _ in range(12):
        naflex(model)
    other = ((2, 3), (4, 4), (8, 1))
    got = naflex(model, inputs(other))
    fresh = qclip.quantize(build(), "w8a8")
    assert torch.equal(got, naflex(fresh, inputs(other))) and not torch.equal(got, naflex(model))


@torch.no_grad()
def test_hooks_on_the_embeddings_are_called() -> None:
    model = qclip.quantize(build(), "w8a8")
    want, seen = naflex(model), []
    embeddings = next(m for m in model.modules() if type(m).__name__ == "Siglip2VisionEmbeddings")
    handle = embeddings.register_forward_hook(lambda *_: seen.append("embeddings"))
    torch.testing.assert_close(naflex(model), want, rtol=0, atol=1e-5)
    assert seen == ["embeddings"]
    handle.remove()
    assert torch.equal(naflex(model), want)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model = qclip.quantize(build(), "w8a8")
    given = inputs()
    want = naflex(model)
    given["pixel_values"] = given["pixel_values"].masked_fill(given["pixel_attention_mask"][..., None] == 0, 7.0)
    torch.testing.assert_close(pooled(model.get_image_features(**given)), want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_images_are_cut_as_the_processor_cuts_them() -> None:
    model = build()
    picture = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=15, do_resize=False)
    theirs = processor(Image.fromarray(picture), return_tensors="pt")
    x = (torch.from_numpy(picture).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    ours = patches(model, x[None])
    assert ours["spatial_shapes"].tolist() == theirs["spatial_shapes"].tolist() == [[3, 5]]
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-5)
    run = models.encoders(model)
    assert run.image_size == 32 and run.preprocess(Image.fromarray(picture)).shape == (3, 32, 32)
    for shape in ((1, 3, 4, 4), (0, 3, 32, 32)):
        with pytest.raises(ModelError, match="cut into patches of 8 x 8"):
            run.encode_image(torch.zeros(shape))


def _mask(given: dict, row: int, marked: int) -> None:
    given["pixel_attention_mask"][row] = (torch.arange(16) < marked).long()


CONTRADICTIONS = {
    "more patches than the image has": (lambda g: _mask(g, 1, 12), r"mask\[1\] marks 12 patches.*first 10 .*2 x 5"),
    "fewer": (lambda g: _mask(g, 2, 4), r"mask\[2\] marks 4 patches, and spatial_shapes\[2\] says .* 9"),
    "others": (lambda g: g["pixel_attention_mask"].__setitem__(1, g["pixel_attention_mask"][1].flip(0)), r"mask\[1\]"),
    "a grid that is too large": (lambda g: g["spatial_shapes"].__setitem__(0, torch.tensor([5, 4])), "5 x 4 patches"),
    "a grid of nothing": (lambda g: g["spatial_shapes"].__setitem__(0, torch.tensor([0, 4])), "0 x 4 patches"),
    "no mask": (lambda g: g.update(pixel_attention_mask=None), "mask is missing"),
    "a mask of another shape": (lambda g: g.update(pixel_attention_mask=torch.ones(3, 9)), r"must be \[3, 16\]"),
    "shapes of other images": (lambda g: g.update(spatial_shapes=torch.tensor([[4, 4]])), "must be"),
    "an image": (lambda g: g.update(pixel_values=IMAGES), r"must be \[B, N, C"),
    "patches of another size": (lambda g: g.update(pixel_values=torch.zeros(3, 16, 48)), r"\[3, 16, 48\].* = 192\]"),
    "a grid below nothing": (lambda g: g["spatial_shapes"].__setitem__(1, torch.tensor([-2, -5])), "-2 x -5 patches"),
    "halves of patches": (lambda g: g.update(spatial_shapes=g["spatial_shapes"] + 0.5), "whole numbers"),
    "lists": (lambda g: g.update(spatial_shapes=g["spatial_shapes"].tolist()), "takes patches"),
    "no shapes": (lambda g: g.update(spatial_shapes=None), "takes patches"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
@torch.no_grad()
def test_inputs_that_contradict_each_other(what: str) -> None:
    spoil, message = CONTRADICTIONS[what]
    model = build("Siglip2VisionModel")
    models.towers(model)
    given = inputs()
    spoil(given)
    with pytest.raises(ModelError, match=message):
        model(**given)


@torch.no_grad()
def test_folders_and_descriptions(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    again = models.load(f"hf:{tmp_path}")
    torch.testing.assert_close(naflex(again), naflex(model))
    config = models.config_of(model)
    config["config"]["vision_config"]["num_patches"] = 15
    with pytest.raises(ModelError, match="no square number"):
        models.create_from_config(config, "meta")


@torch.no_grad()
def test_without_a_head_there_is_no_embedding() -> None:
    model = build("Siglip2VisionModel", vision_use_head=False)
    done = qclip.quantize(model, "w8a8")
    assert done(**inputs()).last_hidden_state.shape == (3, 16, 48)
    with pytest.raises(ModelError, match="no pooled embedding"):
        models.encoders(done).encode_image(images())
