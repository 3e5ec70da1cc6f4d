"""Terms against loops over their definitions."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qclip.errors import InputError
from qclip.training.objectives import OBJECTIVES, Apart, Basis, Features, Mixtures, Negatives, Objective, Views
from qclip.training.objectives.esd import answers, esd
from qclip.training.objectives.mmce import mmce


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


# -- terms that aim at reliability -------------------------------------------------------------------------------------

WIDTH = 6


def everything(seed: int = 0) -> Features:
    """A batch with all that a term may ask for, float64."""
    draw = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return F.normalize(torch.randn(count, WIDTH, generator=draw, dtype=torch.float64), dim=-1)

    image, text = some(5), some(5)
    known = F.normalize(text[:4] + 0.5 * some(4), dim=-1)  # negatives that look like something
    vectors = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)).Q
    return Features(
        image,
        text,
        torch.tensor(7.0, dtype=torch.float64),
        some(5),
        some(5),
        torch.tensor(9.0, dtype=torch.float64),
        torch.arange(5),
        some(3),
        some(3),
        Views(some(4), some(4)),
        Negatives(known, some(9)),
        Mixtures(some(6), some(6)),
        Apart(some(7), some(7), torch.arange(7)),
        Basis(some(1)[0] / 3, vectors),
        some(5),
    )


#: Embeddings of the student by name, and how to put others in their place.
LEARNED: dict[str, tuple[Callable[[Features], Tensor], Callable[[Features, Tensor], Features]]] = {
    "image": (lambda f: f.image, lambda f, x: dataclasses.replace(f, image=x)),
    "text": (lambda f: f.text, lambda f, x: dataclasses.replace(f, text=x)),
    "views": (lambda f: f.views.image, lambda f, x: dataclasses.replace(f, views=f.views._replace(image=x))),
    "negatives": (
        lambda f: f.negatives.image,
        lambda f, x: dataclasses.replace(f, negatives=f.negatives._replace(image=x)),
    ),
    "mixtures": (
        lambda f: f.mixtures.image,
        lambda f, x: dataclasses.replace(f, mixtures=f.mixtures._replace(image=x)),
    ),
    "apart": (lambda f: f.apart.image, lambda f, x: dataclasses.replace(f, apart=f.apart._replace(image=x))),
    "apart text": (lambda f: f.apart.text, lambda f, x: dataclasses.replace(f, apart=f.apart._replace(text=x))),
    "classes": (lambda f: f.classes, lambda f, x: dataclasses.replace(f, classes=x)),
}
USED = {
    "contrastive": {"image", "text"},
    "mse": {"image", "text"},
    "similarity": {"image", "text"},
    "zero-shot": {"image", "classes"},
    "consensus": {"image", "text"},
    "imitation": {"mixtures"},
    "noise": {"views", "text"},
    "esd": {"apart", "apart text"},
    "mmce": {"apart", "apart text"},
    "margin": {"image", "text", "negatives"},
    "energy": {"image", "text", "negatives"},
    "spectral": {"image", "text"},
    "tail": {"image"},
}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    term, seen = OBJECTIVES.get(name)(), everything(3)
    for what, (get, put) in LEARNED.items():
        x = get(seen).clone().requires_grad_()
        value = term(put(seen, x))
        if what not in USED[name]:
            assert not value.requires_grad, what
            continue
        assert torch.autograd.grad(value, x)[0].abs().max() > 1e-4, what
        assert torch.autograd.gradcheck(lambda y, put=put: term(put(seen, y)), x, eps=1e-6, atol=1e-7)


def calibrated(n: int, seed: int, gap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Confidences, and whether right, with accuracy `gap` below them."""
    draw = torch.Generator().manual_seed(seed)
    confidence = 0.3 + 0.6 * torch.rand(n, generator=draw, dtype=torch.float64)
    return confidence, (torch.rand(n, generator=draw) < confidence - gap).double()


@pytest.mark.parametrize("error", [esd, mmce])
def test_calibration_errors_are_0_on_average_where_calibrated_and_grow_with_the_gap(error: Callable) -> None:
    def mean(n: int, gap: float) -> tuple[float, float]:
        found = torch.stack([error(*calibrated(n, seed, gap)) for seed in range(400)])
        return float(found.mean()), float(found.std()) / 20

    for n in (16, 200):  # not biased by how few they are
        found, error_of_mean = mean(n, 0.0)
        assert abs(found) < 3.5 * error_of_mean
    small, large = mean(200, 0.1)[0], mean(200, 0.2)[0]
    assert 0.001 < small and 3 < large / small < 5  # a square


def test_esd_is_its_definition() -> None:
    confidence, right = calibrated(9, 1)
    total = 0.0
    for i in range(9):
        gaps = [float((right[j] - confidence[j]) * (confidence[j] <= confidence[i])) for j in range(9) if j != i]
        total += statistics.mean(gaps) ** 2 - statistics.variance(gaps) / 8
    assert esd(confidence, right).item() == pytest.approx(total / 9, rel=1e-12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert esd(confidence[order], right[order]).item() == pytest.approx(total / 9, rel=1e-9)
    assert esd(confidence[:2], right[:2]) == 0


def test_mmce_is_its_definition() -> None:
    confidence, right = calibrated(9, 1)
    c, a = confidence.tolist(), right.tolist()
    total = sum(
        (a[i] - c[i]) * (a[j] - c[j]) * math.exp(-abs(c[i] - c[j]) / 0.4) for i in range(9) for j in range(9) if i != j
    )
    assert mmce(confidence, right).item() == pytest.approx(total / 72, rel=1e-12)


def test_the_same_caption_of_another_pair_is_no_wrong_answer() -> None:
    text = unit(3, 8, seed=1)[[0, 1, 1]]
    confidence, right = answers(Apart(text, text, torch.tensor([0, 1, 1])), torch.tensor(5.0))
    assert right.tolist() == [1, 1, 1]
    wanted = (5 * text[1] @ text[:2].T).softmax(-1)[1]
    assert confidence[1].item() == pytest.approx(wanted.item()) == confidence[2].item()


@pytest.mark.parametrize("name", ["margin", "energy"])
def test_a_margin_that_is_kept_costs_nothing_and_one_that_is_not_its_square(name: str) -> None:
    term, text = OBJECTIVES.get(name)(), torch.eye(WIDTH, dtype=torch.float64)
    scale = torch.tensor(9.0, dtype=torch.float64)
    none = torch.full((4, WIDTH), -(WIDTH**-0.5), dtype=torch.float64)  # like no caption, and like all alike
    half = F.normalize(text + text.roll(1, 0) * 0.8, dim=-1)  # what the float model makes of pairs
    own = Negatives(none, F.normalize(none + 0.3 * text[:4], dim=-1))
    seen = Features(text, text, scale, half, text, scale, torch.arange(WIDTH), negatives=own)
    assert term(seen) == 0
    off = dataclasses.replace(seen, negatives=own._replace(image=text[:4]))  # negatives that are known
    most = term.score(scale * own.teacher @ text.T).quantile(0.1)
    wanted = (term.score(scale * text[:4] @ text.T) - most).square().mean()
    assert term(off).item() == pytest.approx(wanted.item()) and wanted > 0.05
    off = dataclasses.replace(seen, image=none[:1].expand(WIDTH, -1))  # pairs that are not
    least = term.score(scale * half @ text.T).quantile(0.5)
    wanted = (least - term.score(scale * none[:1] @ text.T)).square()
    assert term(off).item() == pytest.approx(wanted.item()) and wanted > 0.05


def test_what_sees_through_an_alteration_pays_nothing() -> None:
    seen = everything()
    same = dataclasses.replace(
        seen, text=seen.teacher_text, scale=seen.teacher_scale, views=Views(seen.views.teacher, seen.views.teacher)
    )
    term = OBJECTIVES.get("noise")()
    assert abs(term(same).item()) < 1e-12 < 0.1 < term(seen).item()


def test_spectral_weighs_directions_and_tail_is_the_share_of_the_last() -> None:
    seen = everything()
    vectors = seen.basis.vectors
    for k, weight in ((0, 1.0), (2, 1.0), (3, 0.3), (5, 0.3)):  # half of 6 are held
        moved = dataclasses.replace(seen, image=seen.teacher_image + 0.1 * vectors[:, k], text=seen.teacher_text)
        assert OBJECTIVES.get("spectral")()(moved).item() == pytest.approx(weight * 0.01 / 2)
    ahead = seen.basis.mean + torch.randn(5, 3, dtype=torch.float64) @ vectors[:, :3].T
    assert OBJECTIVES.get("tail")()(dataclasses.replace(seen, image=ahead)).item() == pytest.approx(0, abs=1e-12)
    both = dataclasses.replace(seen, image=seen.basis.mean + torch.stack([3 * vectors[:, 0], 4 * vectors[:, 5]]))
    assert OBJECTIVES.get("tail")()(both).item() == pytest.approx(16 / 25)


def test_consensus_is_a_distance_as_mse_is() -> None:
    seen = everything()
    other = dataclasses.replace(seen, teacher_image=seen.consensus)
    assert OBJECTIVES.get("consensus")()(seen) == OBJECTIVES.get("mse")()(other) != OBJECTIVES.get("mse")()(seen)


def test_held_out_pairs_are_judged_by_what_they_can_be() -> None:
    judge = Objective("contrastive+3*noise+2.5*mse+esd").of_pairs()
    assert judge is not None and [(w, t.name) for w, t in judge.terms] == [(1.0, "contrastive"), (2.5, "mse")]
    assert Objective("noise+margin").of_pairs() is None


def test_a_term_that_needs_what_there_is_not_is_refused() -> None:
    class Odd:
        name, needs = "odd", frozenset({"labels"})

        def __call__(self, features: Features) -> Tensor:
            return features.image.sum()

    OBJECTIVES.register(Odd)
    try:
        with pytest.raises(InputError, match="objective 'mse\\+odd' needs 'labels', and there is only pairs, classes"):
            Objective("mse+odd")
    finally:
        OBJECTIVES.unregister("odd")
