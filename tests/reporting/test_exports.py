"""Results in other tools' formats: their names, their conventions, their schema.

`tests/data/every_eval_ever-0.3.0.json` is that of evaleval/every_eval_ever as it was published, under the MIT license.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest

from qclip import Results
from qclip.cli import main
from qclip.errors import InputError, OutputExistsError
from qclip.reliability import evaluate
from qclip.reporting.exports import FORMATS, export
from tests.reliability.fakes import Tiny, pictures

SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "every_eval_ever-0.3.0.json").read_text())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
        patch.setattr("qclip.reliability.engine.REPLICATES", 100)
        path = tmp_path_factory.mktemp("samples") / "samples.parquet"
        ood = {"near": pictures("close", 40, seed=3, strange=True), "far": pictures("noise", 30, seed=4, strange=True)}
        models = {"float": Tiny(), "w/8 a8": Tiny(0.3)}
        return evaluate(models, pictures(), ood=ood, corruptions=["gaussian_noise"], cache=False, samples=path), path


def test_clip_benchmark_s_names_and_files(evaluated: tuple[Results, Path]) -> None:
    made = FORMATS.made("clip_benchmark")(evaluated[0])
    assert "pets_float_w-8-a8_en_zeroshot_classification.json" in made
    record = json.loads(made["pets_float_w-8-a8_en_zeroshot_classification.json"])
    assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert set(record["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert record["metrics"]["acc1"] == evaluated[0].value(model="w/8 a8", metric="top1", set="pets", role="id")
    rows = list(csv.DictReader(io.StringIO(made["benchmark.csv"])))
    assert [row["model_fullname"] for row in rows] == ["float float", "w/8 a8 float"]
    assert float(rows[0]["acc1"]) == pytest.approx(
        evaluated[0].value(model="float", metric="top1", set="pets", role="id")
    )


def test_an_undefined_top5_is_clip_benchmark_s_nan() -> None:
    results = Results()
    for name, value in (("top1", 0.5), ("top5", None)):
        results.add(model="a", set="s", role="id", metric=name, value=value)
    (name,) = [name for name in FORMATS.made("clip_benchmark")(results) if name.endswith(".json")]
    assert math.isnan(json.loads(FORMATS.made("clip_benchmark")(results)[name])["metrics"]["acc5"])


def alike() -> Results:
    """Two pairs of models that only their names tell apart: by case, and by what a file's name does not hold."""
    results = Results()
    for k, model in enumerate(("w8/a8", "w8 a8", "W8-A8")):
        common = {"model": model, "source": "photos", "recipe": "w8a8", "set": "s"}
        results.add(**common, role="id", metric="top1", value=k / 10)
        results.add(**common, role="ood", score="mcm", metric="auroc", value=k / 10)
    return results


@pytest.mark.parametrize("name", FORMATS.names())
def test_no_model_is_lost_to_another_of_a_like_name(name: str, tmp_path: Path) -> None:
    made = {file: text for file, text in FORMATS.made(name)(alike()).items() if file != "benchmark.csv"}
    assert len(made) == len({file.lower() for file in made}) == len(set(made.values())) == 3
    assert len(export(alike(), name, tmp_path / "out")) == len(list((tmp_path / "out").iterdir()))


def test_clip_benchmark_tells_models_of_one_source_and_recipe_apart() -> None:
    made = FORMATS.made("clip_benchmark")(alike())
    rows = list(csv.DictReader(io.StringIO(made["benchmark.csv"])))
    assert [(row["model"], row["pretrained"], float(row["acc1"])) for row in rows] == [
        ("photos", "w8a8 w8/a8", 0.0),
        ("photos", "w8a8 w8 a8", 0.1),
        ("photos", "w8a8 W8-A8", 0.2),
    ]


def test_clip_benchmark_s_image_retrieval_finds_images_by_texts() -> None:
    results = Results()
    for metric, value in (("text_to_image_recall", 0.25), ("image_to_text_recall", 0.75)):
        results.add(model="m", set="s", role="captions", metric=metric, axis="k", at=5, value=value)
    (text,) = [text for file, text in FORMATS.made("clip_benchmark")(results).items() if file.endswith(".json")]
    assert json.loads(text)["metrics"] == {"image_retrieval_recall@5": 0.25, "text_retrieval_recall@5": 0.75}


def test_openood_s_means_are_over_the_sets_of_a_kind() -> None:
    results = Results()
    for set_, value in (("a", 0.5), ("b", 0.75)):
        common = {"model": "m", "set": set_, "role": "ood-near", "score": "mcm"}
        for metric in ("fpr95_ood_positive", "auroc", "aupr_in_trapezoid", "aupr_out_trapezoid"):
            results.add(**common, metric=metric, value=value)
        results.add(**common, metric="fpr95", value=0.125)  # of the other convention
    rows = list(csv.DictReader(io.StringIO(FORMATS.made("openood")(results)["m_mcm.csv"])))
    assert [(row["dataset"], row["FPR@95"], row["AUROC"]) for row in rows] == [
        ("a", "50.00", "50.00"),
        ("b", "75.00", "75.00"),
        ("nearood", "62.50", "62.50"),
    ]


def test_openood_s_columns_conventions_and_means(evaluated: tuple[Results, Path]) -> None:
    results = evaluated[0]
    made = FORMATS.made("openood")(results)
    rows = list(csv.DictReader(io.StringIO(made["float_mcm.csv"])))
    assert [row["dataset"] for row in rows] == ["close", "nearood", "noise", "farood"]
    assert list(rows[0]) == ["dataset", "FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]
    wanted = results.value(model="float", metric="fpr95_ood_positive", set="noise", score="mcm")
    assert wanted is not None and rows[2]["FPR@95"] == rows[3]["FPR@95"] == f"{100 * wanted:.2f}"
    assert all(0 < float(row[name]) <= 100 for row in rows for name in ("AUPR_IN", "AUPR_OUT"))
    assert float(rows[0]["ACC"]) == pytest.approx(
        100 * results.value(model="float", metric="top1", set="pets"), abs=0.01
    )


def test_every_eval_ever_s_schema_holds(evaluated: tuple[Results, Path]) -> None:
    results = evaluated[0]
    made = FORMATS.made("every_eval_ever")(results)
    checker = jsonschema.Draft7Validator(SCHEMA)
    assert set(made) == {"float.json", "w-8-a8.json"}
    for text in made.values():
        assert not [error.message for error in checker.iter_errors(json.loads(text))]
    found = json.loads(made["w-8-a8.json"])["evaluation_results"]
    (own,) = [each for each in found if each["evaluation_result_id"] == "ece on pets role=id"]
    row = results.row(model="w/8 a8", metric="ece", set="pets", role="id")
    assert row is not None and own["score_details"]["score"] == row["value"]
    interval = own["score_details"]["uncertainty"]["confidence_interval"]
    assert (interval["lower"], interval["upper"]) == (row["low"], row["high"])
    assert own["metric_config"]["lower_is_better"] is True
    assert own["score_details"]["uncertainty"]["num_bootstrap_samples"] == 100
    assert any("minus float" in each["evaluation_result_id"] for each in found)
    broken = json.loads(made["float.json"])
    del broken["evaluation_results"][0]["metric_config"]["lower_is_better"]
    assert list(checker.iter_errors(broken))


def test_files_are_written_all_or_none(tmp_path: Path, evaluated: tuple[Results, Path]) -> None:
    results = evaluated[0]
    first = export(results, "every_eval_ever", tmp_path / "out")
    assert sorted(path.name for path in first) == ["float.json", "w-8-a8.json"]
    with pytest.raises(OutputExistsError):
        export(results, "every_eval_ever", tmp_path / "out")
    with pytest.raises(InputError, match="nothing that OpenOOD has a place for"):
        export(Results(), "openood", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="did you mean 'openood'"):
        export(results, "openod", tmp_path / "none")


def test_the_command_writes_a_format(tmp_path: Path, evaluated: tuple[Results, Path], capsys) -> None:
    evaluated[0].to_json(tmp_path / "results.json")
    line = ["report", str(tmp_path / "results.json"), "--format", "openood"]
    assert main(line) == 2 and "--output DIR" in capsys.readouterr().err
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    assert "float_mcm.csv" in capsys.readouterr().out


def test_every_image_is_in_the_table_of_samples(evaluated: tuple[Results, Path]) -> None:
    results, path = evaluated
    table = pq.read_table(path).to_pylist()
    own = [row for row in table if row["model"] == "w/8 a8" and row["set"] == "pets" and not row["corruption"]]
    assert len(own) == 90 and [row["image"] for row in own] == list(range(90))
    assert np.mean([row["rank"] == 0 for row in own]) == pytest.approx(
        results.value(model="w/8 a8", metric="top1", set="pets", role="id")
    )
    assert np.mean([row["nll"] for row in own]) == pytest.approx(
        results.value(model="w/8 a8", metric="nll", set="pets", role="id")
    )
    strange = [row for row in table if row["set"] == "noise"]
    assert len(strange) == 60 and strange[0]["label"] is None and math.isfinite(strange[0]["score_mcm"])
    assert {(row["corruption"], row["severity"]) for row in table} >= {("gaussian_noise", k) for k in range(1, 6)}
