"""docs/study.md is what its committed results say; verdicts on the paper's claims follow from intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks import study as command
from benchmarks.study_page import page
from benchmarks.study_page.claims import AGREES, DENIES, OPEN, beyond_chance, lead
from qclip.study.rows import SCHEMA, VOLATILE
from qclip.study.run import Ready
from qclip.study.variants import FLOAT
from tests.study.small import measured, plan_of

TEXT = """
models = ["scenes-clean"]
recipes = ["w8a8", "w4a8-hqq"]
data = ["scenes:test?samples=24"]
shift = ["scenes:spurious-test?samples=24"]
[ood]
near = ["scenes:near-ood?samples=12"]
far = ["scenes:far-ood?samples=12"]
[corruptions]
names = ["gaussian_noise"]
severities = [3]
[statistics]
measurements = ["clean", "ood", "groups", "corrupted"]
scores = ["mcm"]
replicates = 30
batch = 32
"""


def test_the_page_is_that_of_its_results() -> None:
    assert command.PAGE.read_text() == page(*command.results()), "write it again: python -m benchmarks.study write"
    assert (command.FOLDER / "published.parquet").stat().st_size <= 3 << 20


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("page")
    return measured(plan_of(folder, TEXT), folder / "store")[0]


def test_what_is_kept_are_the_store_s_rows_and_its_joint_wins(ready: Ready, tmp_path: Path) -> None:
    path = command.keep(ready.grid, ready.store, tmp_path)
    rows = pq.read_table(path).to_pylist()
    assert set(rows[0]) == set(SCHEMA.names) - set(VOLATILE)
    stored = {tuple(str(row[name]) for name in rows[0]) for row in ready.store.rows().to_pylist()}
    own = [row for row in rows if row["variant"]]
    assert {tuple(str(row[name]) for name in rows[0]) for row in own} <= stored
    assert {row["metric"] for row in own} == set(command.METRICS)
    assert not [row for row in own if row["corruption"] and not row["metric"].startswith("mean_")]
    wins = {row["metric"]: row for row in rows if not row["variant"]}
    assert wins.keys() == set(command.WINS) and wins["wins"]["n"] == 2
    again = command.keep(ready.grid, ready.store, tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()
    rows, record = command.results(tmp_path)
    assert record == {"runs": [], "plan": "plan.toml", "cells": 6, "variants": 3}
    text = page(rows, record)
    assert text.count("\n### ") == 4 and "| `w4a8-hqq` | hqq | 4/8 |" in text
    assert "What it took was not noted." in text and "no spectra were measured" in text


def test_a_run_notes_its_estimate_beside_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"seconds": 90.0, "images": 7}
    monkeypatch.setattr(command, "estimate", lambda ready, workers, probe: expected)
    plan = plan_of(tmp_path, TEXT.replace(', "w4a8-hqq"', ""))
    store = command.StudyStore.create(tmp_path / "store")
    for _ in range(2):  # the second finds everything there, and notes nothing
        command.keep(command.measure(plan, store, 1, 1, tmp_path), store, tmp_path)
    rows, record = command.results(tmp_path)
    (run,) = record["runs"]
    assert run["cells"] == record["cells"] == 4 and run["seconds"] > 0 and run["estimated_seconds"] == 90
    assert f"| {run['cpu']} | 1 x 1 | 4 | 0 | 7 | 1.5 min | {run['seconds'] / 60:.1f} min |" in page(rows, record)


GOOD, BAD, UNCLEAR = (0.02, 0.01, 0.03), (-0.02, -0.03, -0.01), (0.02, -0.01, 0.05)
Ends = tuple[float, float, float]


def rows_of(model: str, gap: float = 0.0, **differences: list[Ends]) -> list[dict[str, Any]]:
    """Rows of a synthetic store: `metric` or `metric_role` -> differences of variants v0, v1 ..."""
    out = []
    places = {"auroc": "ood-far", "mean_top1": "corrupted", "worst_group_top1": "shift"}

    def add(variant: str, name: str, role: str, ends: Ends, reference: str = "") -> None:
        row = dict.fromkeys(SCHEMA.names, "") | {"model": model, "variant": variant, "metric": name, "role": role}
        row |= {"cell": f"{model} {variant}", "subset": "all", "severity": 0, "seed": 0, "at": None, "n": 99}
        row |= {"set": "grouped" if name == "worst_group_top1" else role, "reference": reference}
        row |= {"score": "mcm" if name == "auroc" else "", "corruption": "shot_noise" if name == "mean_top1" else ""}
        row |= {"method": "rtn", "bits": "4/8", "value": ends[0], "low": ends[1], "high": ends[2], "evaluation": "e"}
        out.append(row)

    add(FLOAT, "signed_gap", "id", (gap, gap - 0.01, gap + 0.01))
    for key, listed in differences.items():
        name, _, role = key.partition("__")
        role = role or places.get(name, "id")
        add(FLOAT, name, role, (0.5, 0.4, 0.6))
        for at, ends in enumerate(listed):
            add(f"v{at}", name, role, (0.5, 0.4, 0.6))
            add(f"v{at}", name, role, ends, FLOAT)
    return out


def wins_of(model: str, count: int, p: float) -> list[dict[str, Any]]:
    common = dict.fromkeys(SCHEMA.names, "") | {"model": model, "score": "mcm", "subset": "all", "reference": FLOAT}
    common |= {"n": 4, "low": None, "high": None}
    values = {"wins": (count, None, None), "wins_expected": (0.75, 0.0, 2.0), "wins_p": (p, None, None)}
    return [common | {"metric": name, "value": v, "low": a, "high": b} for name, (v, a, b) in values.items()]


def under(text: str, title: str) -> str:
    """The list below a heading."""
    return text.split(f"## {title}\n")[1].split("\n\n")[0]


VERDICTS = {AGREES: "What agrees with the paper", DENIES: "What does not"}
VERDICTS |= {OPEN: "What these models are too small to tell"}


@pytest.mark.parametrize(
    ("rows", "said", "verdict"),
    [
        (rows_of("m", 0.1, ece=[GOOD] * 4), "Calibration of overconfident `m` worsens: 0 better, 4 worse", AGREES),
        (rows_of("m", 0.1, ece=[BAD] * 4), "Calibration of overconfident `m` worsens: 4 better, 0 worse", DENIES),
        (rows_of("m", -0.1, ece=[BAD] * 4), "Calibration of underconfident `m` improves: 4 better", AGREES),
        (rows_of("m", -0.1, ece=[UNCLEAR] * 4), "improves: 0 better, 0 worse, 4 not told, of 4", OPEN),
        (rows_of("m", 0.0, ece=[GOOD] * 4), "`m` changes as over- or underconfident models do", OPEN),
        (rows_of("m", mean_top1=[GOOD] * 3 + [BAD]), "Robustness to noise rises: 3 better, 1 worse", AGREES),
        (rows_of("m", mean_top1=[BAD] * 3), "Robustness to noise rises: 0 better, 3 worse", DENIES),
        (rows_of("m", mean_top1=[GOOD, *[UNCLEAR] * 39]), "Robustness to noise rises: 1 better, 0 worse", OPEN),
        (rows_of("m", top1__shift=[BAD] * 2), "Accuracy under covariate shift does not rise but falls: 0", AGREES),
        (rows_of("m", top1__shift=[GOOD] * 2), "Accuracy under covariate shift does not rise but falls: 2", DENIES),
        (rows_of("m", worst_group_top1=[BAD] * 2), "the worst group loses: 0 better, 2 worse", AGREES),
        (
            rows_of("m", ece=[GOOD] * 2, auroc=[GOOD] * 2),
            "calibration gets worse: ECE is told worse in 2",
            AGREES,
        ),
        (rows_of("m", ece=[GOOD] * 2, auroc=[BAD] * 2), "calibration gets worse: ECE is told worse in 2", DENIES),
        (rows_of("m", ece=[BAD] * 2, auroc=[GOOD] * 2), "calibration gets worse: ECE is told worse in 0", OPEN),
        (rows_of("m") + wins_of("m", 4, 0.01), "4 of 4 variants are better in all three by MCM, where", AGREES),
        (rows_of("m") + wins_of("m", 1, 0.4), "1 of 4 variants are better in all three by MCM", OPEN),
    ],
)
def test_claims_stand_where_their_intervals_put_them(rows: list[dict[str, Any]], said: str, verdict: str) -> None:
    text = page(rows, {})
    assert [word for word, title in VERDICTS.items() if said in under(text, title)] == [verdict]


def test_holm_counts_all_joint_wins_of_the_table() -> None:
    text = page(rows_of("m") + wins_of("m", 3, 0.03) + rows_of("n") + wins_of("n", 1, 0.5), {})
    assert "| `m` | mcm | 4 | 3 | 0.75 | 0 to 2 | 0.030 | 0.060 | 0 |" in text
    assert "4 of 8 variants are better in all three by MCM, where chance gives 1.5; 0 of 2" in text
    all_three = rows_of("m", top1=[GOOD, GOOD], ece=[BAD, GOOD], auroc=[GOOD, GOOD]) + wins_of("m", 1, 0.5)
    assert "| 0.500 | 0.500 | 1 |" in page(all_three, {})


def test_a_set_with_groups_is_no_covariate_shift_and_means_are_of_float_s_sets() -> None:
    rows = rows_of("m", worst_group_top1=[UNCLEAR], top1__shift=[GOOD])
    for row in rows:
        if row["metric"] == "top1":
            row["set"] = "grouped"
    text = page(rows, {})
    assert "Accuracy under covariate shift does not rise but falls: nothing of it was measured" in text
    assert "| Top-1 accuracy (shift and groups) | 1 | 0 | 0 % |" in text
    assert "| Worst group's top-1 (shift and groups) | 1 | 1 | 100 % |" in text


def test_differences_stand_in_tables_with_intervals() -> None:
    text = page(rows_of("m", top1=[GOOD, UNCLEAR], mean_top1=[BAD, UNCLEAR]), {})
    assert "| variant | method | bits | Top-1 accuracy |" in text
    assert "| `v0` | rtn | 4/8 | **+2.00 [+1.00, +3.00]** |" in text and "| +2.00 [−1.00, +5.00] |" in text
    assert "| `m` | top-1 under shot noise | 0 | 1 | 1 |" in text


def test_scores_are_not_mixed() -> None:
    rows = rows_of("m", auroc=[GOOD, GOOD])
    others = [row | {"score": "energy"} for row in rows if row["metric"] == "auroc"]
    text = page([*rows, *others], {})
    assert "| AUROC (OOD detection, AUROC by MCM) | 2 | 0 | 0 % |" in text


def test_two_evaluations_of_a_model_are_refused() -> None:
    rows = rows_of("m", top1=[GOOD])
    with pytest.raises(ValueError, match="two labelled sets"):
        page([*rows, *(row | {"evaluation": "f", "cell": "c"} for row in rows)], {})


def test_a_lead_is_more_than_chance_tells() -> None:
    assert [beyond_chance(told, 4) for told in (0, 1, 2)] == [False, False, True]
    assert [beyond_chance(told, 40) for told in (2, 3, 4)] == [False, False, True]
    assert [lead(2, 1, 4), lead(1, 2, 4), lead(2, 2, 4), lead(0, 0, 0)] == [AGREES, DENIES, OPEN, OPEN]


def tower(variant: str, shape: float, level: float = 0.99, tail: float = 0.98, beyond: float = -0.01) -> list[dict]:
    """Rows of one tower's spectrum: intervals of no width, and each control `beyond` away in shape and level."""
    common = dict.fromkeys(SCHEMA.names, "") | {"model": "m", "variant": variant, "role": "tower", "set": "vision"}
    common |= {"cell": f"m {variant}", "evaluation": "e", "severity": 0, "seed": 0, "at": None, "n": 26}

    def row(name: str, value: float, reference: str = "", at: str | None = None, band: str = "all") -> dict[str, Any]:
        own = {"metric": name, "value": value, "low": value, "high": value, "reference": reference, "at": at}
        return common | own | {"axis": "band" if at else "", "subset": band}

    rows = [row("level", level), row("shape", shape)]
    for control in ("white", "uniform", "shuffled", "shrink"):
        rows += [row("level", beyond, control), row("shape", beyond, control)]
    return [*rows, row("gain", 0.999, at="0", band="ranks 0-8"), row("gain", tail, at="64", band="ranks 64-")]


@pytest.mark.parametrize(
    ("made", "verdict", "said"),
    [
        ([{"shape": -0.02}] * 3, AGREES, "of 3 towers of variants high-rank damping beyond every control in 3"),
        ([{"shape": 0.0, "beyond": -0.01}] * 3, DENIES, "of 3 towers of variants a shrink in 3"),
        ([{"shape": 0.0, "beyond": 0.0}] * 3, OPEN, "of 3 towers of variants nothing beyond the controls in 3"),
    ],
)
def test_damping_agrees_only_beyond_every_control(made: list[dict[str, float]], verdict: str, said: str) -> None:
    rows = [row for at, how in enumerate(made) for row in tower(f"v{at}", **how)]
    text = page(rows_of("m", top1=[UNCLEAR] * 3) + rows, {})
    assert [word for word, title in VERDICTS.items() if said in under(text, title)] == [verdict]
    shape = made[0]["shape"]
    assert f"| `m` | `v0` | vision | 0.9900 [0.9900, 0.9900] | {shape:.4f} [{shape:.4f}, {shape:.4f}] |" in text


def test_correlations_with_spectra_are_corrected_for_all_that_were_tested() -> None:
    gaps: list[Ends] = [(-0.01 * at, -1.0, 1.0) for at in range(6)]
    towers = [row for at in range(6) for row in tower(f"v{at}", -0.001 * at)]
    text = page(rows_of("m", top1=gaps) + towers, {})
    assert "| `m` | shape (vision) | top1 on id | 6 | +1.00 | 0.0028 | 0.003 |" in text
    said = (
        "of 1 rank correlations of a tower's level or shape with a difference to float 1 have p <= 0.05, 1 after Holm"
    )
    assert said in under(text, VERDICTS[AGREES])
    other = [(0.01 * at * (-1) ** at, -1.0, 1.0) for at in range(6)]
    text = page(rows_of("m", top1=gaps, ece=other, auroc=other) + towers, {})
    assert "of 3 rank correlations" in text and "| +1.00 | 0.0028 | 0.008 |" in text
    rows = rows_of("m", auroc=gaps) + towers
    unlike = [row | {"score": "energy", "value": 0.1} for row in rows if row["metric"] == "auroc" and row["reference"]]
    whole = [row | {"score": "energy"} for row in rows if row["metric"] == "auroc" and not row["reference"]]
    assert "| auroc on ood-far | 6 | +1.00 |" in page(
        rows + whole + unlike, {}
    )  # of MCM, not of the score that is last
