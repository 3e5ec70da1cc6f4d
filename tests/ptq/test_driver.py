"""The driver: inputs go from block to block, in linear time, for every family; what a block run tells is true."""

import copy
import dataclasses
from collections import Counter
from typing import ClassVar

import open_clip
import pytest
import torch
from torch import nn

import qclip
from qclip import calibration, models, ptq, recipes, rewrite
from qclip.errors import RecipeError
from qclip.layers import Int8Linear, QuantizedSite
from qclip.models.tower import Attention, Mlp
from qclip.ptq.blocks import first, walk
from qclip.recipes import METHODS, Recipe, Treatment, step
from qkernels import Int8Weight
from tests.models import architectures
from tests.small import IMAGES, small_clip


def family(name: str) -> nn.Module:
    make = architectures.OPEN_CLIP.get(name)
    if make is None:
        proj, width = ("none", 10) if name.startswith("convnext") else ("linear", 24)
        make = lambda: architectures.with_trunk(architectures.TIMM[name](), proj, width)  # noqa: E731
    torch.manual_seed(0)
    return architectures.perturb(make())


def samples(model: nn.Module) -> calibration.Samples:
    lengths = (5, 9, 7, 5)
    return calibration.Samples(architectures.images(4), architectures.tokens(lengths=lengths), {})


def seen_in_one_pass(tower, encoders, data) -> dict[str, list]:
    """What every block is called with, by hooks while the tower runs as it is."""
    found: dict[str, list] = {}
    handles = [
        block.module.register_forward_pre_hook(
            lambda _, args, kwargs, name=block.name: found.setdefault(name, []).append((args, kwargs)),
            with_kwargs=True,
        )
        for block in tower.blocks
    ]
    with torch.no_grad():
        for batch in calibration.batches(encoders, data, tower.name):
            batch.run()
    for handle in handles:
        handle.remove()
    return found


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, atol=1e-5, rtol=1e-4)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return a == b


FAMILIES = [
    "clip",
    "own_attention_all_norms",
    "siglip_text",
    "coca",
    "coca_parallel_pools",
    "vit_siglip",
    "vit_other_pool",
    "convnext",
    "convnext_1x1",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_that_are_carried_are_those_of_one_pass(name: str) -> None:
    model = family(name)
    towers, encoders = models.towers(model), models.encoders(model)
    data = samples(model)
    for tower in towers.values():
        want = seen_in_one_pass(tower, encoders, data)
        calls: Counter = Counter()
        handles = [
            module.register_forward_hook(lambda m, *_, calls=calls: calls.update([id(m)]))
            for module in tower.module.modules()
            if isinstance(module, Attention | Mlp)
        ]
        found = {block.name: [(c.args, c.kwargs) for c in taken] for block, taken in walk(tower, encoders, data)}
        for handle in handles:
            handle.remove()
        assert list(found) == list(want) and len(found) == len(tower.blocks)
        for block, taken in found.items():
            assert alike(taken, want[block]), block
        # Each core computes once per batch, and once more for the sample that shows the order of the blocks.
        batches = len(want[tower.blocks[0].name])
        assert max(calls.values()) <= batches + 1
        assert not any("forward" in block.module.__dict__ for block in tower.blocks)


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision, text = (
        small | {"image_size": 32, "patch_size": 8},
        small | {"vocab_size": 100, "max_position_embeddings": 16},
    )
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(
            text_config=text | {"eos_token_id": 99}, vision_config=vision, projection_dim=20
        )
        return transformers.CLIPModel(config).eval()
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_hugging_face_blocks_are_carried(kind: str) -> None:
    model = hugging_face(kind)
    towers, encoders = models.towers(model), models.encoders(model)
    data = samples(model)
    for tower in towers.values():
        want = seen_in_one_pass(tower, encoders, data)
        found = {block.name: [(c.args, c.kwargs) for c in taken] for block, taken in walk(tower, encoders, data)}
        assert list(found) == list(want) == [block.name for block in tower.blocks]
        assert all(alike(found[name], want[name]) for name in want)


def by_name(self: nn.Module, x: torch.Tensor, attn_mask: object = None) -> torch.Tensor:
    """The transformer of a tower that calls its blocks with keywords, their input in any place."""
    for block in self.resblocks:
        x = block(attn_mask=attn_mask, q_x=x)
    return x


def test_blocks_that_are_called_with_keywords(monkeypatch) -> None:
    want = qclip.quantize(small_clip(), "w8a8-static-smoothquant", IMAGES)
    monkeypatch.setattr(open_clip.transformer.Transformer, "forward", by_name)
    model = small_clip()
    towers, encoders = models.towers(model), models.encoders(model)
    for tower in towers.values():
        data = calibration.Samples(IMAGES, model.tokenizer(["a dog", "two birds", "red"]), {})
        seen = seen_in_one_pass(tower, encoders, data)
        found = {block.name: [(c.args, c.kwargs) for c in taken] for block, taken in walk(tower, encoders, data)}
        assert list(found) == list(seen) == [block.name for block in tower.blocks]
        assert all(alike(found[name], seen[name]) for name in seen)
        assert {"q_x", "attn_mask"} == found["vision.blocks.1" if tower.name == "vision" else "text.blocks.1"][0][
            1
        ].keys()
    done = qclip.quantize(small_clip(), "w8a8-static-smoothquant", IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(done.state_dict().values(), want.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["clip", "siglip_text", "coca", "vit_siglip", "convnext"])
def test_what_is_read_of_the_last_block_is_what_moves_embeddings(name: str) -> None:
    """Found with NaN; here by gradients of the embeddings with respect to that output."""
    model = family(name)
    towers, encoders = models.towers(model), models.encoders(model)
    data, restricted = samples(model), 0
    for tower in towers.values():
        *_, (block, calls) = walk(tower, encoders, data)
        for batch, call in zip(calibration.batches(encoders, data, tower.name), calls, strict=True):
            kept = []

            def keep(_, args, output, kept=kept):
                kept.append(first(output).detach().requires_grad_())
                return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

            handle = block.module.register_forward_hook(keep)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(batch.encode(batch.inputs).square().sum(), kept)
            handle.remove()
            moved = gradient.abs().amax(-1) > 0 if gradient.ndim == 3 else torch.ones(1, dtype=torch.bool)
            want = moved if call.positions is None or call.positions.shape != moved.shape else moved & call.positions
            if call.read is None:  # of CoCa's pool, which gives no sequence like its input, nothing is noted
                assert (
                    name == "coca" or want.all() or (call.positions is not None and torch.equal(want, call.positions))
                )
            else:
                assert torch.equal(call.read, want) and not want.all()
                restricted += 1
    assert restricted or name in ("convnext", "vit_siglip")


def test_the_ending_gives_the_embeddings_of_the_blocks_as_they_stand() -> None:
    model = small_clip()
    towers, encoders = models.towers(model), models.encoders(model)
    data = calibration.samples(IMAGES, encoders)
    tower = towers["vision"]
    ending = models.Block("vision.ending", tower.module, None, None, None, None, {})
    with torch.no_grad():
        before = model.encode_image(IMAGES)
        for block, calls in walk(tower, encoders, data, ending):  # noqa: B007 - the last ones are looked at
            if block is tower.blocks[0]:
                block.sites["fc2"].module.weight.mul_(0.5)  # what comes behind must see that
        want = model.encode_image(IMAGES)
        assert torch.allclose(torch.cat([call.run(block.module) for call in calls]), want, atol=1e-5)
        assert not torch.allclose(before, want, atol=1e-3)


@pytest.mark.parametrize("depth", [2, 5])
def test_the_search_is_linear_in_the_blocks(depth: int) -> None:
    """Calls of each block: counted, not timed. The first block is called as often as the last."""
    torch.manual_seed(0)
    model = architectures.perturb(architectures.clip({"layers": depth}, {"layers": depth}))
    towers = models.towers(model)
    calls: dict[str, Counter] = {name: Counter() for name in towers}
    for name, tower in towers.items():
        for at, block in enumerate(tower.blocks):
            block.module.register_forward_hook(lambda *_, c=calls[name], at=at: c.update([at]))
    context = context_for(model, "w8a8-smoothquant")
    ptq.decide(context)
    for counted in calls.values():
        assert len(counted) == depth
        # 4 groups of "off" and 8 to 11 strengths, which depends on where the best one lies, on some batches.
        assert max(counted.values()) < 12 * 4 * 4 + 40
        assert max(counted.values()) <= 1.5 * min(counted.values())  # not a pass per block


def context_for(model: nn.Module, recipe: str | Recipe) -> ptq.Context:
    recipe = recipes.get(recipe)
    towers, encoders = models.towers(model), models.encoders(model)
    return ptq.Context(model, recipe, towers, encoders, samples(model), ptq.states(recipe, towers), {})


def test_no_more_than_one_blocks_inputs_are_held(monkeypatch) -> None:
    """Inputs of blocks that are done are gone: nothing else holds the tensors."""
    import weakref

    model = small_clip()
    towers, encoders = models.towers(model), models.encoders(model)
    data = calibration.Samples(IMAGES, None, {})
    alive: list[weakref.ref] = []
    for _, calls in walk(towers["vision"], encoders, data):
        assert sum(ref() is not None for ref in alive) == 0
        alive += [weakref.ref(first(call.args)) for call in calls]
        del calls


# -- what a method sees --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quiet:
    strength: float = 0.5


class Looking(ptq.Method):
    """Notes what it is shown."""

    name = "looking"
    options = Quiet
    needs = frozenset({"inputs"})
    seen: ClassVar[dict] = {}

    def block(self, context, run):
        if run.block.name.endswith(".ending"):
            return
        self.seen[run.block.name] = [first(call.args).clone() for call in run.inputs]
        if run.block.name == "vision.blocks.0":
            self.errors = [run.error()]
            run.use(run.sites)
            self.errors.append(run.error())
            assert isinstance(run.states["q"].site.module, Int8Linear)
            run.restore()
            self.errors.append(run.error())
            type(self).last = self


class LookingBehindQuantized(Looking):
    name = "looking-behind"
    inputs = "quantized"
    seen: ClassVar[dict] = {}


@pytest.fixture
def registered():
    for kind in (Looking, LookingBehindQuantized):
        METHODS.register(kind)
    yield
    for kind in (Looking, LookingBehindQuantized):
        METHODS.unregister(kind.name)
        kind.seen.clear()


def test_inputs_are_float_or_quantized_as_the_method_asks(registered) -> None:
    model = small_clip()
    want = copy.deepcopy(model)
    for name in ("looking", "looking-behind"):
        context = context_for(copy.deepcopy(model), Recipe("mine", steps=(step(name),)))
        context.samples = calibration.Samples(IMAGES, None, {})
        ptq.decide(context)
        assert not any(isinstance(m, QuantizedSite) for m in context.model.modules())  # the float modules are back
    # The same block of the float model, and of one whose patches and first block are quantized, run whole.
    quantized = qclip.quantize(want, Recipe("mine", exceptions=(("vision.blocks.1.*", "float"),)))
    whole = {}
    for model, kind in ((want, Looking), (quantized, LookingBehindQuantized)):
        tower = models.towers(model)["vision"]
        passed = seen_in_one_pass(tower, models.encoders(model), calibration.Samples(IMAGES, None, {}))
        whole[kind] = first(passed["vision.blocks.1"][0][0])
    floats, behind = (kind.seen["vision.blocks.1"][0] for kind in (Looking, LookingBehindQuantized))
    assert torch.allclose(floats, whole[Looking], atol=1e-5)
    # Fused cores hand codes over that single sites round again: near, and much nearer than float.
    off = (behind - whole[LookingBehindQuantized]).norm()
    assert off < 0.3 * (floats - whole[LookingBehindQuantized]).norm() and off < 3e-3 * floats.norm()


def test_the_error_is_that_of_real_quantizers_in_place(registered) -> None:
    model = small_clip()
    context = context_for(model, Recipe("mine", steps=(step("looking"),)))
    ptq.decide(context)
    before, during, after = Looking.last.errors
    assert before == after == 0 and during > 0


@pytest.mark.parametrize(
    ("what", "attribute"), [("input", "transforms"), ("input", "input_scale"), ("weight", "weight")]
)
def test_a_method_that_decides_more_than_it_says_is_refused(what: str, attribute: str) -> None:
    class Sly(ptq.Method):
        name = "sly"

        def prepare(self, context):
            state = context.states["vision.blocks.0.mlp.fc1"]
            made = {"transforms": [qclip.layers.Scale(torch.ones(64))], "input_scale": torch.tensor(1.0)}
            setattr(state, attribute, made.get(attribute) or ptq.base.quantize_weight(state.folded()[0], state.plan))

    METHODS.register(Sly)
    try:
        with pytest.raises(RecipeError, match=f"'sly' changed the {what} of vision.blocks.0.mlp.fc1"):
            qclip.quantize(small_clip(), "w8a8-sly")
        Sly.decides = frozenset({what})
        qclip.quantize(small_clip(), "w8a8-sly")
    finally:
        METHODS.unregister("sly")


@pytest.mark.parametrize(("recipe", "bits"), [("w8a16", None), ("w8a4", 4)])
def test_the_hessian_is_that_of_what_is_multiplied(recipe: str, bits: int | None) -> None:
    model = small_clip()
    context = context_for(model, recipe)
    context.samples = calibration.Samples(IMAGES, None, {})
    tower = context.towers["vision"]
    factor = torch.rand(64) + 0.5
    with torch.no_grad():
        block, calls = next(walk(tower, context.encoders, context.samples))
        run = ptq.BlockRun(context, tower, block, calls)
        for kind in "qkv":
            run.states[kind].transforms = [qclip.layers.Scale(factor)]
        found = run.hessian(run.states["k"].site)
        x = block.module.ln_1(first(calls[0].args)).flatten(0, 1) * factor
        x = x if bits is None else qclip.layers.activations.quantize_dequantize(x, bits)
    want = 2 / len(x) * x.double().T @ x.double()
    assert torch.allclose(found.double(), want, rtol=1e-4, atol=1e-5)
    assert run.hessian(run.states["q"].site) is found  # one for all that read the input


def test_of_the_last_block_the_rows_that_are_read_count_most() -> None:
    model = small_clip()
    context = context_for(model, "w8a16")
    context.samples = calibration.Samples(IMAGES, None, {})
    with torch.no_grad():
        *_, (block, calls) = walk(context.towers["vision"], context.encoders, context.samples)
        run = ptq.BlockRun(context, context.towers["vision"], block, calls)
        x = block.module.ln_1(first(calls[0].args))
        q = run.hessian(run.states["q"].site)  # what keys and values read: all rows alike
        seen: list[torch.Tensor] = []
        run.observe({run.states["fc2"].site.shared: seen.append})
        fc2 = run.hessian(run.states["fc2"].site)
        assert torch.allclose(q, 2 / len(x.flatten(0, 1)) * x.flatten(0, 1).T @ x.flatten(0, 1), rtol=1e-3, atol=1e-5)
        means = [2 / len(rows) * rows.T @ rows for rows in (seen[0][:, 0], seen[0].flatten(0, 1))]
        assert torch.allclose(fc2, 0.9 * means[0] + 0.1 * means[1], rtol=1e-3, atol=1e-5)
        assert run.moments(run.states["fc2"].site).rows == len(x.flatten(0, 1))


def test_a_layer_is_made_of_its_state_alone() -> None:
    """Codes that a method found, its bias, its transforms: `build` asks for nothing else."""
    source, generator = nn.Linear(32, 8), torch.Generator().manual_seed(0)
    site = models.Site("vision.x", "fc1", "norm", "vision.x.in", nn.Module())
    factor = torch.rand(32, generator=generator) + 0.5
    codes = Int8Weight(torch.randint(-7, 8, (8, 32), generator=generator, dtype=torch.int8), torch.rand(8), (8, 32))
    bias = torch.randn(8)
    shared = [qclip.layers.Scale(factor)]
    layer = ptq.build(ptq.SiteState(site, source, Treatment(5, 8), shared, weight=codes, bias=bias))
    assert torch.equal(layer.codes, codes.codes) and torch.equal(layer.bias, bias) and layer.transforms[0] is shared[0]
    assert torch.equal(layer.dequantized_weight(), codes.dequantize() * factor)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("static", [False, True])
def test_few_bits_per_channel_run_on_the_int8_kernels(bits: int, static: bool) -> None:
    """With the numbers of the simulated path: the same codes, in integers instead of float32."""
    recipe = Recipe("mine", Treatment(bits, 8, static=static))
    small = qclip.quantize(small_clip(), recipe, calibration=IMAGES)
    coverage = qclip.coverage(small)
    assert coverage.share("simulated") == 0 and coverage.share("real") > 0.8
    row = next(row for row in coverage.rows if row.site == "vision.blocks.0.mlp.fc1")
    assert (row.state, row.weight_bits, row.activation_bits) == ("real", bits, 8) and row.backend != "torch"
    for tower in models.towers(small).values():
        for site in tower:
            layer = site.module
            if isinstance(layer, Int8Linear) and site.kind != "patch":
                top = 2 ** (bits - 1) - 1
                codes = layer.quantized.canonical().codes
                assert int(codes.max()) <= top and int(codes.min()) >= -top - (bits <= 4)
                simulated = qclip.layers.SimulatedLinear(
                    layer.quantized.canonical(), layer.bias, layer.transforms, layer.input_scale, activation_bits=8
                )
                x = torch.randn(7, layer.shape[1])
                want = simulated(x)
                assert (layer(x) - want).norm() < 1e-5 * want.norm()


# -- static inputs with a zero point ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", [Treatment(8, 8, static=True), Treatment(4, 8, 32, True), Treatment(8, 6, static=True)]
)
@pytest.mark.parametrize("zero", [-100, 0, 37])
def test_zero_points_of_static_inputs_reach_the_product(plan: Treatment, zero: int) -> None:
    """Inputs that lie to one side of 0 use all codes; the kernels' product is that of what the codes stand for."""
    torch.manual_seed(0)
    source = nn.Linear(64, 40)
    site = models.Site("vision.x", "fc1", "norm", "vision.x.in", nn.Module())
    scale, top = 0.02, 2 ** (plan.activation_bits - 1) - 1
    x = (torch.rand(9, 64) * 2 * top - top - zero) * scale  # what the codes -top .. top can hold
    state = ptq.SiteState(
        site, source, plan, input_scale=torch.tensor(scale), input_zero=torch.tensor(zero, dtype=torch.int32)
    )
    layer = ptq.build(state)
    rewrite.pack(layer)
    codes = (x.double() / scale).round() + zero
    assert codes.abs().max() <= top
    seen = (codes - zero) * scale
    with torch.no_grad():
        want = seen @ layer.dequantized_weight().double().T + source.bias.double()
        got = layer(x)
        assert torch.allclose(got.double(), want, atol=1e-4)
        float_product = source(x)
        close = 0.1 if plan.weight_bits == 4 else 0.03
        assert (got - float_product).norm() < close * float_product.norm()
        if zero:  # without it half of the values would be clipped
            state.input_zero = None
            plain = ptq.build(state)
            rewrite.pack(plain)
            assert (plain(x) - float_product).norm() > 0.02 * float_product.norm()
    # A copy, half precision, and what was described and loaded again keep what the zero point adds.
    again = qclip.layers.from_facts(layer.facts()).to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    again.pack()
    for same in (copy.deepcopy(layer), again):
        assert torch.equal(same(x), got)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    if plan.activation_bits == 8:
        assert layer.zero_bias.dtype == torch.float32 and not layer.takes_plain_codes()


def test_sites_with_zero_points_work_inside_their_cores() -> None:
    """Attention and MLP run such sites on codes where they can, one by one where another kernel would write them."""

    class Shifted(ptq.Method):
        name, needs, decides = "shifted", frozenset({"inputs"}), frozenset({"input"})

        def prepare(self, context):
            sites = [s.site for s in context.states.values() if s.plan.static]
            for name, (scale, _) in context.static_quantizers(sites).items():
                context.states[name].input_scale = scale
                context.states[name].input_zero = torch.tensor(-3 if name.endswith("fc2") else 2, dtype=torch.int32)

    METHODS.register(Shifted)
    try:
        model = small_clip()
        small = qclip.quantize(model, Recipe("x", Treatment(static=True), steps=(step("shifted"),)), IMAGES)
    finally:
        METHODS.unregister("shifted")
    blocks = models.towers(small)["vision"].blocks
    assert getattr(*blocks[0].attention).shares_input and not getattr(*blocks[0].attention).codes_out
    assert all(int(site.module.input_zero) in (2, -3) for site in blocks[0].sites.values())
    with torch.no_grad():
        got, want = small.encode_image(IMAGES), model.encode_image(IMAGES)
        for _ in range(3):  # recorded, then replayed
            assert torch.equal(small.encode_image(IMAGES), got)
    assert nn.functional.cosine_similarity(got, want).min() > 0.999


@pytest.mark.parametrize(
    "treatment",
    [
        *(Treatment(4, 8, 32, weight_grid=kind) for kind in ("sym", "asym", "midrise", "floatzero")),
        Treatment(3, 8, 32),
        Treatment(2, 8, 64, weight_grid="asym"),
        Treatment(6, 8, weight_grid="midrise"),
        Treatment(4, 16, weight_grid="asym", weight_observer="mse"),
    ],
    ids=str,
)
def test_every_grid_runs_on_kernels_and_comes_back(treatment: Treatment, tmp_path) -> None:
    model = small_clip()
    small = qclip.quantize(model, Recipe("mine", treatment))
    coverage = qclip.coverage(small)
    assert coverage.share("simulated") == 0 and coverage.share("real") > 0.8
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    assert models.towers(again)["text"].sites["text.blocks.0.mlp.fc2"].module.grid == treatment.grid
    with torch.no_grad():
        want, got, loaded = (m.encode_image(IMAGES) for m in (model, small, again))
    least = {2: 0.4, 3: 0.8}.get(treatment.weight_bits, 0.95)
    assert nn.functional.cosine_similarity(got, want).min() > least and torch.equal(got, loaded)


def test_static_scales_behind_smoothquant_are_those_of_all_samples() -> None:
    """The search looks at a few of them; here the others are larger."""
    context = context_for(small_clip(), Recipe("x", Treatment(static=True), steps=(step("smoothquant", samples=2),)))
    context.samples = calibration.Samples(torch.cat([IMAGES[:2], 5 * IMAGES[2:]]), architectures.tokens(), {})
    ptq.decide(context)
    sites = [state.site for state in context.states.values() if state.plan.static]
    want = context.static_quantizers(sites)
    assert len(want) > 10 and any(state.transforms for state in context.states.values())
    for site in sites:
        assert torch.equal(context.states[site.name].input_scale, want[site.name][0])


def test_a_static_range_is_of_the_input_that_is_quantized() -> None:
    """A later step turns what RepQ-ViT has found ranges of: they are found again, for the turned input."""
    found = {}
    for recipe in ("w8a8-repq-vit", "w8a8-repq-vit+rotation"):
        context = context_for(small_clip(), recipe)
        context.samples = calibration.Samples(IMAGES, architectures.tokens(), {})
        ptq.decide(context)
        found[recipe] = context
    turned = found["w8a8-repq-vit+rotation"]
    sites = [state.site for state in turned.states.values() if state.plan.static]
    want = turned.static_quantizers(sites)
    assert len(sites) == 2 * 13 and all(
        isinstance(turned.states[site.name].transforms[-1], qclip.layers.RandomHadamard) for site in sites
    )
    for site in sites:
        state = turned.states[site.name]
        assert torch.equal(state.input_scale, want[site.name][0]) and torch.equal(state.input_zero, want[site.name][1])
    assert any(
        not torch.equal(state.input_scale, found["w8a8-repq-vit"].states[name].input_scale)
        for name, state in turned.states.items()
        if state.plan.static
    )


REFUSED = [
    "w8a8-hqq",
    "w4a16-ptq4vit",
    "w4a16-repq-vit",
    {"name": "x", "weight_bits": 4, "activation_bits": 8, "weight_grid": "asym", "steps": ["hqq"]},
    {"name": "x", "weight_bits": 8, "activation_bits": 8, "exceptions": {"*": "float"}, "steps": ["rotation"]},
    {
        "name": "x",
        "weight_bits": 4,
        "activation_bits": 8,
        "exceptions": {"*.q": "w8a8"},
        "steps": ["rotation", {"method": "raana", "widths": [2, 3]}],
    },
    {"name": "x", "weight_bits": 4, "activation_bits": 8, "weight_observer": "percentile", "steps": ["gptq"]},
    {"name": "x", "weight_bits": 4, "activation_bits": 8, "weight_observer": "mse", "steps": ["repq-vit"]},
    {"name": "x", "weight_bits": 8, "activation_bits": 8, "towers": ["text"], "steps": ["smoothquant", "hqq"]},
]


@pytest.mark.parametrize("recipe", REFUSED, ids=lambda each: each if isinstance(each, str) else each["steps"][-1])
def test_a_refusal_is_known_before_anything_runs(recipe, monkeypatch):
    model = small_clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(each) for each in model.modules()]
    wanted = [recipes.get(recipe), recipes.get("w8a8"), recipes.get("w4a16-hqq")]
    told = ptq.refusals(model, wanted)
    assert [type(each) for each in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(told) == [wanted[0].hash]
    monkeypatch.setattr(calibration, "channel_maxima", lambda *_: pytest.fail("it ran"))  # of what comes before
    monkeypatch.setattr(calibration, "channel_moments", lambda *_: pytest.fail("it ran"))
    with pytest.raises(RecipeError) as caught:
        qclip.quantize(model, recipe, IMAGES)
    assert str(caught.value) == told[wanted[0].hash]


def test_a_model_that_holds_nan_is_refused_for_every_recipe():
    model = small_clip()
    next(model.visual.transformer.resblocks[0].mlp.parameters()).data[0] = float("nan")
    told = ptq.refusals(model, [recipes.get("w8a8"), recipes.get("w4a8")])
    assert len(told) == 2 and all("holds NaN or Inf" in why for why in told.values())
