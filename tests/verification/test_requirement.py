"""How requirements are read."""

from __future__ import annotations

import pytest

from qclip.errors import InputError
from qclip.verification import Requirement, requirements


@pytest.mark.parametrize(
    ("text", "bound", "difference"),
    [
        ("top1>=-0.5", -0.005, True),
        ("top1 >= +1", 0.01, True),
        ("top1>=0.6", 0.6, False),
        ("top1>=60%", 0.6, False),
        ("ece<=+1pp", 0.01, True),
        ("nll<=+0.02", 0.02, True),
        ("nll<=2", 2.0, False),
        ("cosine_mean>=.99", 0.99, False),
    ],
)
def test_bounds_are_in_the_metric_s_unit(text: str, bound: float, difference: bool) -> None:
    (found,) = requirements(text)
    assert found.bound == pytest.approx(bound) and found.difference is difference and found.text == text


def test_all_parts_are_read() -> None:
    assert requirements("index_recall@10>=0.98, auroc(energy)>=-1,, ece <= +2") == [
        Requirement("index_recall@10>=0.98", "index_recall", 10, "", True, 0.98, False),
        Requirement("auroc(energy)>=-1", "auroc", None, "energy", True, -0.01, True),
        Requirement("ece <= +2", "ece", None, "", False, 0.02, True),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing is required"),
        (" , ", "nothing is required"),
        ("top1", "cannot be read"),
        ("top1>=", "cannot be read"),
        ("top1>=nan", "cannot be read"),
        ("top1>=inf", "cannot be read"),
        ("top1>=1e400", "cannot be read"),
        ("top1=1", "cannot be read"),
        ("top1>=--1", "cannot be read"),
        ("top1>=" + 400 * "9", "no finite bound"),
        ("top9>=1", "no metric 'top9'; did you mean 'top"),
        ("ece>=+1", "better when lower; require it by <="),
        ("top1<=-1", "better when higher; require it by >="),
        ("index_recall>=0.9", "index_recall@10"),
        ("top1@5>=0.9", "has no @5"),
        ("index_recall@10>=-1", "without a sign"),
        ("agreement>=+1", "without a sign"),
        ("top1>=60", "write 60%"),
        ("nll<=5%", "is no share"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=".*") as error:
        requirements(text)
    assert said in str(error.value)


def test_the_bad_end_of_the_interval_decides() -> None:
    (least,) = requirements("top1>=-0.5")
    assert least.holds(0.0, -0.005, 0.01) and not least.holds(0.0, -0.0051, 0.01) and least.holds(0.0, None, None)
    (most,) = requirements("ece<=+1")
    assert most.holds(0.0, -0.1, 0.01) and not most.holds(0.0, -0.1, 0.0101)
