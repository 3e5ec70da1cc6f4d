"""q, k and v as one product where a weight is one row behind the other: the same numbers, and parts that stay parts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qclip
from qclip.layers import QuantizedAttention, QuantizedSite
from qclip.layers.linear import products
from qkernels import Int8Weight, dispatch
from qkernels.weights import lay_side_by_side, side_by_side
from tests.small import IMAGES, small_clip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op was selected."""
    found: Counter[str] = Counter()
    select = dispatch.select

    def counted(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        found[op] += 1
        return select(op, *args, **kwargs)

    monkeypatch.setattr(dispatch, "select", counted)
    monkeypatch.setenv("QKERNELS_BACKEND", "reference")
    return found


def rows(model: nn.Module) -> None:
    """The layouts of a GPU, which the reference reads, too."""
    for module in model.modules():
        if isinstance(module, QuantizedSite):
            weight = module.quantized.canonical()
            module._hold(weight.pack("rows16" if isinstance(weight, Int8Weight) else "halves128"))


def attentions(model: nn.Module) -> list[QuantizedAttention]:
    return [module for module in model.modules() if isinstance(module, QuantizedAttention)]


def image(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.encode_image(IMAGES[:2])  # type: ignore[operator]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w8a8-static"])
def test_one_product_gives_what_three_gave(recipe: str, calls: Counter[str]) -> None:
    calibration = IMAGES[2:] if "static" in recipe else None
    model = qclip.quantize(small_clip(), recipe, calibration=calibration)
    rows(model)
    op = "int8_linear" if recipe.startswith("w8") else "int4_linear"
    calls.clear()
    want, state = image(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    three = calls[op]
    for core in attentions(model):
        core.join()
    calls.clear()
    assert torch.equal(image(model), want)
    assert calls[op] == three - 2 * 2  # two blocks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    again = copy.deepcopy(model)  # torch copies a parameter into memory of its own, so that the parts lie apart
    assert torch.equal(image(again), want)
    for core in attentions(again):
        core.join()
    calls.clear()
    assert torch.equal(image(again), want) and calls[op] == three - 2 * 2


def test_a_part_that_was_replaced_counts(calls: Counter[str]) -> None:
    """Nothing is remembered that could be stale: where the parts lie elsewhere, each is multiplied by itself."""
    model = qclip.quantize(small_clip(), "w8a8")
    rows(model)
    core = attentions(model)[0]
    core.join()
    codes = torch.randint(-127, 128, (3, core.q.shape[1]), dtype=torch.int8)  # type: ignore[union-attr, index]
    scale = torch.rand(3)
    sites: Any = (core.q, core.k, core.v)
    before = products(sites, codes, scale)
    sites[1].scales = sites[1].scales * 2
    calls.clear()
    after = products(sites, codes, scale)
    assert calls["int8_linear"] == 3
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


def test_what_differs_is_not_joined() -> None:
    model = qclip.quantize(small_clip(), "w8a8")
    rows(model)
    core = attentions(model)[0]
    core.k.bias = None  # type: ignore[union-attr]
    core.join()
    assert side_by_side([core.q.codes, core.k.codes, core.v.codes]) is None  # type: ignore[union-attr, list-item]


def test_side_by_side() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.arange(9.0).view(3, 3)
    assert side_by_side([a, b]) is None
    x, y = lay_side_by_side([a, b])
    whole = side_by_side([x, y])
    assert whole is not None and torch.equal(whole, torch.cat([a, b]))
    assert side_by_side([y, x]) is None and side_by_side([x, x]) is None
    assert side_by_side([x, y.to(torch.float64)]) is None and side_by_side([x[:1], y]) is None
    assert torch.equal(whole[2:], y) and whole.data_ptr() == x.data_ptr()
