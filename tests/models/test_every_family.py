"""Every family does everything: presets, artifacts, hooks, torch.compile, programs, bfloat16, with random weights.

That the explicit form computes what the model computed stands in the tests of each library, which know its options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import qclip
from qclip import models
from qclip.recipes import presets

from . import families, small_timm
from .architectures import images

IMAGES = images()


class Sample(NamedTuple):
    """A small model, which stays as it is, calls of its towers, and what they are calibrated with."""

    model: Any
    calls: families.Calls
    calibration: Any
    whole_graph: bool = True  # torch.compile sees the tower as one graph


def _timm(name: str) -> Sample:
    return Sample(
        small_timm.build(name), {"vision": lambda m: m.encode_image(IMAGES.to(m.logit_scale.dtype))}, images(6)
    )


def _text(name: str) -> Sample:
    texts = pytest.importorskip("tests.models.test_open_clip_texts", reason="needs transformers (extra hf)")
    model = texts.with_tokenizer(texts.build(name), name)
    return Sample(model, {"text": texts.calls(name)["text"]}, images(6))


def _tower(name: str) -> Sample:
    tests = pytest.importorskip("tests.models.test_huggingface_towers", reason="needs transformers (extra hf)")
    return Sample(tests.build(name), tests.calls(name), tests.calibration(name))


def _naflex() -> Sample:
    tests = pytest.importorskip("tests.models.test_huggingface_naflex", reason="needs transformers with SigLIP 2")
    # Shapes are numbers in transformers' own code.
    return Sample(tests.build(), tests.CALLS, images(6), whole_graph=False)


def _bert(name: str) -> Sample:
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
    if transformers.__version__.startswith("4."):
        pytest.skip("needs transformers 5")
    from . import test_huggingface_bert as tests

    return Sample(tests.build(name), tests.calls(name), images(6))


FAMILIES: dict[str, Callable[[], Sample]] = {
    **{name: functools.partial(_timm, name) for name in small_timm.SMALL},
    **{name: functools.partial(_text, name) for name in ("roberta", "xlm-roberta", "bert", "m2m_100", "mt5")},
    **{
        name: functools.partial(_tower, name)
        for name in (
            "CLIPVisionModelWithProjection",
            "CLIPTextModelWithProjection",
            "CLIPVisionModel",
            "CLIPTextModel",
            "SiglipVisionModel",
            "SiglipTextModel",
        )
    },
    "Siglip2Model": _naflex,
    **{name: functools.partial(_bert, name) for name in ("AltCLIPModel", "ChineseCLIPModel")},
}
COMPILED = ("eva02", "vitamin", "fastvit", "swin", "roberta", "m2m_100", "mt5", "CLIPTextModel", "Siglip2Model")
every_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def sample(name: str) -> Sample:
    return FAMILIES[name]()


@every_family
def test_rows_and_pairs(name: str) -> None:
    model, calls, *_ = sample(name)
    if "text" in calls:
        with models.explicit_form(model) as towers:
            texts = torch.randint(3, 99, (3, towers["text"].tokens))
        texts[:, -1] = 99  # where CLIP's end
        calls = {**calls, "text": lambda m: models.encoders(m).encode_text(texts)}
    families.rows_and_pairs_are_those_that_run(model, calls, 3)


@pytest.mark.parametrize("name", [*small_timm.SMALL, "CLIPVisionModel", "SiglipVisionModel", "Siglip2Model"])
@torch.no_grad()
def test_images_smaller_than_a_patch(name: str) -> None:
    """They are refused in one sentence; convolutions with padding take them, as in float."""
    model = sample(name).model
    run, tiny = models.encoders(qclip.quantize(model, {"name": "images", "towers": ["vision"]})), torch.ones(1, 3, 3, 3)
    if name.startswith(("fastvit", "vitamin")):
        want = models.encoders(model).encode_image(tiny)
        assert torch.cosine_similarity(run.encode_image(tiny), want) > 0.98
        return
    with pytest.raises((ValueError, AssertionError), match="patch|size|match"):
        run.encode_image(tiny)


@every_family
@pytest.mark.parametrize("preset", presets())
def test_presets(name: str, preset: str, full: bool) -> None:
    if not full and (list(FAMILIES).index(name) + list(presets()).index(preset)) % 3:
        pytest.skip("needs --full: without, each family takes a third of the presets")
    model, calls, calibration, _ = sample(name)
    families.every_preset(model, calls, calibration, [preset])


@every_family
def test_artifacts(name: str, tmp_path: Path) -> None:
    model, calls, calibration, _ = sample(name)
    families.artifact_gives_the_same_bits(model, calls, tmp_path / "artifact", "w8a8-static", calibration)


@every_family
def test_hooks(name: str) -> None:
    model, calls, *_ = sample(name)
    families.hooks_see(model, calls)


@every_family
def test_bfloat16(name: str) -> None:
    model, calls, *_ = sample(name)
    families.works_in_bfloat16(model, calls)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_programs(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, *_ = sample(name)
    families.programs_give_the_same_bits(model, calls, monkeypatch, (dtype,))


@every_family
def test_compiles(name: str, full: bool) -> None:
    if not full and name not in COMPILED:
        pytest.skip("needs --full: without, one of each kind of block is compiled")
    model, calls, _, whole = sample(name)
    families.compiles(model, calls, whole)
