"""Artifacts: what is saved comes back bit for bit, and what is wrong with a folder is said before building."""

import dataclasses
import json
import shutil

import open_clip
import pytest
import torch
from safetensors import safe_open

import qclip
from qclip import artifact, files, layers, models, ptq, recipes, rewrite
from qclip.errors import ArtifactError, ModelError, OutputExistsError
from qclip.models.tokenizer import PROBES
from qkernels import Int8Weight
from tests.models import architectures
from tests.small import IMAGES, TEXTS, small_clip

RECIPES = ["w8a8", "w8a8-static", "w4a8", "w4a8-mixed", "w4a16", "w6a8", "w4a4"]


@pytest.fixture(scope="module")
def model():
    return small_clip()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "small"
    return qclip.save(qclip.quantize(model, "w8a8"), path)


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip_is_bit_for_bit(model, recipe, tmp_path):
    small = qclip.quantize(model, recipe, calibration=IMAGES)
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    state, other = small.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) and state[k].dtype == other[k].dtype for k in state)
    tokens = model.tokenizer(TEXTS)
    with torch.inference_mode():
        assert torch.equal(small.encode_image(IMAGES), again.encode_image(IMAGES))
        assert torch.equal(small.encode_text(tokens), again.encode_text(again.tokenizer(TEXTS)))
    assert again.qclip_quantization.recipe == small.qclip_quantization.recipe
    assert not again.training


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_their_bits_on_disk(model, bits, tmp_path):
    """Of a weight 2 to 8 bits per code; what comes back is the same bit for bit."""
    small = qclip.quantize(model, f"w{bits}a8")
    path = qclip.save(small, tmp_path / "a")
    with safe_open(path / "model.safetensors", "pt") as file:
        stored = file.get_tensor("visual.transformer.resblocks.0.mlp.fc1.codes")
    assert stored.numel() * stored.element_size() == 64 * 256 * bits / 8
    again = qclip.load(path)
    state, other = small.state_dict(), again.state_dict()
    assert all(torch.equal(state[k], other[k]) and state[k].dtype == other[k].dtype for k in state)


def test_a_loaded_artifact_can_be_saved_again(saved, tmp_path):
    twice = qclip.save(qclip.load(saved), tmp_path / "b")
    assert artifact.file_hash(saved / "model.safetensors") == artifact.file_hash(twice / "model.safetensors")


def test_codes_pass_through_one_memory_while_they_are_packed(saved, monkeypatch):
    """In memories of their own they would leave holes in the heap: peak memory grew by a fifth."""
    seen = []
    pack = Int8Weight.pack
    monkeypatch.setattr(
        Int8Weight, "pack", lambda self, layout: seen.append(self.codes.data_ptr()) or pack(self, layout)
    )
    again = qclip.load(saved)
    assert len(seen) > 20 and len(set(seen)) == 1
    assert not any(buffer.data_ptr() == seen[0] for buffer in again.buffers() if buffer.numel())


def test_where_nothing_is_packed_every_weight_has_its_own_memory(model, saved, monkeypatch):
    monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    state = qclip.load(saved).state_dict()
    want = qclip.quantize(model, "w8a8").state_dict()
    assert all(torch.equal(state[name], want[name]) for name in want)


def test_half_precision_survives(model, tmp_path):
    small = qclip.quantize(model, "w8a8").bfloat16()
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    with torch.inference_mode():
        assert torch.equal(small.encode_image(IMAGES.bfloat16()), again.encode_image(IMAGES.bfloat16()))


def test_description_says_what_was_done(saved):
    content = json.loads((saved / "qclip.json").read_text())
    assert content["recipe"]["name"] == "w8a8" and content["format"] == artifact.FORMAT
    assert content["coverage"]["real"]["macs"] > 0.8
    assert {"qclip", "torch"} <= set(content["provenance"])


def test_description_names_the_weights_that_it_was_made_from(model, saved):
    provenance = json.loads((saved / "qclip.json").read_text())["provenance"]
    small = qclip.quantize(model, "w4a8").qclip_quantization.provenance
    assert provenance["source_sha256"] == small["source_sha256"]  # of the float model, whatever the recipe
    other = qclip.quantize(small_clip(seed=1), "w8a8").qclip_quantization.provenance
    assert provenance["source_sha256"] != other["source_sha256"]


def test_both_files_can_be_read_by_the_same_people(saved):
    tensors, description = (saved / name for name in ("model.safetensors", "qclip.json"))
    assert tensors.stat().st_mode == description.stat().st_mode


def edit(folder, seal=True, **changes):
    """Changes the description, and its checksum with it: what a foreign writer would have made."""
    path = folder / "qclip.json"
    content = json.loads(path.read_text()) | changes
    if seal:
        content["description_sha256"] = artifact.description_hash(content)
    path.write_text(json.dumps(content))


def drop(folder, key):
    path = folder / "qclip.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


def site(folder, **changes):
    sites = json.loads((folder / "qclip.json").read_text())["sites"]
    sites["vision.blocks.0.attn.q"] |= changes
    edit(folder, sites=sites)


def heads(folder):
    architecture = json.loads((folder / "qclip.json").read_text())["architecture"]
    architecture["config"]["text_cfg"]["heads"] = 1  # of the same shapes, but another model
    edit(folder, seal=False, architecture=architecture)


def unknown_dtype(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"U32"', 1))
    edit(folder, tensors_sha256=artifact.file_hash(path))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def pickled(folder):
    torch.save({"a": torch.zeros(2)}, folder / "model.safetensors")
    size, digest = (folder / "model.safetensors").stat().st_size, artifact.file_hash(folder / "model.safetensors")
    edit(folder, tensors_bytes=size, tensors_sha256=digest)


def other_shape(folder):
    sites = json.loads((folder / "qclip.json").read_text())["sites"]
    sites["vision.blocks.0.attn.q"]["shape"][0] += 1
    edit(folder, sites=sites)


def foreign_class(folder):
    sites = json.loads((folder / "qclip.json").read_text())["sites"]
    sites["vision.blocks.0.attn.q"]["class"] = "os.system"
    edit(folder, sites=sites)


def other_recipe(folder):
    edit(folder, recipe={"name": "w8a8", "weight_bits": 99})


def unknown_site(folder, planned=False):
    content = json.loads((folder / "qclip.json").read_text())
    for key in ["sites", *["plans"] * planned]:
        content[key]["vision.blocks.9.attn.q"] = content[key]["vision.blocks.0.attn.q"]
    edit(folder, sites=content["sites"], plans=content["plans"])


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda f: truncate(f / "model.safetensors", 1000), "truncated"),
        (lambda f: flip(f / "model.safetensors"), "checksum"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "qclip.json").unlink(), "no artifact"),
        (lambda f: truncate(f / "qclip.json", 200), "not valid JSON"),
        (lambda f: (f / "qclip.json").write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
        (lambda f: (f / "qclip.json").write_text('{"a": 1}'), "no format version"),
        (lambda f: edit(f, format=artifact.FORMAT + 1), "upgrade qclip"),
        (lambda f: edit(f, format=artifact.FORMAT - 1, seal=False), "of an earlier qclip.*quantize the model again"),
        (lambda f: drop(f, "sites"), "lacks 'sites'"),
        (lambda f: drop(f, "plans"), "lacks 'plans'"),
        (lambda f: edit(f, architecture={"class": "Dog"}), "."),
        (pickled, "safetensors"),
        (other_shape, "instead of"),
        (foreign_class, "class is 'os.system'; it must be one of"),
        (other_recipe, "99 bits"),
        (unknown_site, "do not fit its plans"),
        (lambda f: unknown_site(f, planned=True), "no site 'vision.blocks.9.attn.q'"),
        (heads, "changed after it was saved"),
        (lambda f: edit(f, seal=False, preprocess={"image_size": 32, "mean": [0, 0, 0]}), "changed after it was saved"),
        (lambda f: edit(f, format=0), "no format version"),
        (lambda f: edit(f, format=True), "no format version"),
        (lambda f: site(f, group=0), "edited or foreign"),
        (lambda f: site(f, patch=[]), "edited or foreign"),
        (lambda f: edit(f, preprocess=5), "edited or foreign"),
        (lambda f: edit(f, tokenizer=5), "edited or foreign"),
        (unknown_dtype, "is U32"),
    ],
)
def test_damage_is_refused_with_the_reason(folder, damage, word):
    damage(folder)
    with pytest.raises((ArtifactError, qclip.errors.InputError), match=word) as caught:
        qclip.load(folder)
    assert "\n" not in str(caught.value)


def test_nothing_is_built_before_the_checksum(folder, monkeypatch):
    flip(folder / "model.safetensors")
    monkeypatch.setattr(artifact, "_skeleton", lambda *_: pytest.fail("built a model from a damaged artifact"))
    with pytest.raises(ArtifactError):
        qclip.load(folder)


def test_existing_output(model, saved, tmp_path):
    small = qclip.quantize(model, "w4a8")
    with pytest.raises(OutputExistsError, match="not empty"):
        qclip.save(small, saved)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match="other files"):
        qclip.save(small, other, force=True)
    assert (other / "thesis.txt").read_text() == "precious"
    with pytest.raises(OutputExistsError, match="is a file"):
        qclip.save(small, other / "thesis.txt")
    place = tmp_path / "again"
    shutil.copytree(saved, place)
    qclip.save(small, place, force=True)
    assert qclip.load(place).qclip_quantization.recipe.name == "w4a8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "mine"]


@pytest.mark.parametrize("fault", ["save_file", "file_hash"])
def test_a_fault_while_saving_leaves_nothing_half_written(model, tmp_path, monkeypatch, fault):
    small = qclip.quantize(model, "w8a8")
    old = qclip.save(qclip.quantize(model, "w4a8"), tmp_path / "a")

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, fault, fail)
    with pytest.raises(OSError, match="No space left"):
        qclip.save(small, old, force=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert qclip.load(old).qclip_quantization.recipe.name == "w4a8"


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_artifact_comes_back_where_the_new_one_cannot_take_its_place(exchange, model, tmp_path, monkeypatch):
    old = qclip.save(qclip.quantize(model, "w4a8"), tmp_path / "a")
    rename, calls = artifact.Path.rename, [None] * exchange

    def second_fails(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(artifact.Path, "rename", second_fails)
    monkeypatch.setattr(files, "_exchange", (lambda *both: second_fails(*both)) if exchange else (lambda *_: False))
    with pytest.raises(OSError, match="Input/output"):
        qclip.save(qclip.quantize(model, "w8a8"), old, force=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert qclip.load(old).qclip_quantization.recipe.name == "w4a8"


@pytest.mark.parametrize(("recipe", "most"), [("w8a8", 0.27), ("w4a8", 0.17), ("w4a16", 0.17)])
def test_vit_b_32_is_as_small_as_promised(recipe, most):
    """Bytes of the tensors of an artifact, as a share of the float32 parameters; nothing is computed."""
    big = models.create_from_config(open_clip.get_model_config("ViT-B-32"), device="meta")
    whole = sum(p.numel() * 4 for p in big.parameters())
    towers = models.towers(big)
    built = {}
    for name, state in ptq.states(recipes.get(recipe), towers).items():
        source, plan = state.source, state.plan
        facts = {
            "class": "Int8Linear" if plan.weight_bits == 8 else "Int4Linear",
            "grid": dataclasses.asdict(plan.grid),
            "shape": list(source.weight.flatten(1).shape),
            "zeros": False,
            "transforms": [],
            "bias": getattr(source, "bias", None) is not None,
            "input_scale": False,
            "input_zero": False,
            "dtype": "float32",
        }
        facts |= {"float_input": plan.activation_bits == recipes.FLOAT} if plan.weight_bits == 4 else {}
        facts |= {"class": "QuantizedEmbedding"} if state.site.kind == "embedding" else {}
        if type(source) is torch.nn.Conv2d:
            facts = {"class": "QuantizedPatch", "patch": list(source.kernel_size), "site": facts}
        built[name] = layers.from_facts(facts)
    rewrite.write(towers, built)
    assert sum(t.numel() * t.element_size() for t in big.state_dict().values()) <= (most - 0.001) * whole


def test_a_float_model_is_no_artifact(model, tmp_path):
    with pytest.raises(ModelError, match="not quantized"):
        qclip.save(model, tmp_path / "a")


TRUNK = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": architectures.TEXT,
}


@pytest.mark.parametrize("family", ["custom_text", "siglip_text", "coca", "own_attention_all_norms", "timm", "siglip"])
def test_every_family_comes_back(family, tmp_path):
    torch.manual_seed(0)
    side = 32
    if family == "timm":
        model, side = models.create_from_config(TRUNK).eval(), 224
    elif family == "siglip":
        transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
        shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        words = shared | {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99}
        pixels = shared | {"image_size": 32, "patch_size": 8}
        config = transformers.SiglipConfig(text_config=words | {"pad_token_id": 0}, vision_config=pixels)
        model = transformers.SiglipModel(config).eval()
    else:
        model = architectures.perturb(architectures.OPEN_CLIP[family]())
    small = qclip.quantize(model, "w8a8")
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    for run, other in [(models.encoders(small), models.encoders(again))]:
        images, tokens = architectures.images(side=side), architectures.tokens()
        assert torch.equal(run.encode_image(images), other.encode_image(images))
        assert torch.equal(run.encode_text(tokens), other.encode_text(tokens))
        assert run.preprocess.config == other.preprocess.config


@pytest.mark.parametrize("settings", [{}, {"clean": "canonicalize"}, {"strip_sep_token": True}, {"mode": "clips"}])
def test_a_tokenizer_of_open_clip_is_carried(model, settings, tmp_path):
    """What open_clip does around a tokenizer of Hugging Face - cleaning, separators, class token - goes along."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (extra hf)")
    words = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[BOS]", "a", "dog", "photo", "of", "two", "birds", "Photo", ","]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "bos_token": "[BOS]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]", **names)
    fast.save_pretrained(tmp_path / "words")
    described = {"kind": "hf", "name": str(tmp_path / "words"), "context_length": 16, "mode": settings.get("mode")}
    described["options"] = {key: value for key, value in settings.items() if key != "mode"}
    small = qclip.quantize(model, "w8a8")
    models.attach(small, {"image_size": 32}, described, source="small")
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    shutil.rmtree(tmp_path / "words")
    assert again.tokenizer.config["kind"] == "json"
    assert torch.equal(again.tokenizer(PROBES), small.tokenizer(PROBES))
    assert len({tuple(row) for row in again.tokenizer(PROBES).tolist()}) > 4


def test_a_tokenizer_that_cannot_be_carried_is_said(model, tmp_path):
    small = qclip.quantize(model, "w8a8")
    lost = {"kind": "hf", "name": str(tmp_path / "none"), "context_length": 16, "mode": None, "options": {}}
    models.attach(small, {"image_size": 32}, lost, source="small")
    with pytest.warns(UserWarning, match="will have no tokenizer .*none.*set model.tokenizer"):
        folder = qclip.save(small, tmp_path / "a")
    with pytest.raises(ModelError, match="tokenizer is not known"):
        qclip.load(folder).tokenizer(["a"])
