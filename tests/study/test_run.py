"""A plan that is run gives what `qclip.evaluate` gives, once, whoever does the work and whatever goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import qclip
from qclip.errors import InputError, OutputError
from qclip.results import Results
from qclip.study import measure, resident
from qclip.study import run as studies
from qclip.study.engines import processes
from qclip.study.formats import comma_separated
from qclip.study.found import find
from qclip.study.run import Ready, engine_of, prepare, recall, run
from qclip.study.store import StudyStore
from tests.study.small import DATA, OOD, TEXT, Told, measured, plan_of, ready_of


def table(ready: Ready) -> str:
    return comma_separated(find(ready.grid, ready.store))


def value(rows: list[dict[str, Any]], **wanted: Any) -> float:
    wanted = {"reference": "", "corruption": "", "severity": 0, "axis": "", "subset": "all"} | wanted
    found = [row for row in rows if all(row[name] == each for name, each in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]["value"]


def test_a_cell_holds_what_evaluate_gives(small: tuple[Ready, Told]) -> None:
    """Of the same models, with an engine, a cache and a command of their own."""
    model = qclip.load_model("scenes-clean")
    group = {"float": model, "w8a8": qclip.quantize(model, "w8a8")}
    said = {"scores": ["mcm"], "measurements": ["clean", "ood", "corrupted"], "replicates": 50, "batch": 32}
    results = qclip.evaluate(group, DATA, {"far": [OOD]}, severities=[3], cache=False, **said)  # type: ignore[arg-type]
    rows = small[0].store.rows().to_pylist()
    for reference in ("", "float"):
        for name, more in (
            ("top1", {}),
            ("ece", {}),
            ("auroc", {"score": "mcm"}),
            ("mean_nll", {"corruption": "gaussian_noise"}),
        ):
            where = {"metric": name, "reference": reference, **more}
            expected = results.row(model="w8a8", **where)
            assert expected is not None
            assert value(rows, variant="w8a8", **where) == pytest.approx(expected["value"], abs=1e-5)
    assert {row["metric"] for row in rows if row["variant"] == "w8a8"} == {
        row["metric"] for row in results.rows if row["model"] == "w8a8"
    }
    assert value(rows, variant="float", metric="chance_top1", model="scenes-clean") == pytest.approx(1 / 12, abs=0.2)
    assert not [row for row in rows if row["metric"].startswith("wins")]


def test_a_cell_keeps_its_curves_and_its_images(small: tuple[Ready, Told], tmp_path: Path) -> None:
    ready, _ = small
    block = ready.grid.blocks[1]
    text = ready.store.details(ready.work.runtime, block.cells[""])
    assert text is not None
    (tmp_path / "details.json").write_text(text)
    found = Results.from_json(tmp_path / "details.json")
    assert {curve["metric"] for curve in found.curves} == {"reliability", "risk_coverage", "roc"}
    assert {curve["model"] for curve in found.curves} == {"w8a8"}
    images = ready.store.samples(ready.work.runtime, block.cells[""])
    noisy = ready.store.samples(ready.work.runtime, block.cells["gaussian_noise"])
    assert images is not None and noisy is not None
    assert len(images) == 100 and set(images["model"].to_pylist()) == {"w8a8"} and len(noisy) == 60


def test_a_finished_plan_is_not_run_again(small: tuple[Ready, Told], monkeypatch: pytest.MonkeyPatch) -> None:
    ready, told = small
    assert sorted(told.done) == sorted(ready.grid.cells()) and not told.failed
    monkeypatch.setattr(measure.Bench, "run", lambda *_: pytest.fail("a task ran"))
    again = ready_of(ready.grid.plan, ready.store.folder)
    assert again.todo == [] and again.cached == ready.grid.cells()
    run(again, engine_of(1), Told())


@pytest.mark.parametrize(("workers", "resident"), [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_whoever_does_it_the_table_is_the_same(
    workers: int, resident: int, small: tuple[Ready, Told], tmp_path: Path
) -> None:
    ready, told = measured(small[0].grid.plan, tmp_path / "s", workers, resident=resident)
    assert len(told.began_with) > 1
    assert table(ready) == table(small[0]) and table(ready).count("\n") > 20


def test_workers_that_are_no_processes_of_this_machine_share_an_evaluation_too(
    small: tuple[Ready, Told], tmp_path: Path
) -> None:
    found = [
        [sorted({condition for block in task.blocks for condition in block.cells}) for task in ready.todo]
        for ready in (ready_of(small[0].grid.plan, tmp_path / "s", **how) for how in ({}, {"apart": True}))
    ]
    assert found == [[["", "gaussian_noise"]], [[""], ["gaussian_noise"]]]


def test_a_plan_that_grew_measures_only_what_is_new(small: tuple[Ready, Told], tmp_path: Path) -> None:
    first = small[0].grid.plan
    store = tmp_path / "s"
    measured(dataclasses.replace(first, recipes=first.recipes[:1]), store)
    _, told = measured(first, store)
    assert [block.variant.label for task in told.began_with for block in task.blocks] == ["w4a8"]


def test_a_variant_that_fails_is_kept_as_such_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Ready, Told]
) -> None:
    real = resident.ptq.quantize

    def failing(model: Any, recipe: Any, *args: Any, **more: Any) -> Any:
        if recipe.name == "w4a8":
            raise RuntimeError("out of luck")
        return real(model, recipe, *args, **more)

    monkeypatch.setattr(resident.ptq, "quantize", failing)
    ready, told = measured(small[0].grid.plan, tmp_path / "s")
    assert len(told.failed) == 2 and len(told.done) == 4
    why = ready.store.failed(ready.work.runtime)
    assert {each["error"] for each in why.values()} == {"RuntimeError: out of luck"}
    assert all("in failing" in each["traceback"] for each in why.values())
    assert "failed: w4a8" in "".join(find(ready.grid, ready.store).notes)
    monkeypatch.undo()
    again = ready_of(ready.grid.plan, ready.store.folder)
    assert again.todo == [] and len(again.failed) == 2
    ready, told = measured(ready.grid.plan, ready.store.folder, retry_failed=True)
    assert len(told.done) == 2 and not ready.store.failed(ready.work.runtime)
    assert table(ready) == table(small[0])


def test_what_fails_together_is_tried_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Ready, Told]
) -> None:
    real = measure.evaluate

    def failing(group: Any, **more: Any) -> Any:
        if "w4a8" in group and more["corruptions"]:
            raise ValueError("noise")
        return real(group, **more)

    monkeypatch.setattr(measure, "evaluate", failing)
    ready, told = measured(small[0].grid.plan, tmp_path / "s")
    assert told.failed == [ready.grid.blocks[2].cells["gaussian_noise"]] and len(told.done) == 5


def test_what_was_kept_before_another_cell_failed_is_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Ready, Told]
) -> None:
    real = measure.table

    def failing(results: Any, label: str, block: Any, cell: str, *more: Any) -> Any:
        if (label, cell) == ("w4a8", block.cells.get("")):
            raise ValueError("odd rows")
        return real(results, label, block, cell, *more)

    monkeypatch.setattr(measure, "table", failing)
    ready, told = measured(small[0].grid.plan, tmp_path / "s")
    assert told.failed == [ready.grid.blocks[2].cells[""]]
    assert sorted([*told.done, *told.failed]) == sorted(ready.grid.cells())


@pytest.mark.parametrize("stage", ["loading", "quantizing", "w8a8: "])
def test_a_worker_whose_parent_is_gone_keeps_no_failures(stage: str, tmp_path: Path) -> None:
    ready = ready_of(plan_of(tmp_path), tmp_path / "s")

    def gone(what: str, done: int, total: int) -> None:
        if stage in what:
            raise BrokenPipeError

    bench = measure.Bench(ready.store, ready.work.runtime, 1, progress=gone)
    with pytest.raises(BrokenPipeError):
        bench.run(ready.todo[0])
    assert ready.store.failed(ready.work.runtime) == {}


def test_a_full_disk_stops_the_run_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Ready, Told]
) -> None:
    real, count = StudyStore.write, 0

    def full(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OutputError("no space left on device")
        real(*args)

    monkeypatch.setattr(StudyStore, "write", full)
    with pytest.raises(OutputError):
        measured(small[0].grid.plan, tmp_path / "s")
    monkeypatch.undo()
    ready, told = measured(small[0].grid.plan, tmp_path / "s")
    assert len(told.done) == 4 and table(ready) == table(small[0])


def test_a_set_that_changed_is_said_aloud_and_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Ready, Told]
) -> None:
    from qclip.study import facts

    real = facts.set_key
    monkeypatch.setattr(facts, "set_key", lambda data: "other" if "far" in data.spec else real(data))
    changed = ready_of(small[0].grid.plan, small[0].store.folder)
    assert changed.notes == [
        f"'{OOD}' is not what it was in an earlier run of this store: what depends on it is measured again"
    ]
    assert {c for t in changed.todo for b in t.blocks for c in b.cells} == {""}  # noise knows nothing of it


def test_an_artifact_of_another_model_is_said_aloud(tmp_path: Path) -> None:
    own, changed = qclip.load_model("scenes-clean"), qclip.load_model("scenes-clean")
    next(changed.parameters()).data.mul_(1.01)
    for name, model in (("own", own), ("other", qclip.load_model("scenes-noisy")), ("changed", changed)):
        qclip.save(qclip.quantize(model, "w8a8"), tmp_path / name)
    folders = ", ".join(f'"{tmp_path / name}"' for name in ("own", "other", "changed"))
    text = TEXT.replace("[ood]", f"[artifacts]\nscenes-clean = [{folders}]\n[ood]")
    ready = ready_of(plan_of(tmp_path, text), tmp_path / "store")
    said = "with other weights than the model under which the plan lists it, to which its differences are"
    assert ready.notes == [
        f"'{tmp_path / 'other'}' was made of 'scenes-noisy' {said}",
        f"'{tmp_path / 'changed'}' was made of 'scenes-clean' {said}",
    ]


def test_what_changed_is_said_of_the_last_run_of_any_plan(
    small: tuple[Ready, Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, grid, now = StudyStore.create(tmp_path / "s"), small[0].grid, [0.0]
    other = dataclasses.replace(grid.plan, text=grid.plan.text + "# another")
    old = dataclasses.replace(grid.facts, sets={**grid.facts.sets, OOD: "old"})
    monkeypatch.setattr(studies.time, "time", lambda: now[0])
    for plan, last in ((grid.plan, other), (other, grid.plan)):
        now[0] += 1
        studies.remember(plan, store, grid.facts)
        now[0] += 1
        studies.remember(last, store, old)
        assert len(studies.changed(grid.plan, store, grid.facts)) == 1
        assert studies.changed(grid.plan, store, old) == []


def test_a_set_that_changes_under_a_run_fails_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, told = ready_of(plan_of(tmp_path), tmp_path / "s"), Told()
    monkeypatch.setattr(resident, "set_key", lambda _: "other")
    run(ready, engine_of(1), told)
    assert len(told.failed) == 6 and not told.done
    assert (
        "has changed since the plan was expanded"
        in next(iter(ready.store.failed(ready.work.runtime).values()))["error"]
    )


def test_impossible_variants_are_listed_before_anything_is_measured(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TEXT.replace('"w4a8"', '"w4a8-gptq"'))
    with pytest.raises(InputError, match="1 variants are impossible .w4a8-gptq: it needs data"):
        ready_of(plan, tmp_path / "s")
    ready = ready_of(plan, tmp_path / "s", skip_impossible=True)
    assert [block.variant.label for block in ready.grid.blocks] == ["float", "w8a8"]


def test_what_a_method_cannot_do_to_a_model_is_listed_before_anything_is_measured(tmp_path: Path) -> None:
    more = TEXT.replace('"w4a8"', '"w8a8-hqq", "w4a16-ptq4vit"')
    plan = plan_of(tmp_path, more.replace("data =", 'calibration = "scenes:train?samples=4"\ndata ='))
    with pytest.raises(InputError, match="2 variants are impossible") as caught:
        ready_of(plan, tmp_path / "s")
    assert "w8a8-hqq of scenes-clean: hqq moves the zero points" in str(caught.value)
    assert "w4a16-ptq4vit of scenes-clean: ptq4vit searches scales of inputs" in str(caught.value)
    ready = ready_of(plan, tmp_path / "s", skip_impossible=True)
    assert [block.variant.label for block in ready.grid.blocks] == ["float", "w8a8"]
    run(dataclasses.replace(ready, todo=[]), engine_of(1), Told())
    assert recall(plan, ready.store).cells() == ready.grid.cells()  # without the model


@pytest.mark.parametrize("name", ["models", "sets", "bytes"])
def test_a_plan_whose_facts_were_edited_is_refused_by_name(
    name: str, small: tuple[Ready, Told], tmp_path: Path
) -> None:
    plan, store = small[0].grid.plan, StudyStore.create(tmp_path / "s")
    studies.remember(plan, store, small[0].grid.facts)
    (file,) = (store.folder / "plans").iterdir()
    content = json.loads(file.read_text())
    content["facts"][name] = {}
    file.write_text(json.dumps(content))
    for read in (recall, lambda *_: studies.changed(plan, store, small[0].grid.facts)):
        with pytest.raises(InputError, match="checksum") as caught:
            read(plan, store)
        assert file.name in str(caught.value)


def test_a_plan_that_was_never_run_has_no_tables(tmp_path: Path) -> None:
    store = StudyStore.create(tmp_path / "s")
    with pytest.raises(InputError, match="was never run"):
        recall(plan_of(tmp_path), store)


def test_a_task_leaves_what_another_run_measured_meanwhile(
    small: tuple[Ready, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, told = small
    bench = measure.Bench(ready.store, ready.work.runtime, 1)
    monkeypatch.setattr(measure.Bench, "_together", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(resident.Resident, "model", lambda *_: pytest.fail("a model was loaded"))
    (task,) = told.began_with
    assert sorted(bench.run(task).done) == sorted(ready.grid.cells())


def test_a_task_that_another_run_has_is_left_to_it(tmp_path: Path) -> None:
    ready = ready_of(plan_of(tmp_path), tmp_path / "s")
    bench = measure.Bench(ready.store, ready.work.runtime, 1)
    with ready.store.lock(ready.todo[0].key):
        assert bench.run(ready.todo[0]).busy


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_task_alone(small: tuple[Ready, Told], tmp_path: Path) -> None:
    plan = small[0].grid.plan
    ready = prepare(plan, StudyStore.create(tmp_path / "s"), threads=1, workers=2, resident=1)
    killed: list[int] = []

    class Killing(Told):
        def began(self, task: Any, worker: str) -> None:
            super().began(task, worker)
            if len(self.began_with) == 2:
                killed.append(pool[0].process.pid or 0)
                os.kill(killed[0], signal.SIGKILL)

    pool: list[Any] = []
    start = processes._Worker._start

    def starting(self: Any) -> None:
        start(self)
        pool.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes._Worker, "_start", starting)
        told = Killing()
        run(ready, engine_of(2), told)
    assert killed and len(pool) == 3  # another one in its place
    assert sorted(told.done) == sorted(ready.grid.cells()) and not told.failed
    assert table(ready) == table(small[0])
