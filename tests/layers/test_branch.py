"""The float branch of a site: the product is that of codes and branch, in every kind of layer, core and file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qclip
from qclip import models, ptq, rewrite
from qclip.errors import ArtifactError
from qclip.layers import (
    Branch,
    Int4Linear,
    Int8Linear,
    QuantizedSite,
    RandomHadamard,
    Scale,
    SimulatedLinear,
    from_facts,
)
from qclip.layers.transforms import folded
from qclip.models import encoders
from qclip.recipes import METHODS, Recipe, Treatment, step
from qkernels import Int4Weight, Int8Weight
from tests.small import IMAGES, small_clip

N, K, RANK = 40, 96, 5


def parts() -> tuple[Tensor, Tensor, Tensor, list, Branch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, K, generator=generator)
    w, bias = torch.randn(N, K, generator=generator) / 10, torch.randn(N, generator=generator)
    signs = torch.randint(0, 2, RandomHadamard.shape(K), generator=generator, dtype=torch.int8) * 2 - 1
    transforms = [RandomHadamard(signs), Scale(torch.rand(K, generator=generator) + 0.5)]
    branch = Branch(torch.randn(RANK, K, generator=generator), torch.randn(N, RANK, generator=generator) / 20)
    return x, w, bias, transforms, branch


def layer(kind: str) -> tuple[QuantizedSite, Tensor, Tensor]:
    x, w, bias, transforms, branch = parts()
    left = folded(w, None, transforms)[0] - branch.weight()
    settings = {"transforms": transforms, "branch": branch}
    made = {
        "int8": lambda: Int8Linear(Int8Weight.quantize(left), bias, **settings),
        "int8 static": lambda: Int8Linear(
            Int8Weight.quantize(left), bias, **settings, input_scale=torch.tensor(0.05), input_zero=torch.tensor(3)
        ),
        "int4": lambda: Int4Linear(Int4Weight.quantize(left, 32), bias, **settings),
        "int4 float": lambda: Int4Linear(Int4Weight.quantize(left, 32), bias, **settings, float_input=True),
        "simulated": lambda: SimulatedLinear(Int8Weight.quantize(left), bias, **settings, activation_bits=8),
    }[kind]()
    made.pack()
    return made, x, F.linear(x, w, bias)


KINDS = ["int8", "int8 static", "int4", "int4 float", "simulated"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_branch_make_the_float_product(kind: str) -> None:
    made, x, want = layer(kind)
    close = 0.2 if "int4" in kind else 0.03
    for found in (made(x), made.dequantized()(x)):
        assert (found - want).norm() < close * want.norm()
    lacking, made.branch = made.branch, None
    assert (made(x) - want).norm() > 3 * close * want.norm()  # it carries its part
    made.branch = lacking
    # Of a float input, and to the numbers of the simulated layer.
    simulated = SimulatedLinear(
        made.quantized.canonical(),
        made.bias,
        made.transforms,
        made.input_scale,
        made.input_zero,
        branch=made.branch,
        activation_bits=None if kind == "int4 float" else 8,
    )
    assert (made(x) - simulated(x)).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_described_and_counted(kind: str) -> None:
    made, x, _ = layer(kind)
    facts = made.facts()
    assert facts["branch"] == RANK
    empty = from_facts(facts)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in made.state_dict().items()}
    with_it, made.branch = made.stored_bits, None
    assert with_it - made.stored_bits == 16 * RANK * (N + K) and "branch" not in made.facts()
    del facts["branch"]  # of before there were any
    assert from_facts(facts).branch is None
    for odd in (0, -1, "5", True, 1.5):
        with pytest.raises(ArtifactError, match="branch"):
            qclip.untrusted.schema.validate(type(made).schema(), facts | {"branch": odd}, "layer", ArtifactError)


def test_half_keeps_its_numbers_and_bad_ones_are_refused() -> None:
    made, x, want = layer("int8")
    before = made.branch.down.clone()
    made.bfloat16()
    assert torch.equal(made.branch.down, before) and made.branch.down.dtype == torch.float16
    assert made(x.bfloat16()).dtype == torch.bfloat16
    tiny = Branch(torch.randn(2, 8) * 1e-9, torch.randn(4, 2) * 1e6)  # scaled alike before float16 holds them
    assert tiny.down.abs().max() > 1e-3 and tiny.weight().isfinite().all()
    for down, up in ((torch.zeros(2, 8), torch.ones(4, 2)), (torch.ones(2, 8), torch.zeros(4, 2))):
        assert not Branch(down, up).weight().any()  # a weight of zeros has such singular vectors
    for down, up in ((torch.randn(2, 8), torch.randn(4, 3)), (torch.randn(0, 8), torch.randn(4, 0))):
        with pytest.raises(ValueError, match="a branch is"):
            Branch(down, up)
    with pytest.raises(ValueError, match="float16"):
        Branch(torch.full((1, 8), 1e30), torch.full((4, 1), 1e30))
    with pytest.raises(ArtifactError, match="NaN"):
        tiny.check_tensor("down", torch.full((2, 8), float("nan")), "x")


class Halves(ptq.Method):
    """Rank 4 of every weight into a branch."""

    name = "halves"
    decides = frozenset({"weight"})

    def prepare(self, context: ptq.Context) -> None:
        for state in context.states.values():
            if state.site.kind not in ("embedding", "patch"):
                u, s, v = torch.linalg.svd(state.folded()[0], full_matrices=False)
                state.branch = Branch(v[:4], u[:, :4] * s[:4])


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 16), (4, 4)])
def test_whole_towers_compute_with_it(bits: tuple[int, int], tmp_path) -> None:
    """Fused cores hand it floats, an artifact keeps it bit for bit, recorded programs replay it, and it comes out."""
    METHODS.register(Halves)
    try:
        mine = Recipe("mine", Treatment(*bits, 32 if bits[0] == 4 else None), steps=(step("halves"),))
        coded = qclip.quantize(small_clip(), mine)
        with torch.no_grad():
            embed = lambda model: encoders(model).encode_image(IMAGES)  # noqa: E731
            want, first = embed(small_clip()), embed(coded)
            assert torch.cosine_similarity(first, want).min() > (0.98 if bits[1] > 4 else 0.8)
            for _ in range(3):
                assert torch.allclose(embed(coded), first, atol=1e-6)
            again = qclip.load(qclip.save(coded, tmp_path / "a"))
            assert torch.equal(embed(again), first)
            branches = [
                m for t in models.towers(again).values() for s in t for m in s.module.modules() if isinstance(m, Branch)
            ]
            assert len(branches) == 2 * 12 + 2 and {branch.rank for branch in branches} == {4}
            out = rewrite.dequantize_(again)
            assert torch.cosine_similarity(embed(out), first).min() > (0.999 if bits[1] > 4 else 0.8)
    finally:
        METHODS.unregister("halves")


def test_codes_are_of_what_the_branch_leaves() -> None:
    source = nn.Linear(64, 48)
    site = models.Site("vision.x", "fc1", "norm", "vision.x.in", nn.Module())
    u, s, v = torch.linalg.svd(source.weight.detach(), full_matrices=False)
    whole = ptq.SiteState(site, source, Treatment(2, 8), branch=Branch(v, u * s))
    assert (ptq.build(whole).dequantized_weight() - source.weight).abs().max() < 1e-3  # of full rank: nothing is left
