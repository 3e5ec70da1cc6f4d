"""Architecture, preprocessing and tokenizer as JSON, and models made from them."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from qclip import models
from qclip.errors import ModelError
from tests.models.architectures import BASE, OPEN_CLIP, images, perturb, tokens, with_trunk

# What dev/train_photos.py trains: heads that cannot be told from shapes, a context of 32.
PHOTOS = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "layers": 6, "width": 192, "head_width": 32, "patch_size": 4},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", OPEN_CLIP)
@torch.no_grad()
def test_a_raw_model_is_described_and_built_again(name: str) -> None:
    torch.manual_seed(0)
    model = perturb(OPEN_CLIP[name]())
    config = json.loads(json.dumps(models.config_of(model)))
    twin = models.create_from_config(config).eval()
    assert type(twin) is type(model)
    twin.load_state_dict(model.state_dict())
    for ours, theirs in ((twin, model),):
        a, b = models.encoders(ours), models.encoders(theirs)
        assert torch.equal(a.encode_image(images()), b.encode_image(images()))
        assert torch.equal(a.encode_text(tokens()), b.encode_text(tokens()))
    assert models.config_of(twin) == config


@pytest.mark.parametrize("name", OPEN_CLIP)
@torch.no_grad()
def test_meta_skeleton_takes_the_tensors_of_the_explicit_form(name: str) -> None:
    torch.manual_seed(0)
    model = perturb(OPEN_CLIP[name]())
    want = models.encoders(model).encode_image(images()), models.encoders(model).encode_text(tokens())
    models.towers(model)
    skeleton = models.create_from_config(models.config_of(model), device="meta")
    models.towers(skeleton)
    assert all(t.is_meta for t in skeleton.state_dict().values()), "memory was taken for weights"
    skeleton.load_state_dict(model.state_dict(), assign=True)
    run = models.encoders(models.materialize_buffers(skeleton).eval())
    torch.testing.assert_close(run.encode_image(images()), want[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(run.encode_text(tokens()), want[1], rtol=0, atol=2e-5)


def test_a_description_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda *args, **kwargs: pytest.fail("timm was asked"))
    config = open_clip.get_model_config("convnext_base")
    config["vision_cfg"]["timm_model_pretrained"] = True
    described = {
        "family": "open_clip",
        "class": "CLIP",
        "config": {k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")},
    }
    for wanted in (config, described):
        with pytest.raises(ModelError, match="timm_model_pretrained is True"):
            models.create_from_config(wanted, device="meta")


def test_photos_architecture_round_trip() -> None:
    raw = open_clip.CLIP(**PHOTOS).eval()
    config = models.config_of(raw)
    assert config["config"]["vision_cfg"]["head_width"] == 32 and config["config"]["text_cfg"]["heads"] == 2
    for built in (models.create_from_config(config), models.create_from_config(PHOTOS)):
        built.eval().load_state_dict(raw.state_dict())
        with torch.no_grad():
            assert torch.equal(built.encode_image(images()), raw.encode_image(images()))
    tokenizer = models.tokenizer_from_config(models.tokenizer_config(raw))
    texts = ["a photo of a dog", "zebra"]
    assert tokenizer(texts).shape == (2, 32)
    assert torch.equal(tokenizer(texts), open_clip.SimpleTokenizer(context_length=32)(texts))
    assert tokenizer("one text").shape == (1, 32)
    preprocess = models.preprocess_from_config(models.preprocess_config(raw))
    assert torch.equal(preprocess(PICTURE), open_clip.image_transform(32, is_train=False)(PICTURE))


def test_timm_towers_inside_open_clip_round_trip() -> None:
    """open_clip makes its timm towers by name, so this one has the full size; no memory is taken for it."""
    for name in ("ViT-B-16-SigLIP", "convnext_tiny"):
        config = models.open_clip.architecture(open_clip.get_model_config(name))
        model = models.create_from_config(config, device="meta")
        del model.__dict__["qclip_config"]
        described = models.config_of(model)
        again = models.create_from_config(described, device="meta")
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        assert shapes == {k: v.shape for k, v in again.state_dict().items()}
        models.towers(model)
        assert models.config_of(model) == described
        models.materialize_buffers(model)


def test_what_cannot_be_described_says_so_when_asked() -> None:
    import timm

    trunk = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=4, num_classes=0
    )
    model = with_trunk(trunk)
    models.towers(model)
    for m in (model, copy.deepcopy(model)):
        with pytest.raises(ModelError, match="architecture could not be read off"):
            models.config_of(m)
    with pytest.raises(ModelError, match="Linear is not supported"):
        models.config_of(nn.Linear(1, 1))


def test_descriptions_that_build_nothing_are_refused() -> None:
    for bad, match in (
        ({"family": "other", "class": "CLIP", "config": {}}, "family 'other'"),
        ({"family": "open_clip", "class": "System", "config": {}}, "class 'System'"),
        ({"family": "huggingface", "class": "BertModel", "config": {}}, "BertModel"),
        (BASE | {"surprise": 1}, "surprise"),
        ({"embed_dim": 3}, "lacks 'vision_cfg'"),
        (BASE | {"text_cfg": BASE["text_cfg"] | {"heads": 3}}, "cannot be built"),
    ):
        with pytest.raises(ModelError, match=match):
            models.create_from_config(bad)


def test_buffers_that_cannot_be_rebuilt_are_named() -> None:
    model = models.create_from_config(BASE, device="meta")
    model.visual.register_buffer("secret", torch.empty(1, device="meta"), persistent=False)
    with pytest.raises(ModelError, match=r"visual\.secret"):
        models.materialize_buffers(model)


def test_attach_and_copies() -> None:
    tokenizer = {"kind": "clip-bpe", "context_length": 16}
    model = models.attach(open_clip.CLIP(**BASE), {"image_size": 32}, tokenizer, "here")
    twin = copy.deepcopy(model)
    assert twin.preprocess is model.preprocess and twin.tokenizer is model.tokenizer, "copies share what cannot change"
    assert model.qclip_source == "here" and twin.tokenizer(["a"]).shape == (1, 16)
    assert models.preprocess_config(twin)["resize_mode"] == "shortest"
    assert models.tokenizer_config(twin) == tokenizer
    assert models.encoders(twin).tokenizer is model.tokenizer
    assert not [n for n in model.state_dict() if "preprocess" in n]


def test_preprocessing_follows_open_clip() -> None:
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.5], "interpolation": "bilinear"}
    for size, mode in ((32, "shortest"), ([32, 24], "squash"), (32, "longest")):
        ours = models.preprocess_from_config({"image_size": size, "resize_mode": mode} | settings)
        theirs = open_clip.image_transform(
            size if isinstance(size, int) else tuple(size), is_train=False, resize_mode=mode, **settings
        )
        assert torch.equal(ours(PICTURE), theirs(PICTURE))
        assert models.preprocess_from_config(json.loads(json.dumps(ours.config))).config == ours.config
    raw = open_clip.CLIP(**BASE)
    open_clip.model.set_model_preprocess_cfg(
        raw, {"size": 32, "mean": (0.1,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    )
    described = models.preprocess_config(raw)
    assert described["mean"] == [0.1] * 3 and described["resize_mode"] == "squash"


def test_bad_preprocessing_and_tokenizers_are_named() -> None:
    for bad, match in (
        ({"mean": [0, 0, 0]}, "image_size"),
        ({"image_size": 8, "colour": 1}, "colour"),
        ({"image_size": 8, "resize_mode": "wild"}, "wild"),
        ({"image_size": 8, "interpolation": "lanczos"}, "lanczos"),
    ):
        with pytest.raises(ModelError, match=match):
            models.preprocess_from_config(bad)
    with pytest.raises(ModelError, match="'bytes'"):
        models.tokenizer_from_config({"kind": "bytes"})
    with pytest.raises(ModelError, match="tokenizer is not known"):
        models.tokenizer_from_config({"kind": "unknown", "context_length": 8})(["a"])
    assert models.encoders(open_clip.CLIP(**BASE)).tokenizer is None, "a vocabulary of 100 is not CLIP's"


def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path) -> None:
    lost = models.tokenizer_from_config({"kind": "hf", "name": str(tmp_path / "none"), "context_length": 64})
    with pytest.raises(ModelError, match="none.*could not be loaded.*set model.tokenizer"):
        lost(["a"])


def test_class_names_and_templates() -> None:
    from qclip.models.class_names import CIFAR10, IMAGENET, TEMPLATES

    assert len(CIFAR10) == 10 and len(IMAGENET) == 1000 and IMAGENET[0] == "tench" and IMAGENET[-1] == "toilet paper"
    assert len(TEMPLATES["openai"]) == 80 and "a photo of a {}." in TEMPLATES["openai"]
    assert all(t.count("{}") == 1 for group in TEMPLATES.values() for t in group)
