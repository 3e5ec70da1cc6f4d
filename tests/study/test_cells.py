"""A cell's hash holds all that its value depends on, and nothing else: plans overlap."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study_scale import plan_of_many
from qclip.data.corruptions import members
from qclip.errors import InputError
from qclip.study.cells import CLEAN, Grid, conditions, expand
from qclip.study.facts import Facts
from qclip.study.plan import Measured, Plan, fits
from qclip.study.tasks import MEANS, Queue, Task, tasks
from tests.study.small import DATA, OOD, TEXT, plan_of

FACTS = Facts({"scenes-clean": "m"}, {DATA: "d", OOD: "o", "scenes:dev?samples=9": "v"}, {}, images={})


def grid_of(folder: Path, text: str = TEXT, facts: Facts = FACTS, **changed: Any) -> Grid:
    return expand(dataclasses.replace(plan_of(folder, text), **changed), facts)


def cell(grid: Grid, variant: str = "w8a8", condition: str = CLEAN) -> str:
    return next(block for block in grid.blocks if block.variant.label == variant).cells[condition]


def test_every_variant_has_every_condition_once(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    assert [(b.variant.label, condition) for b, condition, _ in grid] == [
        (label, condition) for label in ("float", "w8a8", "w4a8") for condition in (CLEAN, "gaussian_noise")
    ]
    assert len(grid.cells()) == len(grid) == 6


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (TEXT.replace("[3]", "[4]"), [CLEAN]),
        (TEXT.replace("replicates = 50", "replicates = 60"), []),
        (TEXT.replace("[ood]", '[ood]\nnear = ["scenes:dev?samples=9"]'), ["gaussian_noise"]),
        (TEXT.replace('scores = ["mcm"]', 'scores = ["energy"]'), ["gaussian_noise"]),
        (TEXT.replace('"gaussian_noise"', '"gaussian_noise", "fog"'), [CLEAN, "gaussian_noise"]),
        (TEXT.replace('"w8a8", ', '"w8a8", "w6a8", '), [CLEAN, "gaussian_noise"]),
        (TEXT.replace('data = ["', 'dev = "scenes:dev?samples=9"\ndata = ["'), []),
    ],
)
def test_plans_overlap_in_what_they_have_in_common(text: str, same: list[str], tmp_path: Path) -> None:
    before, after = grid_of(tmp_path), grid_of(tmp_path, text)
    for condition in (CLEAN, "gaussian_noise"):
        assert (cell(before, condition=condition) == cell(after, condition=condition)) == (condition in same)


def test_a_recipe_under_two_names_is_one_variant(tmp_path: Path) -> None:
    mine = '{name = "mine", weight_bits = 8, activation_bits = 8}'
    grid = grid_of(tmp_path, TEXT.replace('"w4a8"', mine))
    assert [block.variant.label for block in grid.blocks] == ["float", "w8a8"]
    assert [(each.name, each.why) for each in grid.impossible] == [
        ("mine", "it is w8a8 of scenes-clean under another name")
    ]
    assert cell(grid_of(tmp_path, TEXT.replace('"w8a8", "w4a8"', mine)), "mine") == cell(grid)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ('models = ["scenes-clean"]', 'models = ["scenes-clean", "copy"]', 2, "'copy' is 'scenes-clean' under another"),
        (f'data = ["{DATA}"]', f'[[data]]\ndata = "{DATA}"\n[[data]]\ndata = "{DATA}"\nnear = ["{OOD}"]', 5, "twice"),
    ],
)
def test_a_cell_has_one_name_in_a_plan(old: str, new: str, line: int, said: str, tmp_path: Path) -> None:
    facts = dataclasses.replace(FACTS, models={"scenes-clean": "m", "copy": "m"})
    with pytest.raises(InputError, match=f"plan.toml, line {line}: .*{said}"):
        grid_of(tmp_path, TEXT.replace(old, new), facts)


@pytest.mark.parametrize("facts", [{"models": {"scenes-clean": "n"}}, {"sets": FACTS.sets | {DATA: "e"}}])
def test_other_weights_and_other_images_are_other_cells(facts: dict[str, Any], tmp_path: Path) -> None:
    before, after = grid_of(tmp_path), grid_of(tmp_path, facts=dataclasses.replace(FACTS, **facts))
    assert not before.cells() & after.cells()


def test_an_ood_set_that_changed_leaves_what_it_does_not_touch(tmp_path: Path) -> None:
    before = grid_of(tmp_path)
    after = grid_of(tmp_path, facts=dataclasses.replace(FACTS, sets=FACTS.sets | {OOD: "p"}))
    assert cell(before) != cell(after) and cell(before, "w8a8", "gaussian_noise") == cell(
        after, "w8a8", "gaussian_noise"
    )


def test_a_recipe_is_its_content_not_its_name(tmp_path: Path) -> None:
    named = grid_of(tmp_path, TEXT.replace('"w8a8", ', '{name = "mine", weight_bits = 8, activation_bits = 8}, '))
    assert cell(named, "mine") == cell(grid_of(tmp_path))


def test_a_version_of_a_metric_or_a_corruption_voids_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qclip.data.corruptions import CORRUPTIONS

    before = grid_of(tmp_path)
    monkeypatch.setattr(CORRUPTIONS.get("gaussian_noise"), "version", 99)
    after = grid_of(tmp_path)
    assert cell(before) == cell(after)
    assert cell(before, condition="gaussian_noise") != cell(after, condition="gaussian_noise")


def test_a_group_that_is_whole_has_a_mean_of_its_own() -> None:
    assert conditions(Measured(("gaussian_noise", "shot_noise"))) == [CLEAN, "gaussian_noise", "shot_noise"]
    noise = ("gaussian_noise", "shot_noise", "impulse_noise")
    assert [each for each in conditions(Measured(noise)) if each not in (CLEAN, *noise)] == ["noise"]


def test_seeds_and_calibration_sets_are_cells_of_their_own(tmp_path: Path) -> None:
    data = f'calibration = ["scenes:dev?samples=9", "{OOD}"]\nseeds = [0, 1]\n'
    grid = grid_of(tmp_path, data + TEXT.replace('"w4a8"', '"w4a8-gptq"'))
    assert len(grid.cells()) == len(grid) == 2 * (2 + 4)
    other = grid_of(tmp_path, data.replace("[0, 1]", "[1, 2]") + TEXT.replace('"w4a8"', '"w4a8-gptq"'))
    assert len(grid.cells() & other.cells()) == 2 * (2 + 2)  # float and w8a8 draw nothing, and seed 1 is in both


@pytest.mark.parametrize("said", ["full = true", "jpeg85 = true"])
def test_how_images_are_corrupted_is_in_the_hash_of_corrupted_cells(said: str, tmp_path: Path) -> None:
    before, after = grid_of(tmp_path), grid_of(tmp_path, TEXT.replace("severities = [3]", f"severities = [3]\n{said}"))
    assert cell(before) == cell(after)
    assert cell(before, condition="gaussian_noise") != cell(after, condition="gaussian_noise")


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    text = TEXT.replace('"w4a8"]', '"w4a8", {name = "w8a8", weight_bits = 6, activation_bits = 8}]')
    with pytest.raises(InputError, match="two recipes are named 'w8a8'"):
        grid_of(tmp_path, text)


def test_a_quantized_model_is_quantized_no_more(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, facts=dataclasses.replace(FACTS, quantized=frozenset({"scenes-clean"})))
    assert {each.name for each in grid.impossible} == {"w8a8", "w4a8"}
    assert [block.variant.label for block in grid.blocks] == ["float"]


def test_models_go_to_the_sets_that_name_them() -> None:
    assert fits(("scenes-*",), "scenes-clean") and not fits(("scenes-*",), "photos")


def task_list(plan: Plan, done: set[str], resident: int, apart: bool = False) -> list[list[str]]:
    """Labels and conditions of each task, in the order of one worker."""
    queue, out = Queue(tasks_of(plan, done, resident, apart)), []
    while (task := queue.take()) is not None:
        conditions = dict.fromkeys(condition for block in task.blocks for condition in block.cells)
        out.append([*(block.variant.label for block in task.blocks), "|".join(conditions)])
        queue.finish(task)
    assert queue.over
    return out


def tasks_of(plan: Plan, done: set[str], resident: int, apart: bool = False) -> list[Task]:
    grid = expand(plan, FACTS)
    names = {f"scenes-clean\n{block.variant.label}": block.variant.label for block in grid.blocks}
    return tasks(grid, done, resident, names, apart)


def test_as_many_variants_as_may_be_resident_share_a_task(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TEXT.replace('"w8a8", ', '"w8a8", "w6a8", '))
    all_ = "|gaussian_noise"
    assert task_list(plan, set(), 2) == [["float", "w8a8", "w6a8", all_], ["w4a8", all_]]
    assert task_list(plan, set(), 9) == [["float", "w8a8", "w6a8", "w4a8", all_]]


def test_several_workers_share_an_evaluation_by_its_conditions(tmp_path: Path) -> None:
    noises = members("noise")
    names = ", ".join(f'"{each}"' for each in noises)
    plan = plan_of(tmp_path, TEXT.replace('names = ["gaussian_noise"]', f"names = [{names}]"))
    assert conditions(plan.measured) == [CLEAN, *noises, "noise"], "a group, whose mean is a condition"
    found = tasks_of(plan, set(), 1, True)
    said = {task.key: (task.blocks[-1].variant.label, "|".join(task.blocks[-1].cells)) for task in found}
    waits = {said[task.key]: {said[key] for key in task.after} for task in found}
    parts = [CLEAN, *noises, "noise"]
    variants = "w8a8", "w4a8"
    assert list(waits) == [(variant, part) for part in parts for variant in variants]
    for (variant, part), others in waits.items():
        floats = {("w8a8", part)} if variant == "w4a8" else set()  # whose task has float's cells
        made_of = {(each, single) for each in {variant, "w8a8"} for single in parts[:-1]}
        assert others == (made_of if part == "noise" else floats)
    assert {cell for task in found for cell in task.cells} == expand(plan, FACTS).cells()


def test_where_workers_see_each_other_s_claims_nothing_waits(tmp_path: Path) -> None:
    names = ", ".join(f'"{each}"' for each in members("noise"))
    plan = plan_of(tmp_path, TEXT.replace('names = ["gaussian_noise"]', f"names = [{names}]"))
    grid = expand(plan, FACTS)
    keys = {f"scenes-clean\n{block.variant.label}": block.variant.label for block in grid.blocks}
    found = {claims: tasks(grid, set(), 1, keys, apart=True, claims=claims) for claims in (False, True)}
    assert [task.cells for task in found[True]] == [task.cells for task in found[False]]
    assert any(task.after for task in found[False]) and not any(task.after for task in found[True])


def test_means_of_groups_are_spread_over_the_workers(tmp_path: Path) -> None:
    names = ", ".join(f'"{each}"' for each in members("noise"))
    recipes = ", ".join(f'"w{bits}a8"' for bits in range(2, 9))
    text = TEXT.replace('"w8a8", "w4a8"', recipes).replace('names = ["gaussian_noise"]', f"names = [{names}]")
    found = tasks_of(plan_of(tmp_path, text), set(), 9, True)
    sizes: dict[str, list[int]] = {"|".join(task.blocks[-1].cells): [] for task in found}
    for task in found:
        sizes["|".join(task.blocks[-1].cells)].append(len(task.blocks))
    assert sizes.pop("noise") == [1 + MEANS, 7 - MEANS], "float's own is with the first"
    assert set(map(tuple, sizes.values())) == {(1 + 7,)}, "where images are embedded all variants share them"
    assert len(tasks_of(plan_of(tmp_path, text), set(), 9)) == 1


def test_what_is_done_is_in_no_task(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    grid = expand(plan, FACTS)
    assert task_list(plan, grid.cells(), 2) == []
    assert task_list(plan, set(grid.blocks[1].cells.values()), 2) == [["float", "w4a8", "|gaussian_noise"]]
    assert task_list(plan, grid.cells() - {grid.blocks[0].cells[CLEAN]}, 2) == [["float", CLEAN]]


def test_others_wait_for_the_float_model_s_task_and_what_is_put_back_comes_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TEXT.replace('"w8a8", ', '"w8a8", "w6a8", '))
    queue = Queue(tasks_of(plan, set(), 1))
    first = queue.take()
    assert first is not None and queue.take() is None and not queue.over
    queue.put_back(first)
    assert queue.take() is first
    queue.finish(first)
    assert {task.blocks[0].variant.label for task in (queue.take(), queue.take()) if task} == {"w6a8", "w4a8"}


def test_what_is_put_back_is_the_last_again_or_soon_the_next(tmp_path: Path) -> None:
    names = ", ".join(f'"{each}"' for each in members("noise"))
    plan = plan_of(tmp_path, TEXT.replace('names = ["gaussian_noise"]', f"names = [{names}]"))
    queue = Queue(tasks_of(plan, set(), 9, True))
    first = queue.take()
    assert first is not None
    queue.put_back(first, soon=True)
    assert queue.take() is first
    queue.put_back(first)
    second = queue.take()
    assert second is not None and second is not first


def test_the_benchmark_of_large_plans_has_a_task_for_every_cell_once(tmp_path: Path) -> None:
    found = plan_of_many(tmp_path, seeds=1)
    assert found["cells"] > 10_000 and found["tasks"] > 100
