"""Models by name and from files; what is refused, and how that is said."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qclip import models
from qclip.errors import ModelError
from qclip.models import open_clip as family
from tests.models.architectures import clip, images, perturb

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return perturb(open_clip.CLIP(**CONFIG))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.contiguous() for name, t in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path, original: nn.Module) -> Path:
    save_file(tensors(original), tmp_path / "open_clip_model.safetensors")
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": pixels}))
    return tmp_path


def same(model: nn.Module, original: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(model.encode_image(images()), original.encode_image(images()))


def test_local_dir(folder: Path, original: nn.Module) -> None:
    model = models.load(f"local-dir:{folder}")
    assert same(model, original) and not model.training
    assert model.preprocess.config["mean"] == [0.5] * 3 and model.preprocess.config["resize_mode"] == "squash"
    assert model.tokenizer(["a dog"]).shape == (1, 16) and model.qclip_source == f"local-dir:{folder}"
    assert models.config_of(model)["config"]["embed_dim"] == 24
    with torch.no_grad():  # the buffers that no file holds are there
        assert torch.equal(model.encode_text(model.tokenizer(["a"])), original.encode_text(model.tokenizer(["a"])))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_checkpoint_files(folder: Path, original: nn.Module, suffix: str) -> None:
    path = folder / f"mine{suffix}"
    if suffix == ".safetensors":
        save_file(tensors(original), path)
    elif suffix == ".pt":  # as open_clip's training writes it
        state = {f"module.{name}": t for name, t in original.state_dict().items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, path)
    else:
        torch.save(original.state_dict(), path)
    assert same(models.load(str(path)), original)  # the config lies beside it
    (folder / "open_clip_config.json").unlink()
    assert same(models.load(str(path), arch=CONFIG), original)
    with pytest.raises(ModelError, match="architecture of .* is not known"):
        models.load(str(path))


def test_half_precision_files_become_float32(folder: Path, original: nn.Module) -> None:
    save_file({k: v.half() for k, v in tensors(original).items()}, folder / "half.safetensors")
    model = models.load(str(folder / "half.safetensors"))
    assert model.visual.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(model.encode_image(images()), original.encode_image(images()), rtol=0, atol=2e-2)


def test_old_text_layout_and_resized_positions(tmp_path: Path, original: nn.Module) -> None:
    save_file(tensors(original), tmp_path / "a.safetensors")
    custom = models.load(str(tmp_path / "a.safetensors"), arch=CONFIG | {"custom_text": True})
    assert isinstance(custom, open_clip.CustomTextCLIP) and same(custom, original)
    larger = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": 64}}
    assert models.load(str(tmp_path / "a.safetensors"), arch=larger).visual.positional_embedding.shape[0] == 65


def test_shapes_name_the_architecture(tmp_path: Path) -> None:
    """Only where one architecture has them: heads and activation cannot be told from shapes."""
    from qclip.models.local import fitting

    def shapes(name: str) -> dict:
        return models.create_from_config(open_clip.get_model_config(name), device="meta").state_dict()

    assert fitting(shapes("ViT-B-32")) == ["ViT-B-32", "ViT-B-32-quickgelu"]
    assert fitting(shapes("ViT-S-32")) == ["ViT-S-32"]
    assert fitting({"a": torch.zeros(1)}) == [] == fitting(clip().state_dict())


@pytest.fixture
def broken(folder: Path, original: nn.Module, request: pytest.FixtureRequest) -> Path:
    path = folder / "broken.safetensors"
    state = tensors(original)
    if request.param == "lacks":
        del state["ln_final.weight"]
    elif request.param == "unknown":
        state["surplus.weight"] = torch.zeros(1)
    elif request.param == "instead":
        state["visual.proj"] = torch.zeros(48, 25)
    elif request.param == "NaN":
        state["visual.ln_post.bias"] = state["visual.ln_post.bias"].clone().fill_(float("nan"))
    save_file(state, path)
    if request.param == "not a readable safetensors":
        path.write_bytes(path.read_bytes()[:5000])
    return path


@pytest.mark.parametrize("broken", ["lacks", "unknown", "instead", "NaN", "not a readable safetensors"], indirect=True)
def test_damaged_checkpoints_are_refused(broken: Path, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ModelError, match=request.node.callspec.params["broken"]) as caught:
        models.load(str(broken))
    assert "broken.safetensors" in str(caught.value)


class Payload:
    """An object whose unpickling would leave a trace."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_unpickling_is_refused(tmp_path: Path, original: nn.Module) -> None:
    trace = tmp_path / "trace"
    torch.save({"state_dict": Payload(trace)}, tmp_path / "evil.pt")
    torch.save(original, tmp_path / "module.pt")
    for name in ("evil.pt", "module.pt"):
        with pytest.raises(ModelError, match="refused because unpickling runs code"):
            models.load(str(tmp_path / name), arch=CONFIG)
    assert not trace.exists()
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "program.pt"))
    with pytest.raises(ModelError, match="TorchScript program"):
        models.load(str(tmp_path / "program.pt"), arch=CONFIG)


def test_other_bad_files(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    for name, match in (
        ("text.pt", "unpickling|not a readable"),
        ("numbers.pt", "no state dict"),
        ("absent.safetensors", "there is no file"),
    ):
        with pytest.raises(ModelError, match=match):
            models.load(str(tmp_path / name), arch=CONFIG)
    with pytest.raises(ModelError, match="did you mean 'ViT-B-32'"):
        models.load(str(folder / "open_clip_model.safetensors"), arch="ViT-B-33")


def test_bad_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        models.load(f"local-dir:{tmp_path / 'none'}")
    config = folder / "open_clip_config.json"
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no checkpoint"):
        models.load(f"local-dir:{folder}")
    for content, match in (("{", "not valid JSON"), ("[]", "no 'model_cfg'"), ('{"model_cfg": {}}', "'model_cfg'")):
        config.write_text(content)
        with pytest.raises(ModelError, match=match):
            models.load(f"local-dir:{folder}")
    config.unlink()
    with pytest.raises(ModelError, match="open_clip_config.json.* is missing"):
        models.load(f"local-dir:{folder}")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(models.UnknownModelError, match="'ViT-B-33'; did you mean 'ViT-B-32'"):
        models.load("ViT-B-33")
    with pytest.raises(ModelError, match="no pretrained tag 'laion2b_s34b'.*'laion2b_s34b_b79k'"):
        models.load("ViT-B-32:laion2b_s34b")
    assert "ViT-B-32" in models.names()


@pytest.fixture
def small_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Tiny` as one of open_clip's architectures, with a pretrained tag."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS, "Tiny": CONFIG})
    tag = {"hf_hub": "nobody/nothing/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"t1": tag})


def test_random_weights_are_said_aloud(small_registry: None) -> None:
    with pytest.warns(UserWarning, match="Tiny has random weights") as caught:
        model = models.load("Tiny")
    assert len(caught) == 1 and not model.training
    assert model.tokenizer(["a"]).shape == (1, 16) and model.preprocess.config["image_size"] == 32


def test_weights_that_cannot_be_downloaded(small_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ConnectionError("the network is down\nand more lines")

    monkeypatch.setattr(family, "download_pretrained", fail)
    with pytest.raises(ModelError, match=r"weights of Tiny:t1 could not be downloaded \(the network is down\); check"):
        models.load("Tiny:t1")


def test_downloaded_weights_and_their_activation(
    small_registry: None, monkeypatch: pytest.MonkeyPatch, folder: Path, original: nn.Module
) -> None:
    monkeypatch.setattr(family, "download_pretrained", lambda *_: str(folder / "open_clip_model.safetensors"))
    with pytest.warns(UserWarning, match="trained with QuickGELU"):
        model = models.load("Tiny:t1")
    quick = open_clip.CLIP(**CONFIG, quick_gelu=True).eval()
    quick.load_state_dict(original.state_dict())
    assert same(model, quick) and model.preprocess.config["mean"] == [0.5] * 3 and model.qclip_source == "Tiny:t1"
    named = family.create("Tiny", str(folder / "open_clip_model.safetensors"))
    assert same(named, original)


def test_import_without_transformers() -> None:
    """transformers is an extra: everything but Hugging Face models works without it."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import qclip; from qclip import models; import open_clip\n"
        f"m = open_clip.CLIP(**{CONFIG!r}); models.towers(m); models.encoders(m)\n"
        "try: models.load('hf:anything')\n"
        "except qclip.errors.ModelError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "install qclip[hf]" in done.stdout


# ---- names of training scripts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "model.module."]
    + ["module.model.", "model.model._orig_mod.module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."],
)
def test_prefixes_of_training_scripts_are_stripped(
    tmp_path: Path, original: nn.Module, prefix: str, suffix: str
) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in tensors(original).items()}
    path = tmp_path / f"a{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state, "epoch": 1}, path)
    assert same(models.load(str(path), arch=CONFIG), original)


def test_a_compiled_part_is_stripped(tmp_path: Path, original: nn.Module) -> None:
    state = tensors(original)
    for part in ("visual.", "transformer."):
        state = {n.replace(part, f"{part}_orig_mod.", 1) if n.startswith(part) else n: t for n, t in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    assert same(models.load(str(tmp_path / "a.safetensors"), arch=CONFIG), original)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_where_the_model_has_floats_are_refused(
    tmp_path: Path, original: nn.Module, dtype: torch.dtype
) -> None:
    """Codes of another quantization have the right shape, and give wrong embeddings without a word."""
    state = tensors(original)
    state["visual.proj"] = (state["visual.proj"] * 50).to(dtype)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="'visual.proj' in .* where the model has floats; .* the float checkpoint"):
        models.load(str(tmp_path / "a.safetensors"), arch=CONFIG)


def test_the_names_that_differ_are_said(tmp_path: Path, original: nn.Module) -> None:
    path, state = tmp_path / "a.safetensors", tensors(original)
    save_file({f"net.{name}": tensor for name, tensor in state.items()}, path)
    with pytest.raises(ModelError, match=r"0 blocks 'visual\.transformer\.resblocks\.\*'.*'net\."):
        models.load(str(path), arch=CONFIG)
    with pytest.raises(ModelError, match=r"it lacks 'visual.conv1.weight', and begins with 'net\."):
        models.load(str(path))
    renamed = {name.replace("ln_final", "final_norm"): tensor for name, tensor in state.items()}
    save_file(renamed, path)
    with pytest.raises(
        ModelError,
        match="lacks 'ln_final.bias', 'ln_final.weight' and holds the unknown 'final_norm.bias', 'final_norm.weight'",
    ):
        models.load(str(path), arch=CONFIG)
    save_file(state | {f"module.{name}": tensor.clone() for name, tensor in state.items()}, path)
    with pytest.raises(ModelError, match="holds both '.*' and 'module"):
        models.load(str(path), arch=CONFIG)
    save_file({f"model.{name}": tensor for name, tensor in state.items()} | {"loss.scale": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"'loss\.scale'|'model\."):
        models.load(str(path), arch=CONFIG)
