"""Hugging Face's CLIP and SigLIP: explicit form, encoders, folders."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qclip import models
from qclip.errors import ModelError
from tests.models.architectures import images, perturb, tokens

transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")

VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 0,
}


def build(name: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    if name == "siglip":
        config = transformers.SiglipConfig(text_config=TEXT | {"hidden_size": 48}, vision_config=VISION)
        return perturb(transformers.SiglipModel._from_config(config, attn_implementation=attention))
    text = TEXT | ({"eos_token_id": 2} if name == "clip_old_eos" else {})
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    return perturb(transformers.CLIPModel._from_config(config, attn_implementation=attention))


def features(model: nn.Module, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    found = (
        model.get_image_features(pixel_values=images()),
        model.get_text_features(input_ids=tokens(), attention_mask=mask),
    )
    return tuple(f if isinstance(f, torch.Tensor) else f.pooler_output for f in found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["clip", "clip_old_eos", "siglip"])
@torch.no_grad()
def test_explicit_form_equals_the_original(name: str, attention: str) -> None:
    model = build(name, attention)
    padding = torch.ones_like(tokens())
    padding[0, 12:] = 0
    wants = [features(model), features(model, padding)]
    towers = models.towers(model)
    for want, got in zip(wants, [features(model), features(model, padding)], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert isinstance(model, transformers.PreTrainedModel)
    again = models.towers(model)
    assert [s.name for t in again.values() for s in t] == [s.name for t in towers.values() for s in t]
    torch.testing.assert_close(features(copy.deepcopy(model)), features(model))


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_sites_are_what_runs(name: str) -> None:
    model = build(name)
    towers = models.towers(model)
    seen: dict[str, torch.Tensor] = {}
    for tower in towers.values():
        for site in tower:
            site.module.register_forward_pre_hook(lambda _, args, n=site.name: seen.__setitem__(n, args[0]))
    features(model)
    shared: dict[str, torch.Tensor] = {}
    for tower in towers.values():
        for site in tower:
            x = seen[site.name]
            if isinstance(site.module, nn.Linear):
                assert x.numel() == 3 * site.rows * site.module.in_features
            first = shared.setdefault(site.shared, x)
            assert first is x or torch.equal(first, x)
    names = list(towers["vision"].sites)
    assert names[:2] == ["vision.patch", "vision.blocks.0.attn.q"]
    assert names[-1] == ("vision.pool.mlp.fc2" if name == "siglip" else "vision.projection")
    assert list(towers["text"].sites)[0] == "text.embedding" and list(towers["text"].sites)[-1] == "text.projection"


@pytest.mark.parametrize("name", ["clip", "clip_old_eos", "siglip"])
@torch.no_grad()
def test_encoders(name: str) -> None:
    model = build(name)
    want = features(model)
    for explicit in (False, True):
        if explicit:
            models.towers(model)
        run = models.encoders(model)
        torch.testing.assert_close((run.encode_image(images()), run.encode_text(tokens())), want, rtol=0, atol=1e-5)
        assert run.image_size == 32 and run.dtype == torch.float32
        assert run.logit_scale == pytest.approx(float(model.logit_scale.exp()))
        assert (run.logit_bias is None) == (name != "siglip")
    assert run.preprocess.config["resize_mode"] == ("squash" if name == "siglip" else "shortest")


@torch.no_grad()
def test_text_stops_at_the_last_eot_for_clip_only() -> None:
    for name, length in (("clip", 9), ("clip_old_eos", 9), ("siglip", 16)):
        model = build(name)
        models.towers(model)
        seen = []
        model.text_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0].shape[1]))
        models.encoders(model).encode_text(tokens())
        assert seen == [length]


def test_version_4_hands_over_two_masks() -> None:
    """Its layers pass the causal mask beside the padding mask; the sum of both is what counts."""
    model = build("clip")
    attention = models.towers(model)["text"].blocks[0].module.self_attn
    x = torch.randn(2, 5, 32)
    causal = torch.full((1, 1, 5, 5), float("-inf")).triu_(1)
    padding = torch.zeros(2, 1, 1, 5)
    padding[1, ..., 4] = torch.finfo(torch.float32).min
    out, weights = attention(
        hidden_states=x, attention_mask=padding, causal_attention_mask=causal, output_attentions=False
    )
    torch.testing.assert_close(out, attention.core(x, mask=causal + padding))
    alone, _ = attention(hidden_states=x, attention_mask=None, causal_attention_mask=causal)
    torch.testing.assert_close(alone, attention(x, is_causal=True)[0])
    assert weights is None


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_description_and_meta_skeleton(name: str) -> None:
    model = build(name)
    want = features(model)
    models.towers(model)
    config = json.loads(json.dumps(models.config_of(model)))
    skeleton = models.create_from_config(config, device="meta")
    models.towers(skeleton)
    assert all(t.is_meta for t in skeleton.state_dict().values())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    models.materialize_buffers(skeleton).eval()
    torch.testing.assert_close(features(skeleton), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_dtypes_follow() -> None:
    model = build("clip")
    models.towers(model)
    model.bfloat16()
    run = models.encoders(model)
    assert run.dtype == torch.bfloat16 == run.encode_image(images()).dtype == run.encode_text(tokens()).dtype


def test_align_and_others_are_refused_by_name() -> None:
    tiny = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
    }
    with torch.device("meta"):
        align = transformers.AlignModel(transformers.AlignConfig(text_config=tiny))
        bert = transformers.BertModel(transformers.BertConfig(**tiny))
    with pytest.raises(ModelError, match="ALIGN .*EfficientNet"):
        models.towers(align)
    with pytest.raises(ModelError, match="BertModel is not supported"):
        models.towers(bert)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLIP as `save_pretrained` writes it, with its image processor and a small word tokenizer."""
    build("clip").save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.5, 0.6, 0.7],
    )
    processor.save_pretrained(tmp_path)
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (extra hf)")
    words = {"[PAD]": 0, "a": 1, "dog": 2, "<eos>": 99}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 99)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="<eos>")
    fast.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_load_from_a_folder(folder: Path) -> None:
    model = models.load(f"hf:{folder}")
    want = build("clip")
    torch.testing.assert_close(features(model), features(want))
    assert not model.training and model.qclip_source == f"hf:{folder}"
    assert model.preprocess.config["mean"] == [0.1, 0.2, 0.3] and model.preprocess.config["image_size"] == 32
    ids = model.tokenizer(["a dog", "dog"])
    assert ids.shape == (2, 16) and ids[0, :3].tolist() == [1, 2, 99] and ids[1, :2].tolist() == [2, 99]
    run = models.encoders(model)
    assert run.encode_text(ids).shape == (2, 24) and run.tokenizer is model.tokenizer


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        models.load("hf:./not/here")
    config = json.loads((folder / "config.json").read_text())
    for kind, match in (("align", "'align' model, which is not supported: its EfficientNet"), ("bert", "'bert' model")):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ModelError, match=match):
            models.load(f"hf:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        models.load(f"hf:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file({**state, "logit_scale": torch.tensor(float("nan"))}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="'logit_scale' in .* holds NaN"):
        models.load(f"hf:{folder}")
    save_file({**state, "text_model.lora_A": torch.zeros(2)}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="holds the unknown 'text_model.lora_A'"):
        models.load(f"hf:{folder}")
    del state["visual_projection.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 'visual_projection.weight'"):
        models.load(f"hf:{folder}")
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        models.load(f"hf:{folder}")
