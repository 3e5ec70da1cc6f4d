"""Artifacts that somebody else wrote: each door through which one could run code, fetch, fill the memory, or give wrong
numbers without a word."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import qclip
from qclip import artifact, cli, models, zoo
from qclip.errors import ArtifactError, InputError, ModelError
from qclip.models import tokenizer as tokenizers
from qclip.models.checkpoint import read_state
from tests.hostile.artifacts import changed, place, read, seal, with_tensors
from tests.small import CONFIG, IMAGES, small_clip

ROOT = Path(__file__).parents[2]
VISION, TEXT = "architecture/config/vision_cfg", "architecture/config/text_cfg"
Q = "sites/vision.blocks.0.attn.q"
PLAN = "plans/vision.blocks.0.attn.q"
PAYLOAD = "from pathlib import Path\nPath(__file__).with_name('trace').touch()\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Valid artifacts of the small model, by recipe."""
    folder, model = tmp_path_factory.mktemp("saved"), small_clip()
    return {
        recipe: qclip.save(qclip.quantize(model, recipe, calibration=IMAGES), folder / recipe)
        for recipe in ("w8a8", "w4a8", "w8a8-static-smoothquant", "w6a8")
    }


def refused(folder: Path, word: str) -> None:
    with pytest.raises(ArtifactError, match=word) as caught:
        qclip.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


# ---- doors to code and to the network --------------------------------------------------------------------------------

HF = {"kind": "hf", "name": "HERE", "context_length": 16, "options": {"trust_remote_code": True}}
JSON = {
    "kind": "json",
    "context_length": 16,
    "pad_id": 0,
    "pad_token": "x",
    "sha256": "0" * 64,
    "bytes": 10,
}
DOORS: dict[str, tuple[dict[str, Any], str]] = {
    "tokenizer from a folder": ({"tokenizer": HF}, "tokenizer kind 'hf' is loaded from the hub or a folder"),
    "tokenizer by name": ({"tokenizer": {"kind": "hf-auto", "name": "a/b", "context_length": 16}}, "kind 'hf-auto'"),
    "tokenizer by url": ({"tokenizer": {"kind": "siglip", "variant": "c4-en", "context_length": 16}}, "'siglip'"),
    "tokenizer of no kind": ({"tokenizer": {"kind": ["hf"]}}, "tokenizer kind a list of 1 is unknown"),
    "vocabulary path": ({"tokenizer/options": {"bpe_path": "HERE/x.gz"}}, "'bpe_path', which is not allowed"),
    "nltk": ({"tokenizer/options": {"reduction_mask": "syntax"}}, "'reduction_mask', which is not allowed"),
    "special tokens": ({"tokenizer/options": {"additional_special_tokens": ["(a+)+"]}}, "'additional_special_tokens'"),
    "cleaning": ({"tokenizer/options": {"clean": "__import__"}}, "clean is '__import__'; it must be one of"),
    "tokenizer file": ({"tokenizer": JSON | {"file": "../x"}}, "'file', which is not allowed"),
    "text tower by name": ({f"{TEXT}/hf_model_name": "HERE"}, "hf_model_name is .*not allowed in a file"),
    "tokenizer in text_cfg": ({f"{TEXT}/hf_tokenizer_name": "HERE"}, "hf_tokenizer_name is .*not allowed"),
    "options in text_cfg": ({f"{TEXT}/tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs is"),
    "pooler in text_cfg": ({f"{TEXT}/hf_pooler_type": "x"}, "'hf_pooler_type', which is not allowed"),
    "timm from the hub": ({f"{VISION}/timm_model_name": "hf-hub:a/b"}, "timm_model_name is 'hf-hub:a/b', which is not"),
    "timm from a folder": ({f"{VISION}/timm_model_name": "local-dir:HERE"}, "timm_model_name is 'local-dir:"),
    "timm unknown": ({f"{VISION}/timm_model_name": "os_system"}, "timm knows no model 'os_system'"),
    "timm's weights": ({f"{VISION}/timm_model_pretrained": True}, "timm_model_pretrained is True"),
    "arguments of the activation": ({f"{VISION}/act_kwargs": {"inplace": True}}, "'inplace', which is not allowed"),
    "arguments of the norm": ({f"{TEXT}/norm_kwargs": {"device": "cuda"}}, "'device', which is not allowed"),
    "class": ({"architecture/class": "os.system"}, "class 'os.system'"),
    "family": ({"architecture/family": "timm"}, "family 'timm'"),
    "attribute of torch": ({"architecture/config/cast_dtype": "load"}, "cast_dtype is 'load'; it must be one of"),
    "argument of the model": ({"architecture/config/hook": "x"}, "'hook', which is not allowed"),
    "layer class": ({f"{Q}/class": "Linear"}, "class is 'Linear'; it must be one of"),
    "layer setting": ({f"{Q}/forward": "x"}, "'forward', which is not allowed"),
    "preprocessing": ({"preprocess/transform": "x"}, "'transform', which is not allowed"),
    "top level": ({"auto_map": {"AutoModel": "evil.Model"}}, "'auto_map', which is not allowed"),
}
HUGGING_FACE = {
    "auto_map": ({"auto_map": {"AutoModel": "evil.Model"}}, "'auto_map', which is not allowed"),
    "kernels from the hub": ({"attn_implementation": "a/kernel"}, "'attn_implementation', which is not allowed"),
    "kernels, private": ({"_attn_implementation": "a/kernel"}, "'_attn_implementation', which is not allowed"),
    "quantizer": ({"quantization_config": {"quant_method": "awq"}}, "'quantization_config', which is not allowed"),
    "trust": ({"trust_remote_code": True}, "'trust_remote_code', which is not allowed"),
    "name": ({"_name_or_path": "HERE"}, "'_name_or_path', which is not allowed"),
    "activation": ({"vision_config/hidden_act": "evil"}, "hidden_act is 'evil'; it must be one of"),
    "kernels of a tower": ({"text_config/_attn_implementation": "a/kernel"}, "'_attn_implementation', which is not"),
}


def fill_in(changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(changes).replace("HERE", str(folder)))


@pytest.mark.parametrize("door", DOORS)
def test_every_door_of_an_artifact_is_shut(saved: dict[str, Path], tmp_path: Path, door: str) -> None:
    changes, word = DOORS[door]
    refused(changed(saved["w8a8"], tmp_path / "a", fill_in(changes, tmp_path / "a")), word)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small CLIP of Hugging Face: its folder with a word tokenizer, and an artifact of it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
    rust = pytest.importorskip("tokenizers", reason="needs tokenizers (extra hf)")
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=shared | text, vision_config=shared | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    transformers.CLIPModel(config).eval().save_pretrained(folder / "model")
    words = {"[PAD]": 0, "a": 1, "dog": 2, "[UNK]": 3, "<eos>": 99}
    made = rust.Tokenizer(rust.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = rust.pre_tokenizers.Whitespace()
    made.post_processor = rust.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 99)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="<eos>")
    fast.save_pretrained(folder / "model")
    model = models.load(f"hf:{folder / 'model'}")
    return {"folder": folder / "model", "artifact": qclip.save(qclip.quantize(model, "w8a8"), folder / "saved")}


@pytest.mark.parametrize("door", HUGGING_FACE)
def test_every_door_of_hugging_face_is_shut(huggingface: dict[str, Path], tmp_path: Path, door: str) -> None:
    changes, word = HUGGING_FACE[door]
    artifact_changes = {f"architecture/config/{path}": value for path, value in changes.items()}
    refused(changed(huggingface["artifact"], tmp_path / "a", fill_in(artifact_changes, tmp_path)), word)
    if door == "name":  # in a config.json it is bookkeeping of transformers, which is dropped
        return
    folder = copy(huggingface["folder"], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    for path, value in fill_in(changes, tmp_path).items():
        owner, key = place(config, path)
        owner[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=word):
        qclip.load_model(f"hf:{folder}")


def copy(source: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, target))


def test_an_artifact_carries_its_tokenizer(huggingface: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(huggingface["artifact"], tmp_path / "a")
    loaded = qclip.load(folder)
    ids = loaded.tokenizer(["a dog", "dog dog unseen"])
    assert ids.dtype == torch.int64 and ids.shape == (2, 16)
    assert ids[0, :4].tolist() == [1, 2, 99, 0] and ids[1, :4].tolist() == [2, 2, 3, 99]
    theirs = models.load(f"hf:{huggingface['folder']}").tokenizer
    assert torch.equal(loaded.tokenizer(tokenizers.PROBES), theirs(tokenizers.PROBES))
    (folder / "tokenizer.json").unlink()  # it was read with the model
    again = qclip.save(loaded, tmp_path / "b")
    assert (again / "tokenizer.json").read_bytes() == (huggingface["artifact"] / "tokenizer.json").read_bytes()
    refused(folder, "tokenizer.json' cannot be read")


def test_a_tokenizer_that_would_give_other_ids_is_not_carried(
    huggingface: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_json = tokenizers._as_json

    def other(theirs: Any, config: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        described, file = as_json(theirs, config)
        return described | {"pad_id": 7}, file

    monkeypatch.setattr(tokenizers, "_as_json", other)
    model = qclip.quantize(models.load(f"hf:{huggingface['folder']}"), "w8a8")
    with pytest.warns(UserWarning, match="will have no tokenizer .as a tokenizer.json it gives other ids.; set model"):
        folder = qclip.save(model, tmp_path / "a")
    assert read(folder)["tokenizer"] == {"kind": "unknown", "context_length": 16}
    assert not (folder / "tokenizer.json").exists()
    with pytest.raises(ModelError, match="tokenizer is not known; set model.tokenizer"):
        qclip.load(folder).tokenizer(["a dog"])


def test_the_carried_tokenizer_is_checked(huggingface: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(huggingface["artifact"], tmp_path / "a")
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data.replace(b"dog", b"cat"))
    refused(folder, "tokenizer.json' does not match its checksum")
    (tmp_path / "outside.json").write_bytes(data)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    refused(folder, "is a link that leads out of its folder")
    for damaged in (b"{}", b'{"version": "1.0", "model": {"type": "evil"}}', b"\xff" * 10, data[:100]):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").write_bytes(damaged)
        content = read(folder)
        import hashlib

        content["tokenizer"] |= {"bytes": len(damaged), "sha256": hashlib.sha256(damaged).hexdigest()}
        seal(folder, content)
        with pytest.raises(ModelError, match="tokenizer.json' is no tokenizer"):
            qclip.load(folder).tokenizer(["a"])


@pytest.mark.parametrize("name", ["qclip.json", "model.safetensors"])
def test_no_link_is_followed_out_of_an_artifact(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copy(saved["w8a8"], tmp_path / "a")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, f"{name}' is a link that leads out of its folder")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}, "'trust_remote_code'"),
        ({"hf_tokenizer_name": "x", "tokenizer_kwargs": {"use_fast": False}}, "'use_fast', which is not allowed"),
        ({"tokenizer_kwargs": {"bpe_path": "x"}}, "'bpe_path', which is not allowed"),
        ({"hf_model_name": "evil/model"}, "names are not looked up"),
        ({"hf_tokenizer_name": "x"}, "'auto_map', which is not allowed"),  # of the tokenizer_config.json beside it
        ({"tokenizer_mode": "evil"}, "tokenizer_mode is 'evil'"),
    ],
)
def test_an_open_clip_folder_is_data(tiny_model: str, tmp_path: Path, config: dict, word: str) -> None:
    folder = copy(Path(tiny_model.removeprefix("local-dir:")), tmp_path / "a")
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"] |= config
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    with pytest.raises(ModelError, match=word):
        qclip.load_model(f"local-dir:{folder}")


def test_what_a_tokenizer_folder_asks_for_is_refused_or_left_out(huggingface: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(huggingface["folder"], tmp_path / "a")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for odd, word in (
        ({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}, "'auto_map', which is not allowed"),
        ({"trust_remote_code": True}, "'trust_remote_code', which is not allowed"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class is 'BertJapaneseTokenizer'"),
        ({"sudachi_kwargs": {"sudachi_config_path": "x"}}, "'sudachi_kwargs', which is not allowed"),
    ):
        path.write_text(json.dumps(settings | odd))
        with pytest.raises(ModelError, match=word):
            qclip.load_model(f"hf:{folder}")
    path.write_text(json.dumps(settings | {"vocab_file": "/etc/passwd", "name_or_path": "a/b"}))
    assert qclip.load_model(f"hf:{folder}").tokenizer(["a dog"])[0, :3].tolist() == [1, 2, 99]
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b", "peft_type": "LORA"}')
    (folder / "generation_config.json").write_text("{")
    qclip.load_model(f"hf:{folder}")  # transformers would look for the adapter's base on the hub
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    for shard in ("../x.safetensors", "/etc/passwd"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ModelError, match=f"'{shard}', which is not of the form"):
            qclip.load_model(f"hf:{folder}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    qclip.load_model(f"hf:{folder}")


@pytest.mark.slow
def test_nothing_runs_and_nothing_is_fetched(
    saved: dict[str, Path], huggingface: dict[str, Path], tmp_path: Path, tiny_model: str
) -> None:
    """A seeded corpus is loaded in a process in which sockets, other processes and code from the corpus fail."""
    cases: dict[str, str] = {}
    for group, source, doors in (
        ("artifact", saved["w8a8"], DOORS),
        (
            "hf",
            huggingface["artifact"],
            {d: ({f"architecture/config/{p}": v for p, v in c.items()}, w) for d, (c, w) in HUGGING_FACE.items()},
        ),
    ):
        for i, (changes, _) in enumerate(doors.values()):
            folder = tmp_path / f"{group}{i}"
            changed(source, folder, fill_in(changes, folder))
            arm(folder)
            cases[f"{group}{i}"] = str(folder)
    folder = copy(huggingface["folder"], tmp_path / "folder")
    arm(folder)
    cases["folder"] = f"hf:{folder}"
    for kwargs in ({"trust_remote_code": True}, {"clean": "lower"}):
        folder = copy(
            Path(tiny_model.removeprefix("local-dir:")), tmp_path / f"local{len(kwargs)}{kwargs.get('clean')}"
        )
        content = json.loads((folder / "open_clip_config.json").read_text())
        content["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": kwargs}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        arm(folder)
        cases[folder.name] = f"local-dir:{folder}"
    valid = {
        "valid": str(saved["w8a8"]),
        "valid hf": str(huggingface["artifact"]),
        "valid folder": f"hf:{huggingface['folder']}",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("watched.py")), str(tmp_path)],
        input=json.dumps([*(valid | cases).items()]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["awake"], "the audit hook saw nothing at all"
    assert said["attempts"] == []
    assert not list(tmp_path.rglob("trace")), "code of an artifact ran"
    outcome = {name: (kind, message) for name, kind, message in said["cases"]}
    assert [outcome[name][0] for name in valid] == ["loaded"] * len(valid), outcome
    for name in cases:
        assert outcome[name][0] == "InputError", (name, outcome[name])
        assert "\n" not in outcome[name][1]


def arm(folder: Path) -> None:
    """Code beside the data, and everything that names it."""
    for name in ("evil.py", "__init__.py", "tokenizer.py", "sitecustomize.py"):
        (folder / name).write_text(PAYLOAD)
    named = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": named, "tokenizer_class": "Evil"}))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": named}))


def test_a_hub_repository_is_read_as_a_folder(
    huggingface: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched by a name that the user gave is data, too: no code is among it, and none of it is trusted."""
    import huggingface_hub

    folder, asked = copy(huggingface["folder"], tmp_path / "snapshot"), []

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = qclip.load_model("hf:somebody/clip")
    assert model.tokenizer(["a dog"])[0, :3].tolist() == [1, 2, 99] and model.qclip_source == "hf:somebody/clip"
    (name, allowed, ignored), *more = asked
    assert name == "somebody/clip" and not more and ignored == ["*/*"]
    assert not [pattern for pattern in allowed if pattern.endswith((".py", "*"))]
    arm(folder)
    with pytest.raises(ModelError, match="'auto_map', which is not allowed"):
        qclip.load_model("hf:somebody/clip")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("down")))
    with pytest.raises(ModelError, match="could not be loaded .down.; check the name and the network"):
        qclip.load_model("hf:somebody/clip")


# ---- values ----------------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
SCALES = "visual.transformer.resblocks.0.attn.core.q.scales"


def _name(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


@pytest.mark.parametrize("value", [0.0, -0.5, 1e-40, INF, NAN])
@pytest.mark.parametrize(
    ("recipe", "ending"),
    [
        ("w8a8", "q.scales"),
        ("w4a8", "q.scales"),
        ("w8a8-static-smoothquant", ".factor"),
        ("w8a8-static-smoothquant", ".input_scale"),
        ("w8a8", "token_embedding.scales"),
    ],
)
def test_scales_that_no_layer_can_have_are_refused(
    saved: dict[str, Path], tmp_path: Path, recipe: str, ending: str, value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_name(tensors, ending)].view(-1)[-1] = value

    if ending == ".factor" and value < 0 and value != -INF:
        qclip.load(with_tensors(saved[recipe], tmp_path / "a", change))  # a transform may change signs
        return
    kind = "normal" if ending == ".factor" else "positive"
    shown = f"{torch.tensor(value, dtype=torch.float16 if recipe == 'w4a8' else torch.float32).item():g}"
    refused(with_tensors(saved[recipe], tmp_path / "a", change), rf"{ending}' in .* holds {shown}; it must hold {kind}")


@pytest.mark.parametrize(
    ("recipe", "ending", "value", "word"),
    [
        ("w8a8", "q.codes", -128, "holds the code -128; codes of 8 bits lie between -127 and 127"),
        ("w8a8", "token_embedding.codes", -128, "holds the code -128"),
        ("w6a8", "q.codes", 255, "codes cannot be unpacked: levels of the 6-bit grid .sym. must be"),
        ("w8a8", "q.bias", NAN, "q.bias' in .* holds NaN or Inf"),
        ("w8a8", "ln_post.weight", INF, "ln_post.weight' in .* holds NaN or Inf"),
        ("w8a8", "logit_scale", NAN, "logit_scale' in .* holds NaN or Inf"),
        ("w8a8", "logit_scale", 1e30, "logit_scale' in .* is 1e\\+30; it must lie between -10 and 10"),
        ("w8a8", "logit_scale", -11, "logit_scale' in .* is -11; it must lie between -10 and 10"),
    ],
)
def test_numbers_that_no_model_can_have_are_refused(
    saved: dict[str, Path], tmp_path: Path, recipe: str, ending: str, value: float, word: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_name(tensors, ending)].view(-1)[-1] = value

    refused(with_tensors(saved[recipe], tmp_path / "a", change), word)


def test_the_values_of_honest_artifacts_pass(saved: dict[str, Path]) -> None:
    for folder in saved.values():
        qclip.load(folder)


@pytest.mark.parametrize(
    ("recipe", "changes", "word"),
    [
        ("w8a8", {f"{PLAN}/state": "fast"}, "unknown field 'state'"),
        ("w8a8", {f"{PLAN}/weight_bits": 4}, "has weights on the 8-bit grid 'sym', and its plan is the 4-bit grid"),
        ("w8a8", {f"{PLAN}/weight_bits": 99}, "weights of 99 bits are not supported"),
        ("w8a8", {f"{PLAN}/weight_bits": True}, "'weight_bits' has the wrong type"),
        ("w8a8", {f"{PLAN}/activation_bits": 4}, "has inputs of 8 bits and its plan says 4"),
        ("w8a8", {f"{PLAN}/static": True}, "has no static scale, unlike its plan"),
        ("w8a8", {f"{PLAN}/group": 7}, "groups of 7"),
        ("w8a8", {f"{Q}/dtype": "float64"}, "dtype is 'float64'"),
        ("w8a8", {f"{Q}/grid/group": 32}, "no kernel multiplies .* in groups of 32"),
        ("w8a8", {f"{Q}/grid/bits": 4}, "Int8Linear does not run weights on the 4-bit grid"),
        ("w8a8", {f"{Q}/grid/kind": "midrise"}, "no kernel multiplies"),
        ("w8a8", {f"{Q}/zeros": True}, "have no zero points"),
        ("w8a8", {f"{Q}/input_zero": True}, "has a zero point of its input, but no static scale"),
        ("w8a8", {f"{Q}/transforms": [{"class": "Scale", "width": 63}]}, "63 channels stands before an input of 64"),
        ("w8a8", {f"{Q}/transforms": [{"class": "os.system", "width": 64}]}, "class is 'os.system'; it must be one of"),
        ("w8a8", {f"{Q}/class": "SimulatedLinear"}, "lacks 'activation_bits'"),
        ("w8a8", {f"{Q}/class": "QuantizedPatch"}, "which is not allowed"),
        ("w4a8", {f"{Q}/float_input": True}, "has inputs of 16 bits and its plan says 8"),
        ("w6a8", {f"{Q}/activation_bits": 16}, "'activation_bits', which is not allowed"),
        ("w8a8", {f"{Q}/bias": False}, "lacks the bias"),
        ("w8a8", {"sites/vision.patch/patch": [1, 64]}, "takes patches of \\(1, 64\\)"),
        ("w8a8", {f"{VISION}/patch_size": 0}, "patch_size is 0"),
        ("w8a8", {f"{VISION}/patch_size": 33}, "0 x 0 patches"),
        ("w8a8", {f"{VISION}/image_size": 0}, "image_size is 0"),
        ("w8a8", {"preprocess/image_size": 0}, "image_size is 0"),
        ("w8a8", {"preprocess/image_size": 64}, "takes images of 64 x 64 and the architecture 32 x 32"),
        ("w8a8", {"preprocess/mean": [0.5, 0.5]}, "mean is a list of 2; it must be a list of 3"),
        ("w8a8", {"preprocess/std": [0.5, 0, 0.5]}, "std\\[1\\] is 0; it must be a number from 1e-06"),
        ("w8a8", {"preprocess/std": [0.5, "x", 0.5]}, "std\\[1\\] is 'x'"),
        ("w8a8", {"source": "x" * 5000}, "source is .*at most 4096"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(
    saved: dict[str, Path], tmp_path: Path, recipe: str, changes: dict[str, Any], word: str
) -> None:
    refused(changed(saved[recipe], tmp_path / "a", changes), word)


def test_float64_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["ln_final.weight"] = tensors["ln_final.weight"].double()

    refused(with_tensors(saved["w8a8"], tmp_path / "a", change), "'ln_final.weight' in .* is float64")
    with pytest.raises(ModelError, match="cannot be saved: .*dtype is 'float64'"):
        qclip.save(qclip.quantize(small_clip().double(), "w8a8"), tmp_path / "b")


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    model = qclip.quantize(small_clip(), "w8a8")
    model.qclip_config["config"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "lower"}
    with pytest.raises(ModelError, match="cannot be saved: .*tokenizer_kwargs"):
        qclip.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# ---- files that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"format": ' + "9" * 5000 + "}",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": 1e999}',
        "\ufeff",
        '"\\ud800',
        "{" * 3,
        "[]" * 60_000,
    ],
)
def test_descriptions_that_are_no_json(saved: dict[str, Path], tmp_path: Path, content: str) -> None:
    folder = copy(saved["w8a8"], tmp_path / "a")
    (folder / "qclip.json").write_text(content)
    with pytest.raises(ArtifactError, match="qclip.json"):
        qclip.load(folder)
    recipe = tmp_path / "r.json"
    recipe.write_text(content)
    with pytest.raises(qclip.errors.RecipeError, match="r.json"):
        qclip.recipes.get(recipe)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
@pytest.mark.parametrize("target", ["/proc/self/mem", "/proc/kmsg", "/proc/self/environ", "/dev/zero", "FIFO", "."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".json"])
def test_files_that_are_none_are_refused(tmp_path: Path, target: str, suffix: str) -> None:
    link = tmp_path / f"x{suffix}"
    if target == "FIFO":
        os.mkfifo(link)
    else:
        link.symlink_to(target)
    load = qclip.recipes.get if suffix == ".json" else lambda path: qclip.load_model(str(path), arch=None)
    with pytest.raises(InputError):
        load(link)
    if suffix == ".json":
        folder = tmp_path / "a"
        folder.mkdir()
        (folder / "qclip.json").symlink_to(link)
        with pytest.raises(InputError):
            qclip.load_model(folder)
        with pytest.raises(InputError):
            qclip.load(folder)


@pytest.mark.parametrize(
    "name", ["a" * 5000, "/" + "b/" * 3000, "x\0y.pt", "~nobody-of-this-name/x.pt", "", "/", "\udcff"]
)
@pytest.mark.parametrize("kind", ["", "local-dir:", "hf:/"])
def test_names_that_no_file_can_have(name: str, kind: str) -> None:
    with pytest.raises(InputError):
        qclip.load_model(f"{kind}{name}")


def test_what_may_not_be_read_is_said(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(saved["w8a8"], tmp_path / "a")
    stat = Path.stat

    def denied(self: Path, **more: bool) -> os.stat_result:
        if self.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **more)

    monkeypatch.setattr(Path, "stat", denied)
    for load in (qclip.load, qclip.load_model, lambda f: qclip.load_model(f"local-dir:{f}")):
        with pytest.raises(InputError, match="cannot be read .Permission denied"):
            load(folder)


def test_the_command_line_says_it_in_one_sentence(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    evil = changed(saved["w8a8"], tmp_path / "a", fill_in({"tokenizer": HF}, tmp_path))
    bomb = changed(saved["w8a8"], tmp_path / "b", {f"{VISION}/layers": 10**9})
    for folder in (evil, bomb):
        assert cli.main(["bench", str(folder), "--batch", "1"]) == 2
        said = capsys.readouterr().err.strip()
        assert said.splitlines()[-1].startswith("qclip: ") and "Traceback" not in said and "--debug" not in said


# ---- bombs -----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, warnings
import torch, qclip, qclip.recipes
from qclip import models
from qclip.errors import InputError
warnings.simplefilter("ignore")
cases = json.load(sys.stdin)
qclip.load_model(cases.pop(0)[1])  # everything that loading imports is there
try: import transformers.models.clip.modeling_clip
except ImportError: pass
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
built, out = [], []
for family in (models.open_clip, *models.families()):
    make = family.create_from_config
    family.create_from_config = lambda *a, make=make, **k: built.append(1) or make(*a, **k)
for name, what in cases:
    open("/proc/self/clear_refs", "w").write("5")
    before, kind = peak(), "loaded"
    built.clear()
    try:
        qclip.recipes.get(what) if what.endswith(".json") else qclip.load_model(what)
    except InputError as error:
        kind = "refused"
        message = str(error)
    except BaseException as error:
        kind, message = type(error).__name__, str(error)
    out.append([name, kind, message[:300], (peak() - before) / 1024, len(built)])
json.dump(out, sys.stdout)
"""


def sparse(path: Path, size: int, head: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


@pytest.mark.slow
def test_bombs_are_refused_before_anything_is_built(
    saved: dict[str, Path], huggingface: dict[str, Path], tmp_path: Path, tiny_model: str
) -> None:
    """Each in at most 100 MB beyond what was imported, with a limit on address space as a second wall."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs")
    source, cases = saved["w8a8"], {}
    for i, changes in enumerate(
        [
            *({f"{tower}/layers": n} for tower in (VISION, TEXT) for n in (250, 20_000, 10**9)),
            {f"{TEXT}/context_length": 10**9},
            {f"{VISION}/image_size": 200_000},
            {f"{VISION}/image_size": 2048, f"{VISION}/patch_size": 1},
            {f"{VISION}/image_size": 2048, f"{VISION}/pos_embed_type": "sin_cos_2d"},
            {f"{VISION}/width": 16384},
            {f"{TEXT}/vocab_size": 2_000_000},
            {f"{VISION}/mlp_ratio": 1e9},
            {"preprocess/image_size": 200_000},
            {"tokenizer/context_length": 10**9},
            {f"{Q}/shape": [10**9, 10**9]},
            {"plans": {f"p{i}": {"state": "float"} for i in range(30_000)}},
            {f"{VISION}/layers": [250, 250, 250, 250], f"{VISION}/width": 4096},
        ]
    ):
        cases[f"description {i} {str(changes)[:60]}"] = str(changed(source, tmp_path / f"d{i}", changes))

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["positional_embedding"] = torch.zeros(30_000, 32)

    folder = with_tensors(source, tmp_path / "grown", grow)
    content = read(folder)
    content["architecture"]["config"]["text_cfg"]["context_length"] = 30_000
    cases["context with its tensor"] = str(seal(folder, content))
    for name, size, head in (
        ("large json", 400_000_000, b'{"a": "'),
        ("nested", 100_000, b"[" * 100_000),
        ("digits", 6000, b'{"format": ' + b"9" * 5000 + b"}" + b" " * 984),
        ("wide", 1_900_000, b"[" + b"[]," * 630_000 + b"[]]"),
    ):
        folder = copy(source, tmp_path / name)
        sparse(folder / "qclip.json", size, head)
        sparse(tmp_path / f"{name}.json", size, head)
        cases |= {name: str(folder), f"{name} recipe": str(tmp_path / f"{name}.json")}
    headers = {
        "long header": (400_000_100, (400_000_000).to_bytes(8, "little") + b'{"a": '),
        "lying header": (100, (2**60).to_bytes(8, "little")),
        "negative": (108, header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}})),
        "huge shape": (1000, header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
        "empty shape": (1000, header({"a": {"dtype": "U8", "shape": [2**40, 0], "data_offsets": [0, 0]}})),
        "overlap": (1000, header({n: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for n in "ab"})),
    }
    for name, (size, head) in headers.items():
        sparse(tmp_path / f"{name}.safetensors", size, head)
        cases[f"{name} checkpoint"] = str(tmp_path / f"{name}.safetensors")
        folder = copy(source, tmp_path / name)
        sparse(folder / "model.safetensors", size, head)
        content = read(folder)
        content["tensors_bytes"] = size
        content["description_sha256"] = artifact.description_hash(content)
        (folder / "qclip.json").write_text(json.dumps(content))
        cases[name] = str(folder)
    for i, changes in enumerate(
        [
            {"vision_cfg/layers": 250},
            {"vision_cfg/layers": 10**9},
            {"text_cfg/context_length": 30_000},
            {"vision_cfg/image_size": 2048, "vision_cfg/patch_size": 8},
            {"vision_cfg/timm_model_name": "vit_giant_patch14_224"},
        ]
    ):
        folder = copy(Path(tiny_model.removeprefix("local-dir:")), tmp_path / f"l{i}")
        content = json.loads((folder / "open_clip_config.json").read_text())
        for path, value in changes.items():
            owner, key = place(content["model_cfg"], path)
            owner[key] = value
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        cases[f"folder {i}"] = f"local-dir:{folder}"
    for i, changes in enumerate(
        [
            {"vision_config/num_hidden_layers": 10**9},
            {"text_config/max_position_embeddings": 2048},
            {"vision_config/image_size": 2048},
            {"vision_config/hidden_size": 16384},
        ]
    ):
        folder = copy(huggingface["folder"], tmp_path / f"h{i}")
        content = json.loads((folder / "config.json").read_text())
        for path, value in changes.items():
            owner, key = place(content, path)
            owner[key] = value
        (folder / "config.json").write_text(json.dumps(content))
        cases[f"hf {i}"] = f"hf:{folder}"
    torch_bomb(tmp_path / "bomb.pt")
    cases["compressed archive"] = str(tmp_path / "bomb.pt")
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "expanded.pt")
    cases["expanded tensor"] = str(tmp_path / "expanded.pt")
    done = subprocess.run(
        ["bash", "-c", f'ulimit -v {16 << 20}; exec {sys.executable} -c "$0"', MEASURE],
        input=json.dumps([["valid", str(source)], *cases.items()]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [name for name, *_ in found] == list(cases)
    for name, kind, message, megabytes, built in found:
        assert kind == "refused", (name, kind, message)
        assert megabytes < 100, (name, message, megabytes)
        late = name in ("folder 4",) or "mlp_ratio" in name  # the sizes of timm's models stand in no description
        assert built == 0 or late, (name, message)


def header(content: dict[str, Any]) -> bytes:
    data = json.dumps(content).encode()
    return len(data).to_bytes(8, "little") + data


def torch_bomb(path: Path) -> None:
    """A checkpoint whose zip entries are compressed a thousandfold."""
    import zipfile

    torch.save({"a": torch.zeros(2**22)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_checkpoints_that_would_become_larger_than_their_file(tmp_path: Path) -> None:
    torch_bomb(tmp_path / "bomb.pt")
    with pytest.raises(ModelError, match="bomb.pt' is a compressed archive"):
        read_state(tmp_path / "bomb.pt")
    sparse = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (2**20, 2**20))
    odd = {
        "expanded": torch.zeros(1).expand(2**20, 2**20),
        "stride of 0": torch.zeros(4).as_strided((4, 4), (0, 1)),
        "sparse": sparse,
        "complex": torch.zeros(1, dtype=torch.complex64),
        "without memory": torch.zeros(2**20, device="meta"),
    }
    for name, tensor in odd.items():
        torch.save({"a": torch.zeros(1), name: tensor}, tmp_path / "odd.pt")
        with pytest.raises(ModelError, match=f"'{name}' in .*odd.pt' is no plain tensor"):
            read_state(tmp_path / "odd.pt")
    shared = torch.arange(6.0)
    torch.save({"tied": shared, "transposed": shared.view(2, 3).T}, tmp_path / "plain.pt")
    assert read_state(tmp_path / "plain.pt")["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]


# ---- chance ----------------------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 64, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, "", "x", "float", "x" * 3000,
    "\ud800", "../..", [], [[]], [0], [1, 2, 3], {}, {"a": {}}, {"kind": "hf"},
]  # fmt: skip


def nodes(value: Any, at: tuple = ()) -> list[tuple]:
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += nodes(inner, (*at, key))
    return found


def mutate(content: dict[str, Any], chance: random.Random) -> tuple:
    """One change anywhere in a description; every place above it is as likely as every place below."""
    top = chance.choice(
        [key for key in content if key not in ("description_sha256", "tensors_bytes", "tensors_sha256")]
    )
    at = chance.choice(nodes(content[top], (top,)))
    owner: Any = content
    for key in at[:-1]:
        owner = owner[key]
    what = chance.randrange(4)
    if what == 0:
        del owner[at[-1]]
    elif what == 1 and isinstance(owner, dict):
        owner[chance.choice(["x", "auto_map", "layers", "device", "dtype"])] = owner.pop(at[-1])
    elif what == 2:
        owner[at[-1]] = [owner[at[-1]]]
    else:
        owner[at[-1]] = chance.choice(HOSTILE)
    return at


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_descriptions_changed_at_random(saved: dict[str, Path], tmp_path: Path, full: bool, recipe: str) -> None:
    """One of our errors, or a model of the same numbers - where the architecture itself was not changed, which may
    describe another model of the same shapes (heads, activation)."""
    chance, folder = random.Random(recipe), copy(saved[recipe], tmp_path / "a")
    valid = read(folder)
    model = qclip.load(folder)
    want = model.encode_image(IMAGES)
    loaded = 0
    for _ in range(1000 if full else 60):
        content = json.loads(json.dumps(valid))
        at = mutate(content, chance)
        seal(folder, content)
        try:
            again = qclip.load(folder)
        except InputError as error:
            assert "\n" not in str(error), (at, error)
            continue
        loaded += 1
        if at[0] != "architecture":
            assert torch.equal(again.encode_image(IMAGES), want), at
        if at[0] != "tokenizer":
            assert again.tokenizer.config == model.tokenizer.config, at
    assert loaded > 0


def test_tensor_files_changed_at_random(saved: dict[str, Path], tmp_path: Path, full: bool) -> None:
    """Bytes of the header, and its length: never an exception of another class."""
    chance, folder = random.Random(0), copy(saved["w8a8"], tmp_path / "a")
    file, content = folder / "model.safetensors", read(folder)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for _ in range(500 if full else 60):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice([chance.randrange(8), 8 + chance.randrange(length)])
            damaged[at] = chance.choice([chance.randrange(256), ord("0"), ord("9"), ord('"'), ord("-")])
        file.write_bytes(bytes(damaged))
        seal(folder, content)
        try:
            qclip.load(folder)
        except InputError:
            pass
        file.rename(tmp_path / "x.safetensors")
        try:
            qclip.load_model(str(tmp_path / "x.safetensors"))
        except InputError:
            pass


def test_pickles_changed_at_random(tmp_path: Path, full: bool) -> None:
    chance, file = random.Random(0), tmp_path / "x.pt"
    for legacy in (False, True):
        state = {name: torch.randn(3) for name in ("visual.a", "visual.b", "logit_scale")}
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        data = file.read_bytes()
        for _ in range(500 if full else 60):
            damaged = bytearray(data)
            for _ in range(chance.randrange(1, 6)):
                damaged[chance.randrange(len(data))] = chance.randrange(256)
            file.write_bytes(bytes(damaged))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    models.load(str(file), arch=CONFIG)
                except InputError:
                    pass


def test_shipped_checkpoints_pass_the_same_checks() -> None:
    for name, card in zoo.checkpoints().items():
        models.allowed.check_architecture(card["architecture"])
        models.allowed.check_preprocess(card["preprocess"])
        models.allowed.check_tokenizer(card["tokenizer"])
        assert name
