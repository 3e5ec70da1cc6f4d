"""Terms against loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qclip.training.objectives import OBJECTIVES, Features, Objective


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def features(captions: list[int] | None = None) -> Features:
    text = unit(5, 8, seed=1)
    if captions is not None:
        text = text[captions]
    return Features(
        unit(5, 8, seed=0),
        text,
        torch.tensor(7.0),
        unit(5, 8, seed=2),
        unit(5, 8, seed=3),
        torch.tensor(9.0),
        torch.tensor(captions or range(5)),
        unit(3, 8, seed=4),
        unit(3, 8, seed=5),
    )


def probabilities(logits: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_contrastive_leaves_a_caption_that_comes_twice_out() -> None:
    for captions in (None, [0, 1, 2, 1, 4]):
        seen = features(captions)
        logits = (seen.scale * seen.image @ seen.text.T).tolist()
        names, total = seen.captions.tolist(), 0.0
        for i in range(5):
            others = [j for j in range(5) if j == i or names[j] != names[i]]
            for row in ([logits[i][j] for j in others], [logits[j][i] for j in others]):
                total -= math.log(probabilities(row)[others.index(i)])
        assert OBJECTIVES.get("contrastive")()(seen).item() == pytest.approx(total / 10, rel=1e-5)


def test_mse_is_two_times_one_minus_the_cosine() -> None:
    seen = features()
    cosines = [(seen.image * seen.teacher_image).sum(-1), (seen.text * seen.teacher_text).sum(-1)]
    wanted = sum(float(2 * (1 - each).mean()) for each in cosines) / 2
    assert OBJECTIVES.get("mse")()(seen).item() == pytest.approx(wanted, rel=1e-5)


def test_similarity_and_zero_shot_are_divergences_from_the_teacher() -> None:
    seen = features()
    own, wanted = seen.scale * seen.image @ seen.text.T, seen.teacher_scale * seen.teacher_image @ seen.teacher_text.T
    total = 0.0
    for a, b in ((wanted, own), (wanted.T, own.T)):
        total += sum(kl(probabilities(p), probabilities(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 5
    assert OBJECTIVES.get("similarity")()(seen).item() == pytest.approx(total / 2, rel=1e-5)
    a = (seen.teacher_scale * seen.teacher_image @ seen.teacher_classes.T).tolist()
    b = (seen.scale * seen.image @ seen.classes.T).tolist()
    total = sum(kl(probabilities(p), probabilities(q)) for p, q in zip(a, b, strict=True)) / 5
    assert OBJECTIVES.get("zero-shot")()(seen).item() == pytest.approx(total, rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    seen = features()
    equal = Features(
        seen.image, seen.text, seen.scale, seen.image, seen.text, seen.scale, seen.captions, seen.classes, seen.classes
    )
    for name in ("mse", "similarity", "zero-shot"):
        assert abs(OBJECTIVES.get(name)()(equal).item()) < 1e-6
    assert OBJECTIVES.get("contrastive")()(equal).item() > 0.1


def test_terms_are_weighted_and_told() -> None:
    total, parts = Objective("contrastive+2.5*mse")(features())
    assert parts["mse"].item() == pytest.approx(2.5 * OBJECTIVES.get("mse")()(features()).item())
    assert total.item() == pytest.approx(sum(each.item() for each in parts.values()))
    assert Objective("contrastive+zero-shot").needs == {"pairs", "classes"}
