"""A prepared model learns in anybody's loop, and what it becomes gives its outputs, in memory and on disk."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qclip
from qclip import training
from qclip.errors import GradientError, ModelError, NonFiniteError, RecipeError
from qclip.layers import QuantizedSite
from qclip.recipes import QUANTIZERS, Recipe, Treatment, step
from qclip.training import ConversionError
from tests.small import IMAGES, TEXTS, small_clip
from tests.training.world import parameters


def loss(student: nn.Module, teacher: nn.Module) -> Tensor:
    tokens = student.tokenizer(TEXTS)
    parts = [(student.encode_image(IMAGES), teacher.encode_image(IMAGES).detach())]
    parts += [(student.encode_text(tokens), teacher.encode_text(tokens).detach())]
    return sum(1 - F.cosine_similarity(a, b).mean() for a, b in parts)


def own_loop(student: nn.Module, teacher: nn.Module, steps: int = 5) -> list[float]:
    learned = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-4, weight_decay=0)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    return found


#: Each quantizer once, on kernels or simulated, and what is particular.
ROUND = sorted(name for name, kind in QUANTIZERS.items() if kind.rounds)
BITS = itertools.cycle(("w4a8", "w4a4", "w2a8"))
RECIPES = [f"{bits}-{name}" for name, bits in zip(ROUND, BITS, strict=False)]
RECIPES += [
    "w8a8-lsq",
    "w4a4-rotation+lsq",
    "w4a4-rotation+gptq+lsq",
    "w4a4-rotation+lsq-token",
    "w4a16-lsq",
    "w4a8-lsq-plus",
    "w8a8-static-ste",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loop_of_ones_own(recipe: str, tmp_path: Path) -> None:
    teacher = small_clip()
    student = qclip.prepare(teacher, recipe, IMAGES)
    before = parameters(student)
    found = own_loop(student, teacher)
    if not recipe.startswith("w8"):  # which is near to float from the first step
        assert min(found[1:]) < found[0]
    learns = {n for n, p in student.named_parameters() if p.requires_grad}
    assert learns == {n for n, p in student.named_parameters() if p.grad is not None}
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in learns if ".input_rounding." not in n} <= moved <= learns  # nothing may have been clipped
    assert not student.logit_scale.requires_grad
    student.eval()
    with torch.no_grad():
        wanted = F.normalize(student.encode_image(IMAGES), dim=-1)
    deployed = qclip.convert(student, IMAGES)  # holds layers and blocks to cosines of 0.99999
    simulated = recipe.endswith("a4") or "a4-" in recipe
    assert deployed is student
    with torch.no_grad():
        outputs = deployed.encode_image(IMAGES)
    off = 1 - float((F.normalize(outputs, dim=-1) * wanted).sum(-1).mean())
    assert off < (1e-5 if simulated else 2e-4), off
    again = qclip.load(qclip.save(deployed, tmp_path / "artifact"))
    with torch.no_grad():
        assert torch.equal(again.encode_image(IMAGES), outputs)
    kept = again.qclip_quantization.recipe
    assert kept.name == recipe and kept.trained == qclip.recipes.get(recipe).trained
    share = qclip.coverage(deployed).share("simulated" if simulated else "real")
    assert share > 0.8


def test_training_begins_where_the_steps_of_the_recipe_end() -> None:
    """A model that is prepared and not trained is as near to float as the steps alone make it."""
    teacher = small_clip()
    found = qclip.convert(qclip.prepare(teacher, "w3a8-gptq+lsq", IMAGES), IMAGES)
    plan = QUANTIZERS.get("lsq").treatment(Treatment(3, 8))
    steps = qclip.quantize(teacher, Recipe("codes", plan, steps=(step("gptq"),)), IMAGES)
    layers = [(a, b) for a, b in zip(found.modules(), steps.modules(), strict=True) if isinstance(a, QuantizedSite)]
    assert layers
    for a, b in layers:
        assert torch.equal(a.quantized.canonical().codes, b.quantized.canonical().codes)
        torch.testing.assert_close(a.quantized.dequantize(), b.quantized.dequantize())


def test_what_was_given_is_not_changed() -> None:
    model = small_clip()
    before, kinds = parameters(model), [type(m) for m in model.modules()]
    student = qclip.prepare(model, "w4a8-ste")
    own_loop(student, small_clip(), 1)
    assert [type(m) for m in model.modules()] == kinds
    for name, value in parameters(model).items():
        assert torch.equal(value, before[name]), name


def test_what_is_frozen_stays_frozen() -> None:
    model = small_clip()
    model.visual.requires_grad_(False)
    student = qclip.prepare(model, "w4a8-lsq", IMAGES)
    weights = {n for n, p in student.visual.named_parameters() if p.requires_grad}
    assert weights and all(".learned." in name for name in weights)


def test_a_deployed_model_that_differs_is_refused_and_the_trained_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    student = qclip.prepare(small_clip(), "w4a8-lsq", IMAGES)
    with torch.no_grad():
        wanted = student.encode_image(IMAGES)
    build = training.conversion.ptq.build

    def worse(state):
        state.bias = torch.zeros(len(state.weight.scales)) + 0.3
        return build(state)

    with monkeypatch.context() as patch:
        patch.setattr(training.conversion.ptq, "build", worse)
        with pytest.raises(ConversionError, match="the layer .* differs from the trained one: cosine"):
            qclip.convert(student, IMAGES)
    with torch.no_grad():
        assert torch.equal(student.encode_image(IMAGES), wanted)
    qclip.convert(student, IMAGES)


@pytest.mark.parametrize(
    ("recipe", "part", "change", "told"),
    [
        (
            "w4a8-lsq",
            lambda v: v.transformer.resblocks[1].ln_2,
            0.3,
            "what vision.blocks.1 adds differs from the trained",
        ),
        (
            "w4a4-lsq",
            lambda v: v.ln_post,
            0.02,
            r"the deployed model's image embeddings lie 1 - cosine = \S+ from the trained ones, more than the 1e-05",
        ),
    ],
)
def test_what_differs_outside_of_layers_is_refused(
    recipe: str, part, change: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, write = qclip.prepare(small_clip(), recipe, IMAGES), training.conversion._write

    def spoil(model: nn.Module, *rest) -> None:
        write(model, *rest)
        weight = part(model.visual).weight.data
        weight += change * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(training.conversion, "_write", spoil)
    with pytest.raises(ConversionError, match=told):
        qclip.convert(student, IMAGES)


def test_damaged_weights_are_named() -> None:
    student = qclip.prepare(small_clip(), "w4a8-ste")
    _, module = next(training.preparation.trained_sites(student))
    module.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="vision.patch holds NaN or Inf in 'weight'"):
        qclip.convert(student)


def test_gradients_of_a_deployed_model_are_refused_with_what_to_do() -> None:
    deployed = qclip.convert(qclip.prepare(small_clip(), "w8a8-ste"))
    with pytest.raises(GradientError, match=r"qclip\.prepare"):
        deployed.encode_image(IMAGES).sum().backward()


def test_what_cannot_be_prepared_or_converted() -> None:
    model = small_clip()
    with pytest.raises(RecipeError, match="'w4a8' is computed, not trained: .*'w4a8-lsq'"):
        qclip.prepare(model, "w4a8")
    with pytest.raises(RecipeError, match="needs data to calibrate with"):
        qclip.prepare(model, "w4a8-lsq")
    with pytest.raises(RecipeError, match="qclip train MODEL --recipe w4a8-lsq --pairs DATA"):
        qclip.quantize(model, "w4a8-lsq", IMAGES)
    with pytest.raises(ModelError, match=r"call qclip\.prepare"):
        qclip.convert(model)
    with pytest.raises(ModelError, match="quantized already .*: train the float model instead"):
        qclip.prepare(qclip.quantize(model, "w8a8"), "w4a8-ste")
