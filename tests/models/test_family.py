"""A family of models that this package has never seen, in one file: its classes, its adapter, and what they can do."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import ArtifactError, ModelError
from qclip.models import FAMILIES, Attention, Family, Mlp, Tower
from qclip.models.explicit import (
    by_name,
    embedding_site,
    patch_site,
    projection_site,
    split,
    succeed,
    transformer_block,
)
from qclip.reliability import evaluate
from qclip.untrusted.schema import record, whole

# ---- the model -------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, causal)
        self.norm2, self.mlp = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=self.causal)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, inputs: nn.Module, tokens: int, width: int, layers: int, out: int, causal: bool) -> None:
        super().__init__()
        self.inputs, self.positions = inputs, nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.layers = nn.ModuleList(Layer(width, 2, causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class TwoTowers(nn.Module):
    def __init__(self, width: int = 32, layers: int = 2, image: int = 32, context: int = 16) -> None:
        super().__init__()
        self.settings = {"width": width, "layers": layers, "image": image, "context": context}
        self.image = Encoder(nn.Conv2d(3, width, 8, 8), (image // 8) ** 2, width, layers, 24, causal=False)
        self.words = Encoder(nn.Embedding(49408, width), context, width, layers, 24, causal=True)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.words(tokens)


# ---- its family ------------------------------------------------------------------------------------------------------


def encoder(name: str, whole: Any) -> Tower:
    tokens = len(whole.positions)
    for layer in whole.layers:
        if isinstance(layer.attention, SelfAttention):  # not yet in explicit form
            old = layer.attention
            core = Attention(*split(old.qkv.weight, old.qkv.bias, 3), old.out, old.heads)
            layer.attention = succeed(old, core)
            layer.mlp = succeed(layer.mlp, Mlp(layer.mlp.up, layer.mlp.down, "gelu"))
    blocks = [
        transformer_block(f"{name}.blocks.{i}", b, (b, "attention"), (b, "norm1"), (b, "mlp"), (b, "norm2"), tokens)
        for i, b in enumerate(whole.layers)
    ]
    first = (
        patch_site("vision", whole, "inputs", tokens) if name == "vision" else embedding_site(whole, "inputs", tokens)
    )
    sites = by_name(first, *(list(b.sites.values()) for b in blocks), projection_site(name, whole, "head"))
    return Tower(name, whole, blocks, sites, tokens)


class Toy(Family):
    name = "toy"
    libraries = (__name__,)
    prefixes = ("toy:",)
    examples = (("toy:small", "a toy"),)
    SETTINGS = {"width": whole(8, 4096), "layers": whole(1, 100), "image": whole(8, 1024), "context": whole(1, 512)}
    classes = {"TwoTowers": record(SETTINGS, tuple(SETTINGS))}

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, TwoTowers)

    def towers(self, model: Any) -> dict[str, Tower]:
        return {"vision": encoder("vision", model.image), "text": encoder("text", model.words)}

    def image_size(self, model: Any) -> int:
        return model.settings["image"]

    def preprocess_config(self, model: Any) -> dict[str, Any]:
        return {"image_size": model.settings["image"], "mean": [0.5] * 3, "std": [0.25] * 3}

    def tokenizer_config(self, model: Any) -> dict[str, Any]:
        return {"kind": "clip-bpe", "context_length": model.settings["context"]}

    def config_of(self, model: Any) -> dict[str, Any]:
        return {"family": "toy", "class": "TwoTowers", "config": model.settings}

    def create_from_config(self, config: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
        with torch.device(device):
            return TwoTowers(**config["config"])

    def names(self) -> list[str]:
        return ["toy:small"]

    def load(self, name: str, device: str | torch.device = "cpu", arch: str | dict | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = TwoTowers().eval().to(device)
        return models.attach(model, self.preprocess_config(model), self.tokenizer_config(model), source=name)

    def grid(self, config: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
        side = config["config"]["image"]
        return (side, side), (side // 8, side // 8)

    def sizes(self, config: dict[str, Any]) -> tuple[list, list]:
        found = config["config"]
        return [("image.layers.", found["layers"]), ("words.layers.", found["layers"])], [
            ("words.inputs.weight", (49408, found["width"])),
            ("words.positions", (found["context"], found["width"])),
        ]


@pytest.fixture
def toy() -> Any:
    FAMILIES.register(Toy())
    yield models.load("toy:small")
    if "toy" in FAMILIES:
        FAMILIES.unregister("toy")


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXTS = ["a photo of a dog", "two birds on a wire near the old house", "red"]


def embeddings(model: nn.Module) -> tuple[Tensor, Tensor]:
    run = models.encoders(model)
    with torch.no_grad():
        return run.encode_image(IMAGES), run.encode_text(run.tokenizer(TEXTS))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_a_registered_family_is_quantized_saved_and_loaded(toy: nn.Module, recipe: str, tmp_path: Path) -> None:
    before = embeddings(toy)
    done = qclip.quantize(toy, recipe)
    rows = [row for row in qclip.coverage(done).rows if row.kind not in ("attention", "other")]
    assert {row.state for row in rows} == {"real"} and len(rows) == 2 * (2 * 6 + 2)
    assert {row.weight_bits for row in rows if row.kind == "fc1"} == {int(recipe[1])}
    assert sum(row.macs for row in rows if row.site == "vision.blocks.0.mlp.fc1") == 16 * 32 * 64
    after = embeddings(done)
    for old, new in zip(before, after, strict=True):
        assert F.cosine_similarity(old, new).min() > 0.99 and not torch.equal(old, new)
    assert all(torch.equal(a, b) for a, b in zip(embeddings(toy), before, strict=True))  # a copy was quantized
    again = qclip.load(qclip.save(done, tmp_path / recipe))
    assert type(again).__name__ == "TwoTowers" and again.settings == toy.settings
    assert all(torch.equal(a, b) for a, b in zip(embeddings(again), after, strict=True))
    assert {name: t.dtype for name, t in again.state_dict().items()} == {
        name: t.dtype for name, t in done.state_dict().items()
    }


def test_it_is_evaluated_and_listed(toy: nn.Module, capsys: pytest.CaptureFixture) -> None:
    from qclip.cli import main

    compared = {"float": toy, "w8a8": qclip.quantize(toy, "w8a8")}
    results = evaluate(compared, "scenes:test?samples=12", ["scenes:far-ood?samples=12"])
    assert results.value(model="w8a8", set="scenes-test", metric="cosine_mean", reference="float") > 0.99
    assert results.value(model="w8a8", metric="coverage_macs", axis="state", at="real") > 0.5
    assert main(["models", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["toy"] == ["toy:small"]
    assert main(["models"]) == 0
    assert "toy:small" in capsys.readouterr().out
    assert type(qclip.load_model("toy:small")) is TwoTowers


def test_what_is_not_registered_is_refused_by_name(toy: nn.Module, tmp_path: Path) -> None:
    path = qclip.save(qclip.quantize(toy, "w8a8"), tmp_path / "artifact")
    FAMILIES.unregister("toy")
    with pytest.raises(ArtifactError, match="family 'toy', class 'TwoTowers'.*known families: .*open_clip"):
        qclip.load(path)
    with pytest.raises(ModelError, match="test_family.TwoTowers is not supported"):
        qclip.quantize(toy, "w8a8")
    with pytest.raises(ModelError, match="unknown model 'toy:small'"):
        qclip.load_model("toy:small")
    with pytest.raises(ModelError, match="family 'toy'"):
        models.create_from_config(Toy().config_of(toy))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"layers": 10**6}, "layers is 1000000; it must be a whole number from 1 to 100"),
        ({"layers": 3}, "holds 2 blocks 'image.layers.*' and its description says 3"),
        ({"context": 17}, "'words.positions' in .* is .16, 32. and its description says .17, 32."),
        ({"image": 64}, "preprocessing takes images of 32 x 32 and the architecture 64 x 64"),
        ({"trust_remote_code": True}, "'trust_remote_code', which is not allowed"),
    ],
)
def test_a_description_is_held_to_the_familys_lists(toy: nn.Module, tmp_path: Path, edit: dict, message: str) -> None:
    from qclip.artifact import DESCRIPTION, description_hash

    path = qclip.save(qclip.quantize(toy, "w8a8"), tmp_path / "artifact")
    content = json.loads((path / DESCRIPTION).read_text())
    content["architecture"]["config"] |= edit
    content["description_sha256"] = description_hash(content)
    (path / DESCRIPTION).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=message):
        qclip.load(path)


def test_code_of_another_origin_is_refused_in_it_too(toy: Any) -> None:
    class Adapted(SelfAttention):
        def forward(self, x: Tensor, causal: bool = False) -> Tensor:
            return super().forward(x, causal) + 1

    Adapted.forward.__module__ = "lora"
    toy.image.layers[1].attention.__class__ = Adapted
    with pytest.raises(ModelError, match="image.layers.1.attention is a .*Adapted with a forward of its own"):
        qclip.quantize(toy, "w8a8")
    assert type(toy.image.layers[0].attention) is SelfAttention  # nothing was changed


def test_a_family_of_another_package_comes_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("toy", f"{__name__}:Toy", "qclip.families")
    monkeypatch.setitem(FAMILIES.__dict__, "_installed", {"toy": point})
    try:
        assert models.family_of(TwoTowers()).name == "toy"  # registered as a class: an object is made of it
        assert models.load("toy:small").settings["width"] == 32
    finally:
        FAMILIES._loaded.pop("toy", None)


def test_models_of_no_family_are_called_by_their_own_methods() -> None:
    run = models.encoders(TwoTowers().eval(), tokenizer=lambda texts: torch.zeros(len(texts), 16, dtype=torch.int64))
    assert run.encode_image(IMAGES).shape == (6, 24) and run.encode_text(run.tokenizer(["a"])).shape == (1, 24)
    assert run.preprocess is None
    with pytest.raises(ModelError, match="has no encode_image"):
        models.encoders(nn.Linear(1, 1))


def test_a_family_needs_only_its_towers_to_be_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Family):
        name = "bare"
        libraries = (__name__,)
        owns, towers = Toy.owns, Toy.towers

    FAMILIES.register(Bare())
    try:
        done = qclip.quantize(TwoTowers().eval(), "w8a8")
        with pytest.raises(ModelError, match="TwoTowers cannot be saved: its family, bare, has no description of it"):
            qclip.save(done, "anywhere")
    finally:
        FAMILIES.unregister("bare")
