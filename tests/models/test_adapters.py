"""Adapters of PEFT: merged ones are the library's own layers again, others are refused by name."""

from pathlib import Path

import pytest
import torch

import qclip
from qclip import models
from qclip.errors import ModelError
from tests.models.architectures import images, tokens
from tests.models.test_huggingface import build

pytest.importorskip("transformers", reason="needs transformers (extra hf)")
peft = pytest.importorskip("peft", reason="needs peft (extra test)")

IMAGES, TOKENS = images(), tokens()


def adapted() -> torch.nn.Module:
    """A CLIP with LoRA on attention and MLPs of both towers, and what it learned."""
    torch.manual_seed(0)
    names = ["q_proj", "v_proj", "out_proj", "fc1", "visual_projection"]
    model = peft.get_peft_model(build("clip"), peft.LoraConfig(r=4, target_modules=names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def embeddings(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    run = models.encoders(model)
    return run.encode_image(IMAGES), run.encode_text(TOKENS)


def test_a_merged_model_is_that_of_peft(tmp_path: Path) -> None:
    wants = embeddings(adapted().base_model.model)
    merged = adapted().merge_and_unload()
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(wants, embeddings(build("clip")), strict=True))
    with models.explicit_form(merged) as towers:
        assert len(towers["vision"].blocks) == 2
        torch.testing.assert_close(embeddings(merged), wants, rtol=0, atol=1e-5)
    done = qclip.quantize(merged, "w8a8")
    for got, want in zip(embeddings(done), wants, strict=True):
        assert torch.cosine_similarity(got, want).min() > 0.99
    again = qclip.load(qclip.save(done, tmp_path / "artifact"))
    for got, want in zip(embeddings(again), embeddings(done), strict=True):
        assert torch.equal(got, want)


def test_a_merged_model_in_a_folder(tmp_path: Path) -> None:
    merged = adapted().merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(embeddings(models.load(f"hf:{tmp_path}")), embeddings(merged))


def test_unmerged_adapters_are_refused_by_name() -> None:
    inside = adapted().base_model.model
    with pytest.raises(ModelError, match=r"q_proj.*merge the adapter first|peft.*lora.* merge"):
        qclip.quantize(inside, "w8a8")
    with pytest.raises(ModelError):
        qclip.quantize(adapted(), "w8a8")
