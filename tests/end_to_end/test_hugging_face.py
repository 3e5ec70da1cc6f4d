"""Hugging Face's own ways to look at a model and to save it, on the explicit and on the quantized one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import ModelError
from qclip.models import replay
from qkernels import cpu

from ..models.test_huggingface import build, images, tokens

pytestmark = pytest.mark.slow  # models of many families

TOWERS: dict[str, Callable[[nn.Module, dict], Any]] = {
    "vision": lambda model, asked: model.vision_model(pixel_values=images(), **asked),
    "text": lambda model, asked: model.text_model(input_ids=tokens(), **asked),
}
LAYERS = 2


@torch.no_grad()
def hidden(model: nn.Module, tower: str, by: str) -> tuple[tuple[Tensor, ...], Any]:
    """All hidden states, asked for by argument or by configuration, and the whole output."""
    config = getattr(model, f"{tower}_model").config
    config.output_hidden_states = by == "config"
    output = TOWERS[tower](model, {"output_hidden_states": True} if by == "argument" else {})
    config.output_hidden_states = False
    return output.hidden_states, output


@pytest.mark.parametrize("by", ["argument", "config"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_hidden_states_of_the_explicit_form_are_those_of_the_original(name: str, tower: str, by: str) -> None:
    model = build(name)
    wanted, _ = hidden(copy.deepcopy(model), tower, by)
    models.towers(model)
    found, _ = hidden(model, tower, by)
    assert len(found) == len(wanted) == LAYERS + 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("programs", [True, False])
@pytest.mark.parametrize("by", ["argument", "config"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_hidden_states_of_a_quantized_model(
    name: str, tower: str, by: str, programs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QKERNELS_PROGRAM", "1" if programs else "0")
    model = build(name)
    wanted, _ = hidden(copy.deepcopy(model), tower, by)
    qclip.quantize_(model, "w8a8")
    inner = models.towers(model)[tower].runner
    for _ in range(4):
        plain = TOWERS[tower](model, {}).last_hidden_state
    if programs and cpu.native is not None:
        assert len(replay.programs(inner)) == 1
    for _ in range(3):  # once more would be a program's turn
        found, output = hidden(model, tower, by)
        assert len(found) == LAYERS + 1 and torch.equal(output.last_hidden_state, plain)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.995
        last = inner.final_layer_norm if tower == "text" else inner.post_layernorm
        if not (name == "clip" and tower == "vision"):
            assert torch.equal(last(found[-1]), output.last_hidden_state)  # the last one is what the tower went on with
        else:
            assert torch.equal(found[-1], output.last_hidden_state)
    played, play = [], replay.Program.__call__
    monkeypatch.setattr(replay.Program, "__call__", lambda *args: (played.append(1), play(*args))[1])
    assert torch.equal(TOWERS[tower](model, {}).last_hidden_state, plain)
    assert bool(played) == (programs and cpu.native is not None)  # transformers' recorders, which are left, stop none
    assert getattr(TOWERS[tower](model, {}), "hidden_states", None) is None


@pytest.mark.parametrize("form", ["explicit", "quantized"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_attentions_are_refused_in_words(name: str, form: str) -> None:
    model = build(name, "eager")
    assert len(TOWERS["vision"](model, {"output_attentions": True}).attentions) == LAYERS
    models.towers(model) if form == "explicit" else qclip.quantize_(model, "w8a8")
    for call in TOWERS.values():
        with pytest.raises(ModelError, match="output_attentions: .* attn_implementation='eager'"):
            call(model, {"output_attentions": True})
    model.vision_model.config.output_attentions = True
    with pytest.raises(ModelError, match="output_attentions"):
        TOWERS["vision"](model, {})
    model.vision_model.config.output_attentions = False
    TOWERS["vision"](model, {})
    whole = {"pixel_values": images(), "input_ids": tokens()}
    with pytest.raises(ModelError, match="output_attentions"):
        model(**whole, output_attentions=True)
    states = model(**whole, output_hidden_states=True)
    assert len(states.vision_model_output.hidden_states) == len(states.text_model_output.hidden_states) == LAYERS + 1


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_save_pretrained_and_push_to_hub_name_what_works(name: str, tmp_path) -> None:
    model = build(name)
    untouched = copy.deepcopy(model)
    with models.explicit_form(model):
        for save in (model.save_pretrained, model.push_to_hub):
            with pytest.raises(ModelError, match=r"qclip\.save"):
                save(str(tmp_path / "explicit"))
    model.save_pretrained(tmp_path / "float")  # it is itself again
    again = type(model).from_pretrained(tmp_path / "float")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), untouched.parameters(), strict=True))
    qclip.quantize_(model, "w8a8")
    for part in (model, model.vision_model, model.text_model):
        for method in ("save_pretrained", "push_to_hub"):
            with pytest.raises(ModelError, match=r"qclip\.save"):
                getattr(part, method)(str(tmp_path / "quantized"))
    assert not (tmp_path / "quantized").exists() and not (tmp_path / "explicit").exists()
    qclip.dequantize_(model)
    with pytest.raises(ModelError, match=r"qclip\.save"):
        model.save_pretrained(str(tmp_path / "dequantized"))


def test_classes_keep_the_names_by_which_libraries_look_them_up() -> None:
    model = build("clip")
    before = {name: str(type(module)) for name, module in model.named_modules()}
    models.towers(model)
    after = {name: str(type(module)) for name, module in model.named_modules()}
    kept = ["", "vision_model", "text_model", "vision_model.encoder.layers.0", "text_model.encoder.layers.1.self_attn"]
    assert all(after[name] == before[name] for name in kept)
