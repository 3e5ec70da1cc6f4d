"""AltCLIP and ChineseCLIP: CLIP's image tower beside a text tower of BERT's blocks."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qclip
from qclip import models
from qclip.errors import ModelError
from tests.models import families
from tests.models.architectures import images, perturb
from tests.models.test_huggingface import VISION

transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("AltCLIP and ChineseCLIP need transformers 5", allow_module_level=True)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
NAMES = ("AltCLIPModel", "ChineseCLIPModel")


IMAGES = images()


def build(name: str, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    depth = {"num_hidden_layers": layers}
    text = TEXT | depth | ({"project_dim": 40} if name == "AltCLIPModel" else {})
    model = perturb(kind(kind.config_class(text_config=text, vision_config=VISION | depth, projection_dim=24)))
    model.tokenizer = lambda texts: tokens(name).repeat(len(texts) // 3 + 1, 1)[: len(texts)]
    return model


def tokens(name: str) -> torch.Tensor:
    """Three texts, padded."""
    pad = 1 if name == "AltCLIPModel" else 0
    out = torch.full((3, 16), pad)
    for row, length in enumerate((5, 9, 7)):
        out[row, :length] = torch.randint(2, 100, (length,), generator=torch.Generator().manual_seed(row))
    return out


def features(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def calls(name: str) -> families.Calls:
    ids = tokens(name)
    mask = (ids != (1 if name == "AltCLIPModel" else 0)).long()
    return {
        "vision": lambda m: features(m.get_image_features(pixel_values=IMAGES)),
        "text": lambda m: features(m.get_text_features(input_ids=ids, attention_mask=mask)),
    }


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_explicit_form_sites_and_encoders(name: str) -> None:
    model = build(name)
    wants = [call(model) for call in calls(name).values()]
    families.explicit_form_equals(model, calls(name))
    run = models.encoders(model)
    got = [run.encode_image(IMAGES), run.encode_text(tokens(name))]  # columns of padding are cut off
    torch.testing.assert_close(got, wants, rtol=0, atol=1e-5)
    assert run.text_ends(tokens(name)).tolist() == [4, 8, 6]
    names = families.sites_are_what_runs(model, calls(name), {"vision": (3, 17), "text": (3, 16)})
    assert names.count("text.blocks.1.attn.out") == 1 and names[-1] == "text.projection"
    assert ("text.transformation" in names) == (name == "AltCLIPModel")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_columns_of_padding_are_cut_off(name: str) -> None:
    model, seen = build(name), []
    block = models.towers(model)["text"].blocks[0].module
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    models.encoders(model).encode_text(tokens(name))
    assert seen == [9]
    inside = tokens(name)
    inside[1, 3] = inside[1, -1]  # padding in the middle ends no text
    assert models.encoders(model).text_ends(inside).tolist() == [4, 8, 6]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_folders(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    again = models.load(f"hf:{tmp_path}")
    for call in calls(name).values():
        torch.testing.assert_close(call(again), call(model))
    with pytest.raises(ModelError, match="positions for .* tokens and was given 30"):
        models.encoders(qclip.quantize(again, "w8a8")).encode_text(torch.full((1, 30), 5))


@torch.no_grad()
def test_hidden_states_come_from_the_librarys_own_code() -> None:
    model = build("ChineseCLIPModel")
    ids = tokens("ChineseCLIPModel")
    want = model.text_model(input_ids=ids, output_hidden_states=True).hidden_states
    models.towers(model)
    got = model.text_model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_transformers_4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("AltCLIPModel")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(ModelError, match=r"AltCLIPModel is supported with transformers 5 and newer, not 4\.57\.6"):
        models.towers(model)
