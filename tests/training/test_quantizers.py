"""Quantizers of training: the gradient of each against finite differences of its surrogate, in which what rounding does
is held as it is; and codes that mean what was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qclip import recipes
from qclip.errors import RecipeError
from qclip.layers.activations import quantize_dequantize
from qclip.recipes import QUANTIZERS, Treatment
from qclip.training import InputRounding, LearnedScale, Quantizer, WeightRounding
from qclip.training.quantizers.ste import DynamicInput
from qkernels.grids import Grid
from qkernels.weights import levels, quantize_weight

NAMES = sorted(name for name, kind in QUANTIZERS.items() if kind.rounds)
H = 1e-4


def made(name: str) -> Quantizer:
    kind = QUANTIZERS.get(name)
    return kind(kind.options())


def plan(name: str, bits: str) -> Treatment:
    return QUANTIZERS.get(name).treatment(Treatment.named(bits))


def weight_rounding(name: str, bits: str, weight: Tensor) -> WeightRounding:
    rounding = made(name).weight(weight, plan(name, bits))
    rounding.start(weight)
    return rounding


def input_rounding(name: str, bits: str) -> InputRounding:
    treatment = plan(name, bits)
    rounding = made(name).input(treatment, 64)
    if treatment.static:
        scale = torch.tensor(1.6 / 2 ** (treatment.activation_bits - 1))
        rounding.start(scale, torch.tensor(1) if treatment.activation_grid == "asym" else None)
    return rounding


def slope(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    return (function(at + H * along) - function(at - H * along)) / (2 * H)


def away(v: Tensor, low: float, high: float) -> Tensor:
    """Values in steps that lie so far from ties and bounds that no small change crosses one."""
    whole = v.floor() + 0.5 + (v - v.floor() - 0.5).clamp(-0.4, 0.4)
    tie = (whole - whole.round()).abs() > 0.42
    return torch.where(tie, whole.round() + 0.3, whole)


@pytest.mark.parametrize(
    ("bits", "grid"),  # midrise codes of 8 bits have no container
    [
        (2, "symfull"),
        (2, "sym"),
        (2, "midrise"),
        (4, "symfull"),
        (4, "sym"),
        (4, "midrise"),
        (8, "symfull"),
        (8, "sym"),
    ],
)
def test_lsq_learns_by_the_surrogate_of_a_weight(bits: int, grid: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 32, generator=generator).double()
    treatment = Treatment(bits, 8, weight_observer="mse", weight_grid=grid)
    rounding = made("lsq").weight(weight.float(), treatment)
    rounding.start(weight.float())
    scales = rounding.scales(weight).detach().double()
    zero = float(Grid(bits, grid).zero or 0)  # type: ignore[arg-type]
    steps = away(weight / scales + zero, rounding.grid.low, rounding.grid.high) - zero
    weight = (steps * scales).float().requires_grad_()
    towards = torch.randn(6, 32, generator=generator)
    (rounding(weight) * towards).sum().backward()

    codes = (weight.detach().double() / scales + zero).clamp(rounding.grid.low, rounding.grid.high)
    residual = codes.round() - codes

    def surrogate(w: Tensor, log: Tensor) -> Tensor:
        s = rounding.learned.sign.double() * log.exp()
        v = (w / s + zero).clamp(rounding.grid.low, rounding.grid.high)
        return ((v + residual - zero) * s * towards).sum()

    log = rounding.learned.log.detach().double()
    along = torch.randn(weight.shape, generator=generator).double()
    assert weight.grad is not None and rounding.learned.log.grad is not None
    wanted = slope(lambda w: surrogate(w, log), weight.detach().double(), along)
    torch.testing.assert_close((weight.grad.double() * along).sum(), wanted, rtol=1e-3, atol=1e-3)
    if not rounding.as_half:  # rounding to float16 is passed straight through, and moves the scale
        for i in range(len(log)):
            one = torch.zeros_like(log)
            one[i] = 1
            wanted = slope(lambda t: surrogate(weight.detach().double(), t), log, one)
            found = rounding.learned.log.grad[i].double() / rounding.step
            torch.testing.assert_close(found.sum(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("bits", "grid", "group"), [(2, "symfull", None), (2, "midrise", None), (4, "symfull", 32), (8, "sym", None)]
)
def test_training_begins_with_codes_that_a_step_has_found(bits: int, grid: str, group: int | None) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 64, generator=generator)
    treatment = Treatment(bits, 8, group, weight_grid=grid)
    found = quantize_weight(weight + 0.3 * torch.randn(6, 64, generator=generator), treatment.grid)
    rounding = made("lsq").weight(weight, treatment)
    start = rounding.start_at(weight, found)
    torch.testing.assert_close(rounding(start).detach(), found.dequantize())
    assert torch.equal(levels(rounding.quantized(start), treatment.grid), levels(found, treatment.grid))
    center, near = found.dequantize(), quantize_weight(weight, treatment.grid, rounding.scales(weight)).dequantize()
    assert ((start - weight).abs() <= (center - weight).abs() + 1e-6).all()  # as near to the float weight as may be
    steps = rounding.scales(weight).abs().repeat_interleave(rounding.group, dim=1)
    inner = (near == center) & ((weight - center).abs() < 0.44 * steps)
    assert inner.any() and torch.allclose(start[inner], weight[inner], atol=1e-6)


def test_learned_scales_are_positive_whatever_the_optimizer_does() -> None:
    learned = LearnedScale(3)
    learned.start(torch.tensor([0.1, -0.2, 3.0]))
    with torch.no_grad():
        learned.log -= 50
    assert (learned().abs() > 0).all() and learned().sign().tolist() == [1, -1, 1]
    assert "100 times below" in learned.fault()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4", "w2a8", "w3a3"])
def test_codes_mean_what_was_trained(name: str, bits: str) -> None:
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.01, 2, 24)[:, None]
    try:
        rounding = weight_rounding(name, bits, weight)
    except RecipeError as why:
        assert bits == "w8a8" and "bits" in str(why), why
        return
    values = rounding(weight).detach()
    found = rounding.quantized(weight).dequantize()
    torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-6)
    assert len((values[3] / values[3].abs().max()).unique()) <= 2 ** plan(name, bits).weight_bits * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_inputs_of_a_layer_are_those_of_training(name: str, bits: str) -> None:
    """What the state says gives the numbers of the rounding, by the rules of layers."""
    from qclip.layers.activations import quantize_dequantize
    from qclip.layers.transforms import transformed

    try:
        rounding, treatment = input_rounding(name, bits), plan(name, bits)
    except RecipeError as why:
        assert bits == "w8a8" and "bits" in str(why), why
        return
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(2))
    state = type("State", (), {"transforms": [], "input_scale": None, "input_zero": None, "input_share": None})()
    state.site = type("Site", (), {"name": "x"})()
    rounding.decide(state, 64)
    seen = transformed(x, state.transforms)
    scale, zero = state.input_scale, state.input_zero
    grid, share = treatment.activation_grid, state.input_share or 1.0
    found = quantize_dequantize(seen, treatment.activation_bits, scale, zero, grid, share)
    back = x - seen  # what a shift takes away, the bias gives back
    torch.testing.assert_close(found + back, rounding(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_grid_whose_zero_is_found_is_not_learned() -> None:
    with pytest.raises(RecipeError, match="learns scales, not the zeros"):
        made("lsq").weight(torch.randn(4, 32), Treatment(4, 8, weight_grid="asym"))


def test_names_are_recipes_of_training() -> None:
    recipe = recipes.get("w4a4-rotation+lsq")
    assert recipe.trained is not None and recipe.trained[0] == "lsq"
    assert [name for name, _ in recipe.steps] == ["rotation"] and recipe.method == "rotation+lsq"
    assert recipes.Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.hash != recipes.get("w4a4-rotation").hash
    for last in ("ste", "lsq-authors", "dorefa", "ofq"):  # whose scales follow from the weights
        with pytest.raises(RecipeError, match=f"'gptq' finds codes, and training with '{last}' cannot begin with them"):
            recipes.get(f"w4a8-gptq+{last}")
    assert [name for name, _ in recipes.get("w4a4-rotation+gptq+lsq").steps] == ["rotation", "gptq"]
    with pytest.raises(RecipeError, match="unknown method 'lsqq'; did you mean .*'lsq'"):
        recipes.get("w4a8-lsqq")
    with pytest.raises(RecipeError, match="unknown method"):
        recipes.get("w4a8-lsq+rotation")


def surrogates(rounding: InputRounding, name: str) -> tuple[dict[str, Tensor], Callable[..., Tensor], float]:
    """Learned parameters of an input's rounding, what it gives when the residual of rounding is held, and the factor of
    their gradients."""
    low, high, zero = rounding.low, rounding.high, float(getattr(rounding, "zero", 0))

    def lsq(x: Tensor, residual: Tensor | None, log: Tensor) -> Tensor:
        v = (x / log.exp() + zero).clamp(low, high)
        return v if residual is None else (v + residual - zero) * log.exp()

    def plus(x: Tensor, residual: Tensor | None, log: Tensor, steps: Tensor) -> Tensor:
        offset = steps * rounding.unit.double()
        v = ((x - offset) / log.exp()).clamp(low, high)
        return v if residual is None else (v + residual) * log.exp() + offset

    def pact(x: Tensor, residual: Tensor | None, log: Tensor) -> Tensor:
        bound = (log.exp() * high).item() if residual is None else log.exp() * high
        y = torch.maximum(torch.minimum(x, torch.as_tensor(bound).double()), -torch.as_tensor(bound).double())
        return y / log.exp() if residual is None else y + residual * rounding.learned.log.detach().double().exp()

    def linear(x: Tensor, residual: Tensor | None, scale: Tensor) -> Tensor:
        v = (x / scale).clamp(low, high)
        return v if residual is None else (v + residual) * scale

    if name == "lsq-authors":
        return {"scale": rounding.scale}, linear, 1 / (5 * 64 * high) ** 0.5
    learned = {"learned.log": rounding.learned.log}
    if name == "lsq-plus":
        return learned | {"steps": rounding.steps}, plus, rounding.step
    return learned, pact if name == "pact" else lsq, rounding.step


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w4a3"])
@pytest.mark.parametrize("name", ["lsq", "lsq-plus", "pact", "lsq-authors"])
def test_inputs_learn_by_their_surrogates(name: str, bits: str) -> None:
    rounding, generator = input_rounding(name, bits), torch.Generator().manual_seed(4)
    parameters, surrogate, factor = surrogates(rounding, name)
    values = [p.detach().double() for p in parameters.values()]
    x = torch.randn(5, 64, generator=generator).double()
    step = (values[0] if name == "lsq-authors" else values[0].exp()).item()
    shift = values[1].item() * rounding.unit.item() if name == "lsq-plus" else 0.0
    x = (away((x - shift) / step, rounding.low, rounding.high) * step + shift).float().requires_grad_()
    towards = torch.randn(5, 64, generator=generator).double()
    (rounding(x) * towards).sum().backward()
    at = x.detach().double()
    codes = surrogate(at, None, *values)
    residual = codes.round() - codes
    given = surrogate(at, residual, *values)
    torch.testing.assert_close(given.float(), rounding(x).detach(), rtol=1e-4, atol=1e-5)

    along = torch.randn(5, 64, generator=generator).double()
    wanted = slope(lambda y: (surrogate(y, residual, *values) * towards).sum(), at, along)
    assert x.grad is not None
    torch.testing.assert_close((x.grad.double() * along).sum(), wanted, rtol=1e-3, atol=1e-3)
    for i, parameter in enumerate(parameters.values()):

        def moved(value: Tensor, i: int = i) -> Tensor:
            return (surrogate(at, residual, *values[:i], value, *values[i + 1 :]) * towards).sum()

        much = torch.tensor(step if name == "lsq-authors" else 1.0).double()  # of a scale itself, a relative change
        wanted = slope(moved, values[i], much)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double() * much / factor, wanted, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("grid", ["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_share_of_each_tokens_range_is_learned_by_its_surrogate(bits: int, grid: str) -> None:
    """The range of a token, and its zero point, are held."""
    treatment = dataclasses.replace(plan("lsq-token", f"w4a{bits}"), activation_grid=grid)
    generator = torch.Generator().manual_seed(bits)
    rounding = made("lsq-token").input(treatment, 64)
    x = torch.randn(5, 64, generator=generator) + 0.3
    x[2] = 0
    unit, zero = rounding.scales(x)
    ends = (x == x.amin(-1, keepdim=True)) | (x == x.amax(-1, keepdim=True))
    unit, zero = unit.double(), 0 if zero is None else zero.double()
    steps = rounding.share().detach().double() * unit
    inner = away(x.double() / steps + zero, rounding.low, rounding.high) - zero
    x = torch.where(ends, x, (inner * steps).float().clamp(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    towards = torch.randn(5, 64, generator=generator).double()
    x.requires_grad_()
    given = rounding(x)
    (given * towards).sum().backward()
    deployed = quantize_dequantize(x.detach(), bits, grid=grid, share=float(rounding.share()))
    torch.testing.assert_close(given.detach(), deployed, rtol=1e-5, atol=1e-6)
    at, log = x.detach().double(), rounding.learned.log.detach().double()
    codes = (at / steps + zero).clamp(rounding.low, rounding.high)
    residual, some = codes.round() - codes, at.abs().amax(-1) > 0

    def surrogate(log: Tensor) -> Tensor:
        scale = log.exp() * unit
        y = ((at / scale + zero).clamp(rounding.low, rounding.high) + residual - zero) * scale
        return (y * towards)[some].sum()

    assert rounding.learned.log.grad is not None and x.grad is not None
    wanted = slope(surrogate, log, torch.tensor(1.0).double())
    torch.testing.assert_close(rounding.learned.log.grad.double() / rounding.step, wanted, rtol=3e-3, atol=3e-3)
    inside = (at / steps + zero >= rounding.low) & (at / steps + zero <= rounding.high)
    assert torch.equal(x.grad != 0, inside) and not inside.all()  # a value that is clipped learns nothing
    with torch.no_grad():
        rounding.learned.log.fill_(1.0)
    assert float(rounding.share()) == 1.0


def test_the_first_share_is_the_best_for_normal_tokens() -> None:
    x = torch.randn(256, 192, generator=torch.Generator().manual_seed(1))
    for bits in (2, 4, 6):
        rounding = made("lsq-token").input(plan("lsq-token", f"w4a{bits}"), 64)
        assert rounding.plan.activation_grid == "asym"
        error = {
            share: float((quantize_dequantize(x, bits, grid="asym", share=share) - x).square().mean())
            for share in (float(rounding.share()), *(s / 10 for s in range(2, 11)))
        }
        assert min(error.values()) > 0.97 * error[float(rounding.share())]
    assert isinstance(made("lsq-token").input(plan("lsq-token", "w4a8"), 64), DynamicInput)  # which kernels run


def test_ewgs_scales_gradients_by_the_distance_to_the_code() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    options = QUANTIZERS.get("ewgs").options(delta=0.3)
    rounding = QUANTIZERS.get("ewgs")(options).weight(weight, Treatment(3, 8, weight_observer="mse"))
    rounding.start(weight)
    weight.requires_grad_()
    towards = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    (rounding(weight) * towards).sum().backward()
    v = (weight / rounding.scales(weight)).detach()
    inside = (v >= rounding.grid.low) & (v <= rounding.grid.high)
    wanted = towards * (1 + 0.3 * towards.sign() * (v - v.round()) / (rounding.grid.high - rounding.grid.low))
    torch.testing.assert_close(weight.grad, torch.where(inside, wanted, 0.0), rtol=1e-4, atol=1e-5)


def test_dorefa_differentiates_tanh_and_its_maximum() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = (torch.randn(4, 32, generator=generator) * 0.5).requires_grad_()
    rounding = made("dorefa").weight(weight, plan("dorefa", "w3a8"))
    towards, along = (torch.randn(4, 32, generator=generator).double() for _ in range(2))
    values = rounding(weight)
    (values * towards).sum().backward()
    factor = (rounding.scales(weight.detach()) * rounding.grid.high / 2).double()

    def levels(w: Tensor) -> Tensor:
        bent = w.tanh()
        return bent / bent.abs().amax(1, keepdim=True)

    residual = values.detach().double() / factor - levels(weight.detach().double())
    wanted = slope(lambda w: ((levels(w) + residual) * factor * towards).sum(), weight.detach().double(), along)
    torch.testing.assert_close((weight.grad.double() * along).sum(), wanted, rtol=1e-3, atol=1e-3)


def test_a_weight_that_hops_is_frozen_and_others_are_drawn_to_their_codes() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
    options = QUANTIZERS.get("ofq").options(momentum=0.2, threshold=0.3, last_threshold=0.3)
    rounding = QUANTIZERS.get("ofq")(options).weight(weight, plan("ofq", "w2a8"))
    edge = weight.clone()
    for done in (0.2, 0.5):  # in the first quarter hops are counted, and nothing is frozen
        rounding.start(weight)
        assert not rounding.frozen.any() and not rounding.hops.any()
        middle = rounding.scales(weight)[0, 0]  # between the codes 2 and 3 lies one step
        for i in range(12):
            edge[0, 0] = middle * (1.2 if i % 2 else 0.8)
            rounding.after(edge, done)
        assert rounding.frozen.any() == (done == 0.5)
        assert done == 0.5 or rounding.hops[0, 0] > 0.3
    assert rounding.frozen[0, 0] == 1 and rounding.frozen.sum() <= 3  # the scale moves a little with it
    held = rounding(edge)[0, 0]
    edge[0, 0] = middle * (0.8 if rounding.codes[0, 0] == 3 else 1.2)
    learned = edge.clone().requires_grad_()
    assert rounding(learned)[0, 0].item() == pytest.approx(float(held), rel=0.1)
    rounding(learned).sum().backward()
    assert learned.grad[0, 0] == 0 and (learned.grad != 0).sum() == (rounding.frozen == 0).sum()
    assert rounding.penalty(edge, 0.1) is None
    pulled = rounding.penalty(learned.detach().requires_grad_(), 1.0)
    wanted = 0.1 * (rounding(edge) - edge.clamp(-2 * rounding.scales(edge), 2 * rounding.scales(edge))).square().sum()
    assert float(pulled.detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_weights_of_one_code_are_drawn_together() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(10)).requires_grad_()
    rounding = weight_rounding("variation", "w2a8", weight.detach())
    penalty = rounding.penalty(weight, 1.0)
    penalty.backward()
    with torch.no_grad():
        codes, steps = rounding(weight) / rounding.scales(weight), weight / rounding.scales(weight)
        total = 0.0
        for row, values in zip(codes.round(), steps, strict=True):
            for code in row.unique():
                of = values[row == code]
                total += float((of - of.mean()).square().sum())
    assert float(penalty.detach()) == pytest.approx(0.01 * total / weight.numel(), rel=1e-4)
    assert (weight.grad != 0).all()


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_ewgs_scales_gradients_of_inputs_too(bits: str) -> None:
    treatment = plan("ewgs", bits)
    rounding = QUANTIZERS.get("ewgs")(QUANTIZERS.get("ewgs").options(delta=0.4)).input(treatment, 64)
    zero = torch.tensor(1) if treatment.activation_grid == "asym" else None
    rounding.start(torch.tensor(0.9 / 2 ** (treatment.activation_bits - 1)), zero)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    towards = torch.randn(5, 64, generator=torch.Generator().manual_seed(6))
    (rounding(x) * towards).sum().backward()
    v = (x / rounding.learned() + rounding.zero).detach()
    inside = (v >= rounding.low) & (v <= rounding.high)
    wanted = towards * (1 + 0.4 * towards.sign() * (v - v.round()) / (rounding.high - rounding.low))
    assert x.grad is not None and inside.any() and not inside.all()
    torch.testing.assert_close(x.grad, torch.where(inside, wanted, 0.0), rtol=1e-4, atol=1e-5)


def test_steps_of_scales_are_those_of_one_sample() -> None:
    """g = 1/sqrt(N Qp): N the group of a weight, or the values of one sample; of `variation` |w|_1 in its place."""
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    for treatment, wanted in (
        (Treatment(4, 8, group=64, weight_grid="symfull"), 1 / (64 * 7) ** 0.5),
        (Treatment(8, 8), 1 / (128 * 127) ** 0.5),
    ):
        assert made("lsq").weight(weight, treatment).step == pytest.approx(wanted)  # type: ignore[attr-defined]
    assert made("lsq").input(plan("lsq", "w8a8"), 640).step == pytest.approx(1 / (640 * 127) ** 0.5)  # type: ignore[attr-defined]
    step = made("variation").weight(weight, Treatment(8, 8)).step  # type: ignore[attr-defined]
    assert step == pytest.approx(1 / (float(weight.abs().sum()) * 127) ** 0.5)


def test_the_authors_step_is_divided_by_the_whole_batch() -> None:
    """g = 1/sqrt(numel Qp), the batch in numel; a scale that has no gradient any more is named."""
    rounding = input_rounding("lsq-authors", "w8a8")
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for each in (x, torch.cat([x, x])):
        rounding.scale.grad = None
        rounding(each).sum().backward()
        found.append(float(rounding.scale.grad))
    assert found[1] == pytest.approx(2 * found[0] / 2**0.5, rel=1e-4)
    assert rounding.fault() == ""
    with torch.no_grad():
        rounding.scale.fill_(-1.0)
    assert "fallen to 1e-08, where it has no gradient" in rounding.fault()
