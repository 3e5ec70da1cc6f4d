"""open_clip's models with text towers of Hugging Face, built from settings that are data."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import save_file
from torch import nn

import qclip
from qclip import models
from qclip.errors import ArtifactError, ModelError
from qclip.models.open_clip_text_configs import CONFIGS
from tests.models import families
from tests.models.architectures import COCA, VISION, images, perturb

transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")

BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SMALL = {
    "roberta": BERT | {"pad_token_id": 1},
    "xlm-roberta": BERT | {"pad_token_id": 1, "type_vocab_size": 1},
    "bert": BERT | {"pad_token_id": 0},
    "m2m_100": {
        "vocab_size": 100,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "mt5": {
        "vocab_size": 100,
        "d_model": 32,
        "d_kv": 12,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "dropout_rate": 0.0,
    },
}
#: By what is tried: the encoder, the pooler, the projection.
TOWERS = {
    "roberta": ("roberta", "mean_pooler", "mlp"),
    "xlm-roberta": ("xlm-roberta", "mean_pooler", "mlp"),
    "m2m_100": ("m2m_100", "cls_pooler", "linear"),
    "mt5": ("mt5", "mean_pooler", "mlp"),
    "bert": ("bert", "cls_pooler", "linear"),
    "bert_last": ("bert", "cls_last_hidden_state_pooler", None),
}


IMAGES = images()


def config(name: str, **more: object) -> dict:
    encoder, pooler, projection = TOWERS[name]
    text = {"hf_config": {"model_type": encoder} | SMALL[encoder], "hf_pooler_type": pooler, "hf_proj_type": projection}
    return {
        "embed_dim": 32 if projection is None else 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": text | {"context_length": 16} | more,
    }


LAYERS = {"m2m_100": "encoder_layers", "mt5": "num_layers"}


def build(name: str, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    described = config(name)
    described["vision_cfg"] = VISION | {"layers": layers}
    described["text_cfg"]["hf_config"] |= {LAYERS.get(TOWERS[name][0], "num_hidden_layers"): layers}
    return perturb(models.create_from_config(described))


def pad(name: str) -> int:
    return SMALL[TOWERS[name][0]]["pad_token_id"]


def tokens(name: str, lengths: tuple[int, ...] = (5, 9, 7), width: int = 16) -> torch.Tensor:
    """Random ids: no tokenizer can be had."""
    out = torch.full((len(lengths), width), pad(name))
    for row, length in enumerate(lengths):
        out[row, :length] = torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(row))
    return out


def calls(name: str) -> families.Calls:
    ids = tokens(name)
    return {
        "vision": lambda m: m.encode_image(IMAGES.to(m.logit_scale.dtype)),
        "text": lambda m: m.encode_text(ids),
    }


def with_tokenizer(model: nn.Module, name: str) -> nn.Module:
    model.tokenizer = lambda texts: tokens(name, tuple(4 + i % 9 for i in range(len(texts))))
    return model


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_towers_are_those_that_open_clip_builds(name: str, tmp_path: Path) -> None:
    """From a folder with the same settings, by open_clip's own code that takes names: the same tensors, and numbers."""
    encoder, pooler, projection = TOWERS[name]
    model = build(name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": encoder} | SMALL[encoder]))
    width = 32 if projection is None else 24
    theirs = HFTextEncoder(str(tmp_path), width, pooler_type=pooler, proj_type=projection, pretrained=False)
    theirs.load_state_dict(model.text.state_dict())
    ids = tokens(name)
    torch.testing.assert_close(model.text(ids), theirs.eval()(ids), rtol=0, atol=0)
    assert not any("decoder" in key for key in model.state_dict())


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_explicit_form_and_sites(name: str) -> None:
    model = build(name)
    families.explicit_form_equals(model, calls(name))
    longest = tokens(name, (16, 2, 11))
    families.explicit_form_equals(model, calls(name) | {"text": lambda m: m.encode_text(longest)})
    names = families.sites_are_what_runs(
        model, calls(name) | {"text": lambda m: m.encode_text(longest)}, {"vision": (3, 17), "text": (3, 16)}
    )
    texts = [n for n in names if n.startswith("text.")]
    assert texts[0] == "text.embedding" and "text.blocks.1.mlp.fc2" in texts
    assert ("text.blocks.0.mlp.gate" in texts) == (name == "mt5")
    last = {"mlp": "text.projection.fc2", "linear": "text.projection", None: "text.blocks.1.mlp.fc2"}
    assert texts[-1] == last[TOWERS[name][2]]


@pytest.mark.parametrize("name", ["xlm-roberta", "m2m_100", "mt5"])
@torch.no_grad()
def test_padding_changes_nothing_and_is_cut_off(name: str) -> None:
    model = build(name)
    done = qclip.quantize(model, "w8a8")
    seen: list[int] = []
    models.towers(done)["text"].blocks[0].module.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
    short, long = tokens(name, width=9), tokens(name, width=30)
    assert torch.equal(done.encode_text(short), done.encode_text(long)) and seen == [9, 9]
    torch.testing.assert_close(done.encode_text(short[:1]), done.encode_text(short)[:1], rtol=0, atol=1e-5)
    run = models.encoders(done)
    assert run.text_ends(long).tolist() == [4, 8, 6]
    assert run.text_positions(short).sum(1).tolist() == [5, 9, 7]
    assert run.text_positions(tokens(name, (5, 5))) is None  # what is left after the cut is all read


@pytest.mark.parametrize("name", ["roberta", "m2m_100"])
@torch.no_grad()
def test_tokens_beside_the_embedding(name: str) -> None:
    model, ids = perturb(models.create_from_config(config(name, output_tokens=True))), tokens(name)
    want = model.text(ids)
    with models.explicit_form(model):
        torch.testing.assert_close(model.text(ids), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_coca() -> None:
    torch.manual_seed(0)
    text = config("roberta")["text_cfg"] | {"output_tokens": True, "vocab_size": 100, "hf_proj_type": "linear"}
    description = COCA | {"custom_text": True, "text_cfg": text}
    description["multimodal_cfg"] = description["multimodal_cfg"] | {"width": 32}
    model = perturb(models.create_from_config(description))
    assert isinstance(model, open_clip.CoCa)
    ids = tokens("roberta")
    want, want_tokens = model._encode_text(ids, normalize=False)
    with models.explicit_form(model):
        got, got_tokens = model._encode_text(ids, normalize=False)
        torch.testing.assert_close((got, got_tokens), (want, want_tokens), rtol=0, atol=1e-5)
    assert got_tokens.shape == (3, 16, 32)
    done = qclip.quantize(model, "w8a8")
    assert torch.cosine_similarity(models.encoders(done).encode_text(ids), want).min() > 0.99
    del model.qclip_config
    assert models.config_of(model)["config"]["text_cfg"]["vocab_size"] == 100


@torch.no_grad()
def test_a_model_that_somebody_else_made_is_described() -> None:
    model = build("mt5")
    del model.qclip_config
    again = models.create_from_config(models.config_of(model))
    again.load_state_dict(model.state_dict())
    for call in calls("mt5").values():
        assert torch.equal(call(again.eval()), call(model))
    model.text.pooler = nn.Identity()
    with pytest.raises(ModelError, match="Identity is not supported"):
        models.config_of(model)
    with pytest.raises(ModelError, match="Identity is not supported"):
        models.towers(model)


def named() -> dict[str, str]:
    found = {name: open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()}
    return {name: cfg["hf_model_name"] for name, cfg in found.items() if "hf_model_name" in cfg}


def test_all_of_open_clips_names_are_known() -> None:
    """Each builds, without memory, from what is carried here; no name is looked up."""
    assert len(named()) == 10 and set(named().values()) == set(CONFIGS)
    for name in named():
        model = models.create_from_config(open_clip.get_model_config(name), device="meta")
        assert isinstance(model.text, HFTextEncoder)
        if name in ("coca_roberta-ViT-B-32", "nllb-clip-base", "mt5-base-ViT-B-32"):
            assert len(models.towers(model)["text"].blocks) == 12


def test_names_are_not_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    strange = config("roberta")
    del strange["text_cfg"]["hf_config"]
    strange["text_cfg"]["hf_model_name"] = "somebody/else"
    with pytest.raises(ModelError, match="'somebody/else' is none whose configuration is known here"):
        models.create_from_config(strange)
    model = build("xlm-roberta")
    done = qclip.quantize(model, "w8a8")
    qclip.load(qclip.save(done, tmp_path / "a"))
    description = models.config_of(done)
    description["config"]["text_cfg"]["hf_model_name"] = "roberta-base"
    with pytest.raises(ModelError, match="hf_model_name"):
        models.create_from_config(description)


BAD = {
    "an unknown encoder": ({"model_type": "gpt2"}, "of model_type 'gpt2'; known: bert, roberta"),
    "code": ({"auto_map": {"AutoModel": "a.B"}}, "auto_map"),
    "a kernel": ({"attn_implementation": "flash"}, "attn_implementation"),
    "a size beyond all": ({"vocab_size": 10**9}, "vocab_size"),
    "heads that do not fit": ({"num_attention_heads": 5}, "cannot be built|heads"),
    "a decoder": ({"is_decoder": True}, "is_decoder"),
}


@pytest.mark.parametrize("what", BAD)
def test_descriptions_that_are_refused(what: str) -> None:
    more, message = BAD[what]
    bad = config("roberta")
    bad["text_cfg"]["hf_config"] = bad["text_cfg"]["hf_config"] | more
    with pytest.raises(ModelError, match=message):
        models.create_from_config(bad, device="meta")


@torch.no_grad()
def test_folders_and_sizes(tmp_path: Path) -> None:
    model = build("m2m_100")
    described = config("m2m_100")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    again = models.load(f"local-dir:{tmp_path}")
    for call in calls("m2m_100").values():
        assert torch.equal(call(again), call(model))
    described["text_cfg"]["hf_config"]["vocab_size"] = 10_000
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    with pytest.raises(ModelError, match="embed_tokens.* and its description says"):
        models.load(f"local-dir:{tmp_path}")
    folder = qclip.save(qclip.quantize(model, "w8a8"), tmp_path / "artifact")
    content = json.loads((folder / "qclip.json").read_text())
    content["architecture"]["config"]["text_cfg"]["hf_config"]["encoder_layers"] = 3
    content["description_sha256"] = qclip.artifact.description_hash(content)
    (folder / "qclip.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="holds 2 blocks 'text.transformer.layers"):
        qclip.load(folder)


@torch.no_grad()
def test_texts_longer_than_positions_are_refused() -> None:
    for name, most in (("xlm-roberta", 38), ("bert", 40), ("m2m_100", 40)):
        done = qclip.quantize(build(name), "w8a8")
        assert done.encode_text(tokens(name, (most,), most)).isfinite().all()
        with pytest.raises(ModelError, match=f"positions for {most} tokens and was given {most + 1}"):
            done.encode_text(tokens(name, (most + 1,), most + 1))
    done = qclip.quantize(build("mt5"), "w8a8")  # positions are distances
    assert done.encode_text(tokens("mt5", (200,), 200)).isfinite().all()


def test_settings_without_an_explicit_form_are_named() -> None:
    decoder, positions, crossed = build("roberta"), build("roberta"), build("mt5")
    decoder.text.transformer.encoder.layer[1].is_decoder = True
    positions.text.transformer.encoder.layer[1].attention.self.position_embedding_type = "relative_key"
    crossed.text.transformer.block[1].layer.append(nn.Identity())
    for model, why in (
        (decoder, r"layer\.1: .* a decoder, or cross attention"),
        (positions, r"layer\.1\.attention\.self: .* relative_key positions"),
        (crossed, r"block\.1: .* cross attention"),
    ):
        with pytest.raises(ModelError, match=rf"^text\.transformer\..*{why}"):
            models.towers(model)


def test_inputs_of_berts_sites_may_be_scaled() -> None:
    with models.explicit_form(build("roberta")) as towers:
        sites = towers["text"].blocks[0].sites
        assert {kind: site.smoothable for kind, site in sites.items()} == dict.fromkeys(
            ("q", "k", "v", "out", "fc1"), True
        ) | {"fc2": False}


@pytest.mark.parametrize("name", ["roberta", "m2m_100", "mt5"])
def test_dropout_that_is_left_out_is_told(name: str) -> None:
    model = build(name)
    for module in model.text.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.1
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    with pytest.warns(UserWarning, match="has dropout inside attention or MLP"):
        models.towers(model)


@pytest.mark.parametrize("name", ["m2m_100", "mt5"])
@torch.no_grad()
def test_float16_stays_finite_as_in_transformers(name: str) -> None:
    model, ids = build(name), tokens(name)
    for part, layer in model.text.transformer.named_modules():
        if part.endswith(("fc2", "wo")):
            layer.weight.fill_(3e4)
    model.text.half()
    want = model.text.transformer(input_ids=ids).last_hidden_state
    models.towers(model)
    got = model.text.transformer(input_ids=ids).last_hidden_state
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


@torch.no_grad()
def test_what_an_encoder_in_explicit_form_cannot_give_is_refused() -> None:
    ids = tokens("mt5")
    for name in ("m2m_100", "mt5"):
        model = build(name)
        models.towers(model)
        for more in ({"output_hidden_states": True}, {"inputs_embeds": torch.zeros(3, 16, 32)}):
            with pytest.raises(ModelError, match="takes input_ids and attention_mask alone, not .*ask the float model"):
                model.text.transformer(input_ids=ids, **more)
        with pytest.raises(ModelError, match="attention weights are never formed"):
            model.text.transformer(input_ids=ids, output_attentions=True)
        model.text.transformer.config.output_hidden_states = True
        with pytest.raises(ModelError, match="ask the float model"):
            model.text.transformer(input_ids=ids)


def test_another_encoder_is_refused_by_its_name() -> None:
    with torch.device("meta"):
        other = transformers.DistilBertModel(
            transformers.DistilBertConfig(n_layers=1, dim=32, hidden_dim=32, n_heads=2)
        )
    model = build("roberta")
    model.text.transformer = other
    with pytest.raises(ModelError, match="DistilBertModel is not supported"):
        models.towers(model)
