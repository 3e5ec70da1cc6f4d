"""The trainer: it learns, goes on to the bit, cuts and shares batches unchanged, and stops with a reason."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import qclip
from qclip import files, models
from qclip.errors import DataError, InputError, NonFiniteError, OutputError, QclipError
from qclip.rewrite import tensors_hash
from qclip.training import (
    CheckpointError,
    Pairs,
    Settings,
    TrainingError,
    checkpoint,
    fit,
    inputs,
    outcome,
    preparation,
    trainer,
)
from qclip.training.objectives import OBJECTIVES, Features, Objective
from qclip.training.processes import Processes
from qclip.training.step import Gradient
from tests.small import small_clip
from tests.training.world import SETTINGS, pairs

ROOT = Path(__file__).resolve().parents[2]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


class KilledError(Exception):
    pass


def killed_at(step: int):
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training") and done == step:
            raise KilledError

    return progress


def log(folder: Path) -> list[list[str]]:
    return list(csv.reader((folder / "log.csv").open()))


def test_it_learns_and_what_it_becomes_is_nearer_to_float_than_rounding(tmp_path: Path) -> None:
    model, (images, _) = small_clip(), pairs()
    settings = SETTINGS | {"steps": 25, "objective": "mse"}
    trained = qclip.train(model, "w4a4-lsq", pairs(), tmp_path, **settings)
    rows = log(tmp_path)
    assert rows[0][:3] == ["step", "loss", "mse"] and len(rows) == 26
    assert float(rows[-1][1]) < 0.8 * float(rows[1][1])
    with torch.no_grad():
        wanted = model.encode_image(images)
        found = [
            1 - torch.cosine_similarity(each.encode_image(images), wanted).mean()
            for each in (trained, qclip.quantize(model, "w4a4"))
        ]
    assert found[0] < found[1]
    notes = trained.qclip_quantization.provenance["training"]
    assert notes["settings"]["steps"] == 25 and notes["held_out"]["pairs"] == 5 and notes["learned"] == 19


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    recipe = "w4a4-ofq"  # it keeps track of codes, too
    more = SETTINGS | {"ema": 0.9, "start": 0.34, "logit_scale": "learned"}
    more |= {"objective": "contrastive+mse+imitation+noise+margin+esd", "beside": 0.4}  # which draw
    whole = qclip.train(small_clip(), recipe, pairs(), tmp_path / "a", **more)
    for step in (1, 5):  # before the first save, behind the last but one
        with pytest.raises(KilledError):
            qclip.train(small_clip(), recipe, pairs(), tmp_path / "b", progress=killed_at(step), **more)
    assert checkpoint.latest(tmp_path / "b").name == "step-0000004.safetensors"
    torch.manual_seed(9)  # what happened meanwhile is no matter
    again = qclip.train(small_clip(), recipe, pairs(), tmp_path / "b", **more)
    same(state(again), state(whole))
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 2


class Draws:
    """A term of somebody's own, which takes torch's random numbers."""

    name, needs = "draws", frozenset[str]()

    def __call__(self, features: Features) -> torch.Tensor:
        return (features.image * torch.randn(features.image.shape)).sum()


def test_a_term_that_draws_goes_on_to_the_bit_too(tmp_path: Path) -> None:
    given = SETTINGS | {"objective": "mse+draws", "steps": 4}
    OBJECTIVES.register(Draws)
    try:
        torch.manual_seed(3)
        whole = qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path / "a", **given)
        torch.manual_seed(3)
        with pytest.raises(KilledError):
            qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path / "b", progress=killed_at(3), **given)
        torch.manual_seed(9)
        same(state(qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path / "b", **given)), state(whole))
    finally:
        OBJECTIVES.unregister("draws")


def test_so_many_pairs_are_drawn_as_are_asked_for() -> None:
    trained = qclip.train(small_clip(), "w8a8-ste", "scenes:train?samples=40", **SETTINGS | {"steps": 1, "pairs": 20})
    notes = trained.qclip_quantization.provenance["training"]
    assert notes["learned"] == 16 and notes["pairs"]["pairs"] == 20


def test_a_run_that_is_over_is_not_trained_again(tmp_path: Path) -> None:
    first = qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS)
    again = qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, progress=killed_at(6), **SETTINGS)
    same(state(again), state(first))


#: Terms that ask for all that a step may embed.
ALL = "contrastive+mse+imitation+consensus+noise+margin+0.1*energy+9*esd+mmce+spectral+tail"


def gradient_of(processes: Processes | None = None, recipe: str = "w4a4-lsq", **settings) -> dict[str, torch.Tensor]:
    model = small_clip()
    chosen = Settings(**{**SETTINGS, "objective": ALL, "beside": 0.5, **settings})
    data, apart = Pairs.of(pairs(), qclip.encoders(model)).split(0.25, 0)
    student = preparation.prepare(model, recipe, data.samples())
    found = Gradient(student, model, data, Objective(chosen.objective), chosen, processes or Processes(), apart=apart)
    found(0, 0.0)
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", [{"micro": 3}, {"checkpointing": True}])
def test_a_batch_that_is_cut_or_run_again_gives_the_gradient_of_the_whole(change: dict) -> None:
    wanted, found = gradient_of(), gradient_of(**change)
    assert wanted.keys() == found.keys() and len(wanted) > 50
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=2e-5, msg=name)
    assert sum(float(g.abs().sum()) for g in wanted.values()) > 1


def test_bfloat16_gives_nearly_the_gradient() -> None:
    given = {"recipe": "w8a8-ste", "objective": "contrastive+mse"}
    wanted, found = gradient_of(**given), gradient_of(**given, precision="bfloat16")
    flat = [torch.cat([each[name].flatten() for name in sorted(wanted)]) for each in (wanted, found)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.95


SHARED = """
import sys, torch
from qclip.training.processes import Processes
from tests.training.test_trainer import gradient_of
processes = Processes.of_environment()
found = gradient_of(processes)
if processes.first:
    torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    script, out = tmp_path / "shared.py", tmp_path / "found.pt"
    script.write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(out)], cwd=ROOT, env=environment, check=True, capture_output=True)
    wanted, found = gradient_of(), torch.load(out, weights_only=True)
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=2e-5, msg=name)


def test_scales_are_not_decayed_and_weights_are(tmp_path: Path) -> None:
    still = SETTINGS | {"rate": 0.0, "scale_rate": 0.0, "decay": 0.5, "steps": 2}
    model, data = small_clip(), pairs()
    student = preparation.prepare(model, "w4a4-lsq", data[0])
    run = trainer.Trainer.__new__(trainer.Trainer)
    run.student, run.settings = student, Settings(**still)
    run.sites = list(preparation.trained_sites(student))
    run.parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
    groups = run._optimizer().param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in run.parameters.items() if id(p) in decayed}
    assert names == {n for n in run.parameters if n.endswith((".weight",)) and ".ln_" not in n and "ln_" not in n}
    scales = {
        n
        for g in groups
        if g["kind"] == "scales"
        for n, p in run.parameters.items()
        if any(p is q for q in g["params"])
    }
    assert scales == {n for n in run.parameters if n.endswith(".learned.log")} and scales


def test_a_scale_that_collapses_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"training stopped at step \d+: at \S+ a scale has left .*last good"):
        qclip.train(small_clip(), "w4a8-lsq", pairs(), tmp_path, **SETTINGS | {"scale_rate": 4.0, "save_every": 1})


def test_a_loss_that_is_not_finite_names_step_layer_and_checkpoint(tmp_path: Path) -> None:
    model = small_clip()

    def spoil(what: str, done: int, total: int) -> None:
        if done == 3 and what.startswith("training"):
            student = seen[0]
            dict(preparation.trained_sites(student))
            site = next(m for s, m in preparation.trained_sites(student) if s.name == "vision.blocks.1.mlp.fc1")
            site.bias.data[0] = torch.inf

    seen: list[nn.Module] = []
    prepare = fit.prepare

    def watched(*args, **kwargs):
        seen.append(prepare(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "prepare", watched)
        with pytest.raises(NonFiniteError, match=r"step 4: .*fc1.*step-0000002\.safetensors") as raised:
            qclip.train(model, "w8a8-ste", pairs(), tmp_path, progress=spoil, **SETTINGS)
    assert "mlp" in str(raised.value)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = torch.optim.AdamW.step, []

    def spoil(optimizer: torch.optim.AdamW, *more) -> None:
        step(optimizer, *more)
        calls.append(optimizer)
        if len(calls) == 4:  # behind it nothing asks for a loss before a checkpoint is written
            optimizer.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(NonFiniteError, match=r"step 4: \S+ holds NaN or Inf .*step-0000002\.safetensors") as raised:
        qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS)
    assert "logit_scale" not in str(raised.value)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["step-0000002.safetensors"]


def test_a_weight_that_its_grid_holds_no_more_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = torch.optim.AdamW.step, []

    def grow(optimizer: torch.optim.AdamW, *more) -> None:
        step(optimizer, *more)
        calls.append(optimizer)
        if len(calls) == 3:
            weights = next(group["params"] for group in optimizer.param_groups if group["weight_decay"])
            weights[-1].data.mul_(1e9)  # of which float16 holds no scale

    monkeypatch.setattr(torch.optim.AdamW, "step", grow)
    told = r"step 4: the weight of text\.\S+ can be rounded no more: scales .* \(lower the rate\); .*step-0000002"
    with pytest.raises(TrainingError, match=told):
        qclip.train(small_clip(), "w4a8-ste", pairs(), tmp_path, **SETTINGS)


def test_processes_that_would_go_on_from_different_steps_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "each", lambda _, value: [value, 4])
    with pytest.raises(CheckpointError, match=r"would go on from different steps \(0, 4\).*name an output that they"):
        qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_left_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")

    for name in ("all_gather", "all_reduce", "barrier"):
        monkeypatch.setattr(torch.distributed, name, gone)
    for call in (lambda p: p.gathered(torch.ones(2)), lambda p: p.sum_([torch.ones(2)]), lambda p: p.wait()):
        with pytest.raises(QclipError, match="another process of this run has stopped"):
            call(Processes(0, 2))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = files.os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 5:  # behind a probe, and a checkpoint with its log
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            OutputError, match=r"stopped at step 4: .*No space left on device; .*make room.*step-0000002"
        ):
            qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path / "run", **SETTINGS)
    kept = checkpoint.latest(tmp_path / "run")
    assert kept is not None and not list((tmp_path / "run").glob(".qclip*"))
    whole = qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path / "other", **SETTINGS)
    same(state(qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path / "run", **SETTINGS)), state(whole))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS)
    with pytest.raises(CheckpointError, match="a run whose recipe is .*w8a8-ste.* this one's is .*w4a8-ste"):
        qclip.train(small_clip(), "w4a8-ste", pairs(), tmp_path, **SETTINGS)
    with pytest.raises(CheckpointError, match="whose model is"):
        qclip.train(small_clip(1), "w8a8-ste", pairs(), tmp_path, **SETTINGS)
    with pytest.raises(CheckpointError, match="whose steps is 6, and this one's is 7"):
        qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS | {"steps": 7})
    images, texts = pairs()
    for data in ((images.flip(0), texts), (images, texts[::-1])):
        with pytest.raises(CheckpointError, match="whose data is"):
            qclip.train(small_clip(), "w8a8-ste", data, tmp_path, **SETTINGS)
    with pytest.raises(CheckpointError, match="threads is 1, and this one's is 2; start it with as many threads to go"):
        checkpoint.check_same(tmp_path, {"threads": 1}, {"threads": 2})


def test_a_checkpoint_that_is_damaged_is_removed_by_its_user_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS)
    path = checkpoint.latest(tmp_path)
    content = path.read_bytes()
    foreign = safetensors.torch.save({"a": torch.zeros(1)})
    empty = {checkpoint.FACTS: torch.tensor(list(b"{}"), dtype=torch.uint8)}
    bare = safetensors.torch.save(empty, {"sha256": tensors_hash(empty)})
    turned = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]  # a bit of a tensor
    for damaged in (content[:-9], b"", foreign, bare, turned):
        path.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"step-0000006\.safetensors' .*; remove it, and the run goes on from"
        ):
            qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS)
    path.unlink()
    same(state(qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path, **SETTINGS)), state(whole))


def test_a_place_where_no_checkpoint_can_be_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(fit.Pairs, "of", lambda *_: pytest.fail("pairs were read first"))
    for output in ("file", "file/run"):
        with pytest.raises(InputError, match="file' is a file; name a folder|cannot be written: Not a directory"):
            qclip.train(small_clip(), "w8a8-ste", pairs(), tmp_path / output, **SETTINGS)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def refused(data: object, error: type[Exception], told: str, **settings) -> None:
    with pytest.raises(error, match=told):
        qclip.train(small_clip(), "w8a8-ste", data, **{**SETTINGS, **settings})


def test_pairs_that_are_none() -> None:
    images, texts = pairs()
    refused("scenes:test?samples=8", DataError, "a batch of 8 was asked for, and 6 pairs are there")
    refused((images, texts[:3]), DataError, "24 images and captions of 3")
    refused((images, [[""], *texts[1:]]), DataError, "image 0 of the given pairs has an empty caption")
    refused((images[:1], texts[:1]), DataError, r"1 pair\(s\), and training needs two at least; give more")
    refused((images[:1, :, :9], texts[:1]), DataError, "1 pair")
    refused(17, DataError, "pairs are a data name")
    refused((images, texts), InputError, "batch of one says nothing to objective 'contrastive", batch=1)
    refused((images, texts), DataError, "a batch of 64 was asked for, and 19 pairs are there", batch=64)
    refused((images, ["a dog"] * len(images)), DataError, "all 19 images have one caption, and objective")
    refused((images.clone().fill_(torch.nan), texts), DataError, "NaN or Inf")
    with pytest.raises(InputError, match="a batch of 8 cannot be shared by 3 processes; give a multiple"):
        fit._check_batch(
            Settings(batch=8), Objective("mse"), Pairs.of(pairs(), qclip.encoders(small_clip())), Processes(0, 3)
        )


def test_a_set_without_captions(tmp_path: Path) -> None:
    from PIL import Image

    for k in range(3):
        Image.new("RGB", (32, 32), (k, k, k)).save(tmp_path / f"{k}.png")
    refused(f"folder:{tmp_path}", DataError, "has no captions and no class names, and training needs pairs")


def test_settings_that_are_none() -> None:
    for given, told in (
        ({"steps": -1}, "steps must be at least 0"),
        ({"rate": -1.0}, "rate must be a finite number"),
        ({"start": 1.0}, "start must lie from 0 to below 1"),
        ({"held_out": 0.0, "logit_scale": "tuned"}, "fitted on held-out pairs"),
    ):
        with pytest.raises(InputError, match=told):
            Settings(**given)
    recipe = qclip.recipes.get("w8a8-ste")
    with pytest.raises(InputError, match="unknown field 'stepps'; did you mean 'steps'"):
        Settings.of(recipe, stepps=3)
    with pytest.raises(InputError, match="'precision' has the wrong type; it takes 'float32' or 'bfloat16'"):
        Settings.of(recipe, precision="half")
    with pytest.raises(InputError, match="names 'mse' twice"):
        Objective("mse+contrastive+2*mse")
    for weight in ("-1", "1e38", "nan"):
        with pytest.raises(InputError, match=f"the weight '{weight}' is no number from 0 to below 1e9 in plain digits"):
            Objective(f"{weight}*mse")
    with pytest.raises(InputError, match="has weights of 0 alone, from which nothing is learned"):
        Objective("0*contrastive+0.0*mse")
    with pytest.raises(InputError, match="unknown objective 'contrast'"):
        Objective("contrast")


def test_codes_that_a_step_has_found_are_not_lost_by_a_late_start() -> None:
    with pytest.raises(InputError, match="the codes of 'gptq' would be lost; set start to 0"):
        qclip.train(small_clip(), "w4a8-gptq+lsq", pairs(), **SETTINGS | {"start": 0.5})


def test_the_logit_scale_is_frozen_learned_or_tuned() -> None:
    model = small_clip()
    before = float(model.logit_scale.detach())
    found = {}
    for how in ("frozen", "learned", "tuned"):
        trained = qclip.train(model, "w8a8-ste", pairs(), **SETTINGS | {"logit_scale": how, "steps": 2})
        found[how] = float(trained.logit_scale.detach())
    assert found["frozen"] == before and found["learned"] != before
    assert float(model.logit_scale.detach()) == before
    # A model with random weights finds no caption: no scale is better than any other, which is told.
    notes = trained.qclip_quantization.provenance["training"]["logit_scale"]
    assert found["tuned"] == before and notes["why"] == "no positive optimum"


def test_a_logit_scale_is_tuned_to_the_least_loss() -> None:
    image = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    text = torch.nn.functional.normalize(
        image + 0.4 * torch.randn(30, 8, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    scale, other, captions = torch.tensor(1.0), torch.tensor(5.0), torch.arange(30)
    notes = outcome.tune(scale, Features(image, text, scale.exp(), image, text, other, captions))
    assert notes["before"] == pytest.approx(2.718, abs=1e-3) and "why" not in notes
    assert notes["after"] == pytest.approx(float(scale.exp())) != notes["before"]

    def loss(factor: float) -> float:
        return float(
            Objective("contrastive")(Features(image, text, scale.exp() * factor, image, text, other, captions))[0]
        )

    assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_what_a_step_embeds_follows_from_the_step_and_no_pair_apart_is_learned_from() -> None:
    data = Pairs.of(pairs(), qclip.encoders(small_clip()))
    learned, apart = data.split(0.25, 0, "pairs apart")
    needs = frozenset({"views", "negatives", "mixtures", "apart"})
    first, again = (inputs.Inputs(learned, needs, Settings(**SETTINGS), apart=apart) for _ in range(2))
    for step in (0, 3):
        batch, same = first.of(step), again.of(step)
        assert {name: each.count for name, each in batch.images.items()} == {
            "image": 8,
            "views": 2,
            "negatives": 2,
            "mixtures": 2,
            "apart": 2,
        }
        for name, each in batch.images.items():
            whole = each.pixels(np.arange(each.count))
            cut = torch.cat([same.images[name].pixels(np.array([at])) for at in range(each.count)])
            assert torch.equal(whole, cut) and whole.shape[1:] == (3, 32, 32)
        own = {int(c) for each in apart.captions for c in each}
        assert set(batch.texts["apart text"]) <= own and not own & set(batch.texts["text"])
        plain = learned.pixels(batch.rows)
        assert not torch.equal(batch.images["views"].pixels(np.arange(2)), plain[:2])
    a, b = (each.images["views"].pixels(np.arange(2)) for each in (first.of(0), first.of(3)))
    assert not torch.equal(a, b)
    assert torch.equal(first.sample(), again.sample()) and len(first.sample()) == 18
    shared = inputs.Inputs(learned, needs, Settings(**SETTINGS | {"beside": 0.9}), 3, apart).of(0)
    assert [shared.images[name].count for name in ("views", "negatives", "mixtures", "apart")] == [6, 6, 6, 6]


def test_an_objective_of_images_alone_leaves_the_texts(tmp_path: Path) -> None:
    trained = qclip.train(small_clip(), "w8a8-lsq", pairs(), tmp_path, **SETTINGS | {"objective": "tail", "steps": 2})
    assert log(tmp_path)[0][:3] == ["step", "loss", "tail"]
    text = models.towers(trained)["text"].blocks[0].sites["fc1"].module
    own = models.towers(small_clip())["text"].blocks[0].sites["fc1"].module
    assert torch.cosine_similarity(text.dequantized_weight(), own.weight, dim=-1).min() > 0.999


def test_calibration_of_too_few_pairs_is_refused() -> None:
    given = {"objective": "contrastive+esd"}
    refused(pairs(), InputError, "judges pairs apart, and a share of 0.25 of a batch of 8 is fewer than 3", **given)
    given |= {"beside": 0.5, "apart": 0.05}
    refused(pairs(), InputError, "asks for pairs apart, and a share of 0.05 of 19 is fewer than 3", **given)
    refused(pairs(), InputError, "beside must lie above 0 and not above 1, not at 0", beside=0.0)


def test_batches_are_epochs_in_random_order_and_follow_from_the_step() -> None:
    data = Pairs.of(pairs(), qclip.encoders(small_clip()))
    epoch = [data.batch(step, 5, 0) for step in range(4)]  # 24 pairs: 4 are left out
    rows = torch.cat([torch.from_numpy(each) for each, _ in epoch])
    assert len(rows.unique()) == 20
    assert any((data.batch(4, 5, 0)[0] != epoch[0][0]).tolist())
    assert all((data.batch(2, 5, 0)[i] == epoch[2][i]).all() for i in (0, 1))
    for each, captions in epoch:
        assert all(c in data.captions[r] for r, c in zip(each, captions, strict=True))
    drawn = {int(c) for step in range(40) for c in data.batch(step, 5, 0)[1]}
    assert len(drawn) > 40  # of 48: not the first captions alone
    learned, held = data.split(0.25, 0)
    assert held is not None and len(held) == 6 and len(learned) == 18
