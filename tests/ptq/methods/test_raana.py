"""RaanA: what it promises of widths and errors, and that kernels, artifacts and explicit form hold its codes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import qclip
from qclip import calibration, models, ptq
from qclip.errors import DataError, NonFiniteError, RecipeError
from qclip.layers import Int4Linear, Int8Linear, QuantizedSite, RandomHadamard, Scale, SimulatedLinear
from qclip.layers.transforms import unfolded
from qclip.models import encoders, explicit_form
from qclip.ptq import rabitq
from qclip.ptq.methods.raana import Options, RaanA
from qclip.recipes import Recipe, Treatment, step
from qclip.rewrite import dequantize_, quantization
from tests.small import IMAGES, small_clip


def layers(model: nn.Module) -> dict[str, QuantizedSite]:
    found = {s.name: getattr(s.module, "site", s.module) for t in models.towers(model).values() for s in t}
    return {name: module for name, module in found.items() if isinstance(module, QuantizedSite)}


def sites(model: nn.Module) -> dict[str, QuantizedSite]:
    """Those that RaanA codes."""
    return {name: layer for name, layer in layers(model).items() if not name.endswith(("patch", "embedding"))}


def embed(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return encoders(model).encode_image(IMAGES)


def recipe(weight_bits: int = 3, activation_bits: int = 8, **options: object) -> Recipe:
    return Recipe("mine", Treatment(weight_bits, activation_bits), steps=(step("raana", **options),))


@pytest.fixture(scope="module")
def coded() -> nn.Module:
    return qclip.quantize(small_clip(), "w3.3a8-raana", IMAGES)


def test_widths_average_what_the_name_says(coded: nn.Module) -> None:
    told = quantization(coded).provenance["raana"]
    for tower in ("vision", "text"):
        of = {name: layer for name, layer in sites(coded).items() if name.startswith(tower)}
        sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in of.items()}
        average = sum(of[name].grid.bits * size for name, size in sizes.items()) / sum(sizes.values())
        assert 3.2 < average <= 3.3 and average == pytest.approx(told[tower]["code_bits"])
        assert told[tower]["widths"] == {name: layer.grid.bits for name, layer in of.items()}
        stored = sum(layer.stored_bits for layer in of.values()) / sum(sizes.values())
        assert stored == pytest.approx(told[tower]["stored_bits"]) and stored > average
        assert told[tower]["weight_error"] == pytest.approx(told[tower]["expected_weight_error"], rel=0.15)
        assert len(set(told[tower]["widths"].values())) > 1
    coverage = qclip.coverage(coded)
    total = sum(layer.stored_bits for layer in sites(coded).values())
    assert coverage.bits_per_weight == pytest.approx(
        total / sum(a * b for a, b in (x.shape for x in sites(coded).values()))
    )


def test_one_rotation_for_every_input(coded: nn.Module) -> None:
    found = sites(coded)
    q, k, v, out = (found[f"vision.blocks.0.attn.{name}"] for name in ("q", "k", "v", "out"))
    assert q.transforms[0] is k.transforms[0] is v.transforms[0]
    assert q.same_input(k) and q.same_input(v) and not q.transforms[0].same(out.transforms[0])
    assert not q.transforms[0].same(found["vision.blocks.1.attn.q"].transforms[0])
    other = qclip.quantize(small_clip(), "w3.3a8-raana", IMAGES, seed=1)
    assert not sites(other)["vision.blocks.0.attn.q"].transforms[0].same(q.transforms[0])


def test_errors_of_layers_are_those_of_their_widths_whatever_the_weight_is() -> None:
    """One weight has outliers, one is constant: rotated, both err as the table says."""
    model = small_clip()
    with torch.no_grad():
        mlp = model.visual.transformer.resblocks[0].mlp
        mlp.c_fc.weight[:, ::9] *= 30
        mlp.c_proj.weight.fill_(0.3)
    with explicit_form(model) as towers:
        before = {s.name: t.weight(s).clone() for t in towers.values() for s in t}
    coded = qclip.quantize(model, recipe(widths=[3]), IMAGES)
    for name, layer in sites(coded).items():
        error = (layer.dequantized_weight() - before[name]).square().sum() / before[name].square().sum()
        assert 0.5 < float(error) / rabitq.relative_error(3) < 1.3, name


def test_allocated_widths_are_nearer_than_equal_ones() -> None:
    """Of a model whose second block hardly matters."""
    model = small_clip()
    with torch.no_grad():
        block = model.visual.transformer.resblocks[1]
        for weight in (block.attn.out_proj.weight, block.mlp.c_proj.weight):
            weight *= 1e-3
    want = embed(model)

    def error(**options: object) -> float:
        found = embed(qclip.quantize(model, recipe(**options), IMAGES))
        return float((1 - torch.cosine_similarity(found, want)).mean())

    equal = error(widths=[3])
    for damage in ("variance", "bound", "authors"):
        assert error(damage=damage) < equal, damage
    widths = quantization(qclip.quantize(model, recipe(), IMAGES)).provenance["raana"]["vision"]["widths"]
    assert all(
        widths[f"vision.blocks.0.{s}"] > widths[f"vision.blocks.1.{s}"] for s in ("attn.v", "mlp.fc1", "mlp.fc2")
    )


def test_gradients_are_not_those_of_the_float_output_with_itself() -> None:
    """They are the Jacobian's: for a linear tower's last site, J^T r is known."""
    model, seen, again = small_clip(), {}, {}

    def into(found: dict) -> calibration.SeeGradient:
        return lambda s, x, g, _: found.setdefault(s.name, []).append((x, g))

    with explicit_form(model) as towers:
        tower, data = towers["vision"], calibration.Samples(IMAGES, None, {})
        (last,) = (site for site in tower if site.kind == "projection")
        block = [site for site in tower if site.name == "vision.blocks.0.mlp.fc1"]
        calibration.gradients(encoders(model), data, "vision", [last, *block], into(seen))
        calibration.gradients(encoders(model), data, "vision", block, into(again))
        assert all(parameter.grad is None for parameter in model.parameters())
    gradient = torch.cat([g for _, g in seen["vision.projection"]])
    embedding = embed(model)
    # J of e / |e| is (1 - u uT) / |e|: orthogonal to the embedding, of expected squared length (E - 1) / |e|^2.
    assert ((gradient * embedding).sum(-1).abs() < 1e-4 * gradient.norm(dim=-1) * embedding.norm(dim=-1)).all()
    scaled = (gradient.norm(dim=-1) * embedding.norm(dim=-1)).square().mean()
    assert 30 < float(scaled) < 66  # chi squared of 47, mean of 6
    assert sum(len(x) for x, _ in seen["vision.projection"]) == 6
    for (_, one), (_, other) in zip(again[block[0].name], seen[block[0].name], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["w3a8-raana", "w2.3a8-static-raana", "w4a8-raana", "w3a8-smoothquant+raana"])
def test_kernels_give_the_simulated_numbers(name: str) -> None:
    coded = qclip.quantize(small_clip(), name, IMAGES)
    assert qclip.coverage(coded).share("simulated") == 0
    kinds = set()
    for layer in sites(coded).values():
        x = torch.randn(7, layer.shape[1])
        simulated = SimulatedLinear(
            layer.quantized.canonical(), layer.bias, layer.transforms, layer.input_scale, activation_bits=8
        )
        want = simulated(x)
        assert (layer(x) - want).norm() < 1e-4 * want.norm()
        kinds.add(type(layer))
    assert kinds <= {Int8Linear, Int4Linear}


def test_float_inputs_run_on_kernels_at_four_bits_and_are_simulated_else() -> None:
    coded = qclip.quantize(small_clip(), recipe(4, 16), IMAGES)
    states = {row.site: (row.state, row.weight_bits, row.activation_bits) for row in qclip.coverage(coded).rows}
    for name, layer in sites(coded).items():
        bits = layer.grid.bits
        assert states[name] == ("real" if bits == 4 else "simulated", bits, None)
        x = torch.randn(7, layer.shape[1])
        plain = layer.dequantized()
        assert (layer(x) - plain(x)).norm() < 1e-4 * plain(x).norm()


def test_artifacts_hold_it_bit_for_bit_and_it_comes_out_again(coded: nn.Module, tmp_path) -> None:
    again = qclip.load(qclip.save(coded, tmp_path / "a"))
    assert torch.equal(embed(again), embed(coded))
    assert all(isinstance(layer.transforms[0], RandomHadamard) for layer in sites(again).values())
    assert quantization(again).provenance["raana"] == quantization(coded).provenance["raana"]
    assert quantization(again).recipe.bits == "3.3/8" and quantization(again).recipe == Recipe.from_dict(
        json.loads(json.dumps(quantization(coded).recipe.to_dict()))
    )
    near = embed(again)
    out = dequantize_(again)
    assert (1 - torch.cosine_similarity(embed(out), near)).max() < 2e-3  # inputs are float now
    with explicit_form(coded) as towers:
        assert {site.name for tower in towers.values() for site in tower} >= set(sites(coded))


def test_exceptions_patches_and_lookups_keep_their_own() -> None:
    mine = dataclasses.replace(recipe(), exceptions=(("*.fc1", "w8a8"), ("text.*", "float")))
    coded = qclip.quantize(small_clip(), mine, IMAGES)
    found = layers(coded)
    assert {found[name].grid.kind for name in found if name.endswith("fc1")} == {"sym"}
    assert not found["vision.blocks.0.mlp.fc1"].transforms and not found["vision.patch"].transforms
    assert not any(name.startswith("text") for name in found)
    widths = quantization(coded).provenance["raana"]
    assert list(widths) == ["vision"] and not any(name.endswith("fc1") for name in widths["vision"]["widths"])


def test_dead_columns_rows_and_layers() -> None:
    """A row of zeros stays next to none, a site that nothing hangs on costs no bits, a constant input is no trouble."""
    model = small_clip()
    with torch.no_grad():
        block = model.visual.transformer.resblocks[0]
        block.mlp.c_fc.weight[3], block.mlp.c_fc.weight[:, 5] = 0, 0
        block.mlp.c_proj.weight.zero_()  # nothing hangs on fc1
        block.ln_2.weight.zero_()
    coded = qclip.quantize(model, recipe(), IMAGES)
    fc1, fc2 = (sites(coded)[f"vision.blocks.0.mlp.{name}"] for name in ("fc1", "fc2"))
    assert fc1.grid.bits == 1 and fc1.dequantized_weight()[3].abs().max() < 1e-3
    assert fc2.dequantized_weight().abs().max() < 1e-3
    assert embed(coded).isfinite().all()
    assert (1 - torch.cosine_similarity(embed(coded), embed(model))).max() < 0.05


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: step("raana", average=0.5), "an average of 0.5 bits cannot be met by widths from 1 to 7"),
        (lambda: step("raana", widths=[2, 3], average=4), "an average of 4 bits cannot be met by widths from 2 to 3"),
        (lambda: step("raana", widths=[0, 3]), "widths lie between 1 and 7 bits"),
        (lambda: step("raana", widths=[]), "widths lie between 1 and 7 bits"),
        (lambda: step("raana", scale="mse"), "'unbiased' or 'least-squares'"),
        (lambda: step("raana", samples=0), "samples must be 1 or more"),
        (lambda: qclip.recipes.get("w3.3a8"), "an average over sites.*raana"),
        (lambda: qclip.recipes.get("w3.3a8-smoothquant"), "an average over sites.*raana"),
        (lambda: qclip.recipes.get("w3.a8-raana"), "unknown recipe"),
        (lambda: qclip.quantize(small_clip(), "w8a8-raana", IMAGES), "'w8a8-raana'.*8 bits.*widths from 1 to 7"),
        (lambda: qclip.quantize(small_clip(), "w3a8-raana"), "needs data"),
        *[
            (
                lambda given=given: qclip.quantize(
                    small_clip(), Recipe("x", Treatment(3, 8, **given), steps=(step("raana"),)), IMAGES
                ),
                "raana decides grid and scales",
            )
            for given in ({"weight_grid": "sym"}, {"weight_scale": "tensor"}, {"weight_observer": "mse"})
        ],
        (
            lambda: qclip.quantize(
                small_clip(), dataclasses.replace(recipe(), exceptions=(("*", Treatment(8, 8)),)), IMAGES
            ),
            "raana has no site",
        ),
    ],
)
def test_refusals(make, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        make()


def test_a_tower_that_no_sample_reaches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_clip()
    monkeypatch.setattr(models.Encoders, "_tokenizer", lambda _: None)
    model.__dict__.pop("tokenizer", None)
    with pytest.raises(DataError, match="text.* saw nothing during calibration.*tokenizer"):
        qclip.quantize(model, recipe(), IMAGES)


@pytest.mark.parametrize("damage", ["variance", "bound", "authors"])
def test_what_a_site_is_worth_is_the_formula(damage: str) -> None:
    """docs/methods.md, RaanA, from inputs and gradients of each image by itself."""
    model, method = small_clip(), RaanA(Options(damage=damage, samples=2))
    mine = dataclasses.replace(recipe(), towers=("vision",))
    data = calibration.Samples(IMAGES[:2], None, {})
    towers = models.towers(model)
    context = ptq.Context(model, mine, towers, encoders(model), data, ptq.states(mine, towers), {}, seed=3)
    states = [s for s in context.states.values() if s.site.kind != "patch"]
    scales = {s.site.shared: Scale(torch.rand(s.source.weight.shape[1]) + 0.5) for s in states}
    for state in states:  # of a step before
        state.transforms = [scales[state.site.shared]]
    method._rotate(context, states)
    found = method._importance(context, "vision", states)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(site, x, gradient, _):
        seen.setdefault(site.name, []).append((x, gradient))

    calibration.gradients(context.encoders, data, "vision", [s.site for s in states], see, 3)
    for state in states:
        w, calls = state.folded()[0], seen[state.site.name]
        images = [(i, g) for x, g in calls for i, g in zip(x, g, strict=True)]
        rows = [(state.input(x).reshape(-1, w.shape[1]), g.reshape(-1, len(w))) for x, g in images]
        size, tokens = w.norm() / w.shape[1] ** 0.5, len(rows[0][0])
        if damage == "variance":  # gradients of a call are added up: products of different images are 0 on average
            parts = [g.flatten(0, -2).T @ state.input(x).flatten(0, -2) for x, g in calls]
            want = sum((w.square().sum(1) * part.square().sum(1)).sum() for part in parts) / w.shape[1]
        elif damage == "bound":
            want = sum(g.norm() * x.norm() for x, g in rows) * size
        else:
            want = sum(g.norm() / (tokens * len(w)) ** 0.5 for _, g in rows)
            want = want * sum(x.norm() / tokens**0.5 for x, _ in rows) * size
        assert found[state.site.name] == pytest.approx(float(want), rel=1e-3), state.site.name


def test_variance_is_what_errors_of_random_direction_do_on_average() -> None:
    """Against the embedding's own Jacobian by a site's weight, for one image."""
    model, method = small_clip(), RaanA(Options(samples=1))
    mine = dataclasses.replace(recipe(), towers=("vision",))
    data = calibration.Samples(IMAGES[:1], None, {})
    towers = models.towers(model)
    context = ptq.Context(model, mine, towers, encoders(model), data, ptq.states(mine, towers), {})
    state = context.states["vision.blocks.1.mlp.fc1"]
    means = []
    for seed in range(30):
        context.seed = seed
        means.append(method._importance(context, "vision", [state])[state.site.name])

    module, (n, k) = state.source, state.source.weight.shape
    moved, draw = [], torch.Generator().manual_seed(0)
    with torch.no_grad():
        before, weight = torch.nn.functional.normalize(model.encode_image(IMAGES[:1])), module.weight.clone()
        for _ in range(60):
            error = torch.nn.functional.normalize(torch.randn(n, k, generator=draw)) * weight.norm(dim=1, keepdim=True)
            module.weight.copy_(weight + 1e-3 * error)
            after = torch.nn.functional.normalize(model.encode_image(IMAGES[:1]))
            moved.append(float((after - before).square().sum()) * 1e6)
        module.weight.copy_(weight)
    assert sum(means) / 30 == pytest.approx(sum(moved) / 60, rel=0.25)


def test_side_terms_are_what_they_say_and_codes_are_of_the_rest() -> None:
    model = small_clip()
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            block.mlp.c_fc.weight[:, [5, 40]] *= 15
            block.mlp.c_fc.weight += 0.1
    with explicit_form(model) as towers:
        before = {s.name: t.weight(s).clone() for t in towers.values() for s in t}
    mine = dataclasses.replace(recipe(widths=[3], centralize=True, held_out=2 / 64), towers=("vision",))
    plain = dataclasses.replace(recipe(widths=[3]), towers=("vision",))
    coded, bare = (sites(qclip.quantize(model, each, IMAGES)) for each in (mine, plain))
    for name, layer in coded.items():
        weight, k = before[name], before[name].shape[1]
        held = weight.square().sum(0).topk(int(2 / 64 * k)).indices
        want = weight.mean(0).expand_as(weight).clone()
        want[:, held] = weight[:, held]
        side = unfolded(layer.branch.weight(), None, layer.transforms)[0]
        assert (side - want).norm() < 2e-3 * want.norm() and layer.branch.rank == 1 + len(held)
        rest = (layer.dequantized_weight() - weight).square().sum() / (weight - want).square().sum()
        assert 0.5 < float(rest) / rabitq.relative_error(3) < 1.3, name
        x = torch.randn(5, k)
        assert (layer(x) - layer.dequantized()(x)).norm() < 0.05 * layer.dequantized()(x).norm()
    loud = "vision.blocks.0.mlp.fc1"
    off = [(each[loud].dequantized_weight() - before[loud]).norm() for each in (coded, bare)]
    assert off[0] < 0.5 * off[1] and set(held_columns(before[loud])) == {5, 40}


def held_columns(weight: Tensor) -> list[int]:
    return weight.square().sum(0).topk(2).indices.tolist()


def test_steps_before_it_do_not_put_sites_out() -> None:
    """Rotation gives sites of few bits another observer: they take part all the same."""
    coded = qclip.quantize(small_clip(), "w3a8-rotation+raana", IMAGES)
    assert all(layer.grid.kind == "midrise" for layer in sites(coded).values()) and len(sites(coded)) == 26


@pytest.mark.parametrize("rule", rabitq.SCALE_RULES)
def test_the_scale_rule_reaches_the_codes(rule: str) -> None:
    """Least squares shrinks the weight by the squared cosine, unbiased scales do not."""
    model = small_clip()
    with explicit_form(model) as towers:
        before = {s.name: t.weight(s).clone() for t in towers.values() for s in t}
    for name, layer in sites(qclip.quantize(model, recipe(2, widths=[2], scale=rule), IMAGES)).items():
        along = float((layer.dequantized_weight() * before[name]).sum() / before[name].square().sum())
        assert along == pytest.approx(1.0 if rule == "unbiased" else 1 - rabitq.SINE2[2], abs=0.02), name


def test_weights_too_large_for_their_squares_name_the_site() -> None:
    model = small_clip()
    with torch.no_grad():
        mlp = model.visual.transformer.resblocks[1].mlp
        mlp.c_fc.weight *= 1e25
        mlp.c_proj.weight *= 1e-25
    with pytest.raises(NonFiniteError, match=r"vision\.blocks\.1\.mlp\.fc1: .*too large for their squares"):
        qclip.quantize(model, recipe(), IMAGES)
