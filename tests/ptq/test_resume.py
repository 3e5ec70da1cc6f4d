"""A quantization that ends in the middle goes on at the block where it was, with the same result, or not at all."""

import copy
import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import qclip
from qclip import calibration, models, ptq, recipes
from qclip.ptq.methods.gptq import GPTQ
from qclip.ptq.methods.smoothquant import SmoothQuant
from qclip.ptq.resume import Resumption, _encoded
from qclip.recipes import METHODS, Recipe, Treatment, step
from qclip.store import Entry, Store, StoreWarning
from tests.small import IMAGES, small_clip

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer inputs than channels")
RECIPE = Recipe("mine", Treatment(4, 8, 32), steps=(step("smoothquant", alpha=0.5), step("gptq")), towers=("vision",))
BLOCKS = ["vision.blocks.0", "vision.blocks.1", "vision.ending"]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def worked(monkeypatch) -> list[tuple[str, str]]:
    """(method, block) of every block that a method worked on."""
    seen: list[tuple[str, str]] = []
    for kind in (GPTQ, SmoothQuant):
        block = kind.block

        def noting(self, context, run, block=block, kind=kind):
            block(self, context, run)
            seen.append((kind.name, run.block.name))

        monkeypatch.setattr(kind, "block", noting)
    return seen


def stop_at(monkeypatch, method: type[ptq.Method], block: str, error: type[BaseException]) -> None:
    inner = method.block

    def stopping(self, context, run):
        if run.block.name == block:
            raise error
        inner(self, context, run)

    monkeypatch.setattr(method, "block", stopping)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("method", "at"), [(GPTQ, "vision.blocks.1"), (SmoothQuant, "vision.ending")])
def test_after_ctrl_c_it_goes_on_at_the_block_where_it_was(tmp_path, monkeypatch, worked, method, at) -> None:
    model = small_clip()
    undisturbed = qclip.quantize(model, RECIPE, IMAGES)
    every = [(name, block) for name in ("smoothquant", "gptq") for block in BLOCKS]
    assert worked == every and entries(tmp_path) == []
    worked.clear()
    with monkeypatch.context() as patch:
        stop_at(patch, method, at, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            qclip.quantize(model, RECIPE, IMAGES, resume=tmp_path)
    done = every.index((method.name, at))
    assert worked == every[:done] and len(entries(tmp_path)) == done
    worked.clear()
    steps = []
    again = qclip.quantize(model, RECIPE, IMAGES, resume=tmp_path, progress=lambda *what: steps.append(what))
    assert worked == every[done:]
    assert same(again, undisturbed) and entries(tmp_path) == []  # what was kept is gone when the run is over
    notes, want = (each.qclip_quantization.provenance for each in (again, undisturbed))
    assert notes == want
    assert any(what[0] == "GPTQ" and what[1] == what[2] for what in steps)
    core = getattr(*models.towers(again)["vision"].blocks[0].attention)
    assert core.shares_input  # q, k and v go on sharing their transforms


@pytest.mark.parametrize("what", ["weights", "recipe", "calibration", "seed", "version", "nothing"])
def test_what_was_kept_of_another_run_is_not_used(tmp_path, monkeypatch, worked, what) -> None:
    model, recipe, images, seed = (
        small_clip(),
        dataclasses.replace(recipes.get("w4a8-gptq"), towers=("vision",)),
        IMAGES,
        0,
    )
    with monkeypatch.context() as patch:
        stop_at(patch, GPTQ, "vision.blocks.1", RuntimeError)
        with pytest.raises(RuntimeError):
            qclip.quantize(model, recipe, images, seed, resume=tmp_path)
    worked.clear()
    if what == "weights":
        with torch.no_grad():
            model.visual.ln_post.bias[0] += 1e-3
    if what == "recipe":
        recipe = dataclasses.replace(recipe, steps=(step("gptq", damp=0.02),))
    if what == "calibration":
        images = IMAGES[:5]
    if what == "version":
        monkeypatch.setattr(ptq, "_version", lambda: "0.0")
    qclip.quantize(model, recipe, images, seed + (what == "seed"), resume=tmp_path)
    assert len(worked) == (2 if what == "nothing" else 3)


def test_nothing_is_kept_unless_that_is_asked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        stop_at(patch, GPTQ, "vision.blocks.1", RuntimeError)
        for resume in (False, True):
            assert entries(tmp_path) == []
            with pytest.raises(RuntimeError):
                qclip.quantize(small_clip(), RECIPE, IMAGES, resume=resume)
    assert len(entries(tmp_path / "qclip" / "quantize")) == 4


def test_a_method_that_does_not_say_that_it_can_is_run_from_its_start(tmp_path) -> None:
    class Counting(ptq.Method):
        name, needs = "counting", frozenset({"inputs"})
        seen: ClassVar[list] = []

        def block(self, context, run):
            self.seen.append(run.block.name)
            if len(self.seen) == 2:
                raise RuntimeError

    METHODS.register(Counting)
    recipe = Recipe("x", steps=(step("counting"),), towers=("vision",))
    try:
        with pytest.raises(RuntimeError):
            qclip.quantize(small_clip(), recipe, IMAGES, resume=tmp_path)
        qclip.quantize(small_clip(), recipe, IMAGES, resume=tmp_path)
    finally:
        METHODS.unregister("counting")
    assert Counting.seen == BLOCKS[:2] + BLOCKS and entries(tmp_path) == []


# -- files that anybody may have written -------------------------------------------------------------------------------


@functools.cache
def found_states(recipe: Recipe = RECIPE) -> dict[str, ptq.SiteState]:
    model = small_clip()
    towers, encoders = models.towers(model), models.encoders(model)
    data = calibration.samples(IMAGES, encoders)
    context = ptq.Context(model, recipe, towers, encoders, data, ptq.states(recipe, towers), {})
    ptq.decide(context)
    return {site.name: context.states[site.name] for site in towers["vision"].blocks[0].sites.values()}


def blank(states: dict[str, ptq.SiteState]) -> dict[str, ptq.SiteState]:
    return {name: ptq.SiteState(state.site, state.source, Treatment(4, 8, 32)) for name, state in states.items()}


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        Recipe("x", Treatment(3, 8, static=True), steps=(step("gptq", bias=True),)),
        Recipe("x", Treatment(4, 16, 64, weight_grid="asym"), steps=(step("gptq"),)),
        Recipe("x", Treatment(5, 8, weight_grid="midrise"), steps=(step("gptq"),)),
    ],
    ids=lambda recipe: str(recipe.default.grid),
)
def test_states_come_back_as_they_were(recipe: Recipe, tmp_path) -> None:
    states = found_states(recipe)
    kept = Resumption(Store(tmp_path), {"made": "of this"})
    kept.begin(0, {})
    notes = {"gptq": {"a": 1.5}}
    kept.keep("here", states, notes)
    again, told = blank(states), {}
    assert kept.find("here", again, told) and told == notes
    for name, state in states.items():
        got = again[name]
        assert got.plan == state.plan and len(got.transforms) == len(state.transforms)
        assert all(a.same(b) for a, b in zip(got.transforms, state.transforms, strict=True))
        assert type(got.weight) is type(state.weight)
        assert torch.equal(got.weight.codes, state.weight.codes) and torch.equal(got.weight.scales, state.weight.scales)
        for field in ("input_scale", "input_zero", "bias"):
            a, b = getattr(got, field), getattr(state, field)
            assert (a is None) == (b is None) and (a is None or (torch.equal(a, b) and a.dtype == b.dtype))
    block = "vision.blocks.0.attn"
    if states[f"{block}.q"].transforms:
        assert again[f"{block}.q"].transforms[0] is again[f"{block}.k"].transforms[0]
    assert not kept.find("elsewhere", again, told)


def changed(entry: Entry, change) -> Entry:
    facts = json.loads(json.dumps(dict(entry.facts)))
    arrays = {name: array.copy() for name, array in entry.arrays.items()}
    change(facts, arrays)
    return Entry(arrays, facts)


FC1 = "vision.blocks.0.mlp.fc1"


def without(name):
    return lambda f, a: a.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda f, a: f["sites"].pop(FC1),
        lambda f, a: f["sites"].update({"other": f["sites"].pop(FC1)}),
        lambda f, a: f["sites"][FC1]["plan"].update(weight_bits=9),
        lambda f, a: f["sites"][FC1]["plan"].update(odd=1),
        lambda f, a: f["sites"][FC1].update(transforms=[7]),
        lambda f, a: f["sites"][FC1].update(transforms="x"),
        lambda f, a: f["sites"][FC1].update(weight={"class": "Int4Weight"}),
        lambda f, a: f["sites"][FC1]["weight"].update(group=64),
        lambda f, a: f["sites"][FC1]["weight"].update({"class": "Int8Weight"}),
        lambda f, a: f["sites"][FC1].pop("bias"),
        lambda f, a: f["transforms"][0].update({"class": "os.system"}),
        lambda f, a: f["transforms"][0].update(width=10**9),
        lambda f, a: f.update(notes=[]),
        lambda f, a: f.pop("notes"),
        without(f"{FC1}.weight.codes"),
        without("transform.0.factor"),
        lambda f, a: a[f"{FC1}.weight.scales"].fill(np.nan),
        lambda f, a: a["transform.0.factor"].fill(0),
        lambda f, a: a.update({f"{FC1}.weight.codes": a[f"{FC1}.weight.codes"][:3]}),
        lambda f, a: a.update({f"{FC1}.weight.codes": a[f"{FC1}.weight.codes"].astype(np.float32)}),
        lambda f, a: a.update({"transform.0.factor": a["transform.0.factor"][:5]}),
    ],
)
def test_an_entry_that_is_not_what_states_can_be_is_computed_again(change, tmp_path) -> None:
    states, notes = found_states(), {"a": 1}
    kept = Resumption(Store(tmp_path), {})
    kept.begin(0, {})
    good = dataclasses.replace(_encoded(states), facts={**_encoded(states).facts, "notes": notes})
    kept._store.write(kept._key("here"), changed(good, change))  # with a checksum that is right
    again = blank(states)
    before, told = copy.copy(again[FC1]), {}
    with pytest.warns(StoreWarning, match="computed again"):
        assert not kept.find("here", again, told)
    assert told == {} and vars(again[FC1]) == vars(before)


def test_a_torn_or_foreign_file_is_computed_again(tmp_path) -> None:
    states = found_states()
    for content in (lambda whole: whole[:-100], lambda _: b"\x80\x04cos\nsystem\n", lambda _: b""):
        kept = Resumption(Store(tmp_path), {})
        kept.begin(0, {})
        kept.keep("here", states, {})
        (path,) = entries(tmp_path)
        path.write_bytes(content(path.read_bytes()))
        with pytest.warns(StoreWarning):
            assert not kept.find("here", blank(states), {})


def test_what_no_file_can_hold_is_said(tmp_path) -> None:
    states = {name: copy.copy(state) for name, state in found_states().items()}
    kept = Resumption(Store(tmp_path), {})
    kept.begin(0, {})
    with pytest.warns(UserWarning, match="here is not kept for a run that goes on .*type set"):
        kept.keep("here", states, {"x": {1, 2}})
    states[FC1].bias = object()
    with pytest.warns(UserWarning, match="here is not kept for a run that goes on \\(a object of a state"):
        kept.keep("here", states, {})
    assert entries(tmp_path) == []


def test_a_store_that_takes_nothing_stops_no_run(tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(StoreWarning):
        qclip.quantize(small_clip(), dataclasses.replace(RECIPE, steps=(step("gptq"),)), IMAGES, resume=blocked)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoreWarning)
        qclip.quantize(small_clip(), dataclasses.replace(RECIPE, steps=(step("gptq"),)), IMAGES)


def test_what_was_decided_before_the_step_is_part_of_the_key(tmp_path) -> None:
    """Two runs of one recipe whose first steps came to other things share nothing of the second."""
    states, before = found_states(), found_states()
    kept = Resumption(Store(tmp_path), {"made": "of this"})
    kept.begin(1, before)
    kept.keep("here", states, {})
    other = {name: copy.copy(state) for name, state in before.items()}
    other[FC1].transforms = [qclip.layers.Scale(torch.full((64,), 0.5))]
    again = Resumption(Store(tmp_path), {"made": "of this"})
    again.begin(1, other)
    assert not again.find("here", blank(states), {})
    again.begin(2, before)
    assert not again.find("here", blank(states), {})
    again.begin(1, before)
    assert again.find("here", blank(states), {})


def test_codes_outside_the_grid_are_computed_again(tmp_path) -> None:
    """Of 3 bits in int8, -4 .. 3."""
    states = found_states(Recipe("x", Treatment(3, 8), steps=(step("gptq"),)))
    kept = Resumption(Store(tmp_path), {})
    kept.begin(0, {})
    good = _encoded(states)

    def spoil(_, arrays):
        arrays[f"{FC1}.weight.codes"][0, 0] = 5

    for change, fine in ((lambda *_: None, True), (spoil, False)):
        whole = dataclasses.replace(good, facts={**good.facts, "notes": {}})
        kept._store.write(kept._key("here"), changed(whole, change))
        if fine:
            assert kept.find("here", blank(states), {})
            continue
        with pytest.warns(StoreWarning, match="codes outside it"):
            assert not kept.find("here", blank(states), {})


def test_a_half_precision_model_goes_on_as_well(tmp_path, monkeypatch, worked) -> None:
    """bfloat16 biases, which numpy has no type for, come back bit by bit."""
    model = small_clip().bfloat16()
    recipe = Recipe("x", Treatment(4, 8, 32), steps=(step("gptq", bias=True),), towers=("vision",))
    undisturbed = qclip.quantize(model, recipe, IMAGES)
    with monkeypatch.context() as patch:
        stop_at(patch, GPTQ, "vision.ending", KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            qclip.quantize(model, recipe, IMAGES, resume=tmp_path)
    worked.clear()
    again = qclip.quantize(model, recipe, IMAGES, resume=tmp_path)
    assert worked == [("gptq", "vision.ending")] and same(again, undisturbed)
