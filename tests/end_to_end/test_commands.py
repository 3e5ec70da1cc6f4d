"""Whole commands on small inputs: what they print, write and leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qclip.cli import main
from qclip.spectral import CONTROLS

pytestmark = pytest.mark.slow  # whole commands


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_quantize_then_evaluate_the_artifact(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["quantize", tiny_model, "--recipe", "w4a8", "--output", "small", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] < 0.4 * told["float32_bytes"] and told["coverage"]["real"]["macs"] > 0.5
    assert main(["quantize", tiny_model, "--recipe", "w4a8", "--output", "small"]) == 2
    assert "--force" in capsys.readouterr().err
    sets = ["--shift", "scenes:style-shift?samples=20", "--ood", "far=scenes:far-ood?samples=20"]
    line = ["evaluate", tiny_model, "small", "--data", "scenes:test?samples=40", *sets, "--output", "out"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "report: out/report.html" in out
    assert sorted(p.name for p in Path("out").iterdir()) == ["report.html", "results.json"]
    rows = json.loads(Path("out/results.json").read_text())["rows"]
    found = {(r.get("model"), r.get("set"), r["metric"]) for r in rows if not r.get("reference")}
    assert ("small", "scenes-test", "top1") in found and ("small", "scenes-far-ood", "auroc") in found
    assert any(r["metric"] == "cosine_mean" and r.get("model") == "small" for r in rows)
    assert main(line) == 2  # the output is there
    assert main(["report", "out/results.json", "--output", "again.html"]) == 0
    assert "<svg" in Path("again.html").read_text()


def test_one_s_own_pictures_classes_and_templates(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from PIL import Image

    for number, colour in enumerate(["red", "blue"]):
        folder = tmp_path / "pictures" / str(number)
        folder.mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 40), colour).save(folder / f"{i}.png")
    (tmp_path / "pictures" / "1" / "broken.png").write_bytes(b"no image")
    Path("classes.txt").write_text("red thing\nblue thing\n")
    Path("templates.txt").write_text("a picture of a {}.\n{}\n")
    line = [
        "evaluate",
        tiny_model,
        "--recipe",
        "float",
        "--recipe",
        "w8a8",
        "--data",
        "folder:pictures",
        "--classes",
        "classes.txt",
        "--templates",
        "templates.txt",
        "--no-cache",
        "--json",
    ]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("broken.png" in note for note in found["notes"])
    assert {r["n"] for r in found["rows"] if r["metric"] == "top1" and not {"subset", "axis"} & r.keys()} == {12}
    assert not (tmp_path / "cache").exists()
    assert main([*line, "--strict"]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_quantize_names_unreadable_calibration_images_and_strict_stops(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no image")
    line = ["quantize", tiny_model, "--recipe", "w8a8-static", "--calibration", "folder:pictures", "--output", "small"]
    assert main([*line, "--strict"]) == 2
    err = capsys.readouterr().err
    assert "broken.png" in err and not Path("small").exists()
    other = ["evaluate", *line[1:-2], "--data", "scenes:test?samples=20", "--no-cache", "--strict"]
    assert main(other) == 2
    assert "broken.png" in capsys.readouterr().err
    assert main(line) == 0
    err = capsys.readouterr().err
    assert "broken.png" in err and "0 %  calibration" in err


def test_spectrum_compares_with_the_float_weights(tiny_model: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["spectrum", tiny_model, "--recipe", "w4a8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["model"] for r in rows} == {"float", "w4a8"} and "gain" in {r["metric"] for r in rows}


def test_demo_on_a_small_sample(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = ["demo", "--samples", "24", "--no-cache"]
    assert main(line) == 0
    assert "report: qclip-demo/report.html" in capsys.readouterr().out
    body = json.loads(Path("qclip-demo/results.json").read_text())
    models = {r["model"] for r in body["rows"] if r.get("model")}
    assert models == {f"{m} {r}" for m in ("scenes-clean", "scenes-noisy") for r in ("float", "w8a8", "w4a8", "w4a4")}
    references = {r.get("reference") for r in body["rows"]} - {"", None, *CONTROLS.names()}
    assert references == {"scenes-clean float", "scenes-noisy float"}
    assert {"scenes-near-ood", "scenes-far-ood", "scenes-style-shift", "scenes-spurious-test"} <= {
        r.get("set") for r in body["rows"]
    }
    first = Path("qclip-demo/results.json").stat().st_mtime_ns
    assert main(line) == 0  # its own earlier output is replaced without --force
    assert Path("qclip-demo/results.json").stat().st_mtime_ns > first
    assert sorted(p.name for p in Path("qclip-demo").iterdir()) == ["report.html", "results.json"]


def test_bench_measures_the_same_call(tiny_model: str, capsys: pytest.CaptureFixture) -> None:
    line = ["bench", tiny_model, "--batch", "2", "--seconds", "3000", "--peers", "torch-fp32,torch-bf16", "--json"]
    assert main(line) == 0  # long before that: it ends when everyone has had turns enough
    found = json.loads(capsys.readouterr().out)
    assert [s["setting"] for s in found["peers"]["torch-fp32"]["settings"]] in (
        ["eager", "compiled"],
        ["compiled", "eager"],
    )
    assert found["absent"] == found["failed"] == {} and not found["interrupted"]
    assert set(found["peers"]) == set(found["ratios"]) == {"torch-fp32", "torch-bf16"}
    for name, ratio in found["ratios"].items():
        assert ratio == pytest.approx(found["peers"][name]["seconds"] / found["ours"]["seconds"])
    assert found["ours"]["cosine"] > 0.99 and found["peers"]["torch-fp32"]["cosine"] == pytest.approx(1)
    # patch 16 x 192 x 64, two blocks of 17 tokens (attention in and out, MLP, scores), projection: by hand
    image = 16 * 192 * 64 + 2 * 17 * (4 * 64 * 64 + 2 * 64 * 256 + 2 * 17 * 64) + 64 * 64
    assert found["macs"] == 2 * image


def test_bench_of_the_text_tower_counts_what_runs(tiny_model: str, capsys: pytest.CaptureFixture) -> None:
    assert (
        main(["bench", tiny_model, "--tower", "text", "--batch", "3", "--seconds", "0.1", "--peers", "none", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    whole = 3 * (2 * 32 * (4 * 64 * 64 + 2 * 64 * 256 + 2 * 32 * 64) + 64 * 64)
    assert found["peers"] == {} and 0 < found["macs"] <= whole


def test_doctor_finds_what_is_here(capsys: pytest.CaptureFixture) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (1 if found["problems"] else 0)
    assert found["versions"]["torch"] and found["kernels"]["backend"] in ("cpu", "reference")
    if found["kernels"]["built"]:
        assert found["kernels"]["int8_peak_gops"] > 0 and found["kernels"]["agrees_with_reference"] is True
    assert found["costs"]["quantize_and_pack_ms"] > 0
    if found["kernels"]["backend"] == "cpu":
        assert found["costs"]["program_native"] > 20
        programs = found["programs"]
        assert programs["recorded"] == 1 and programs["derived"] == 6 and programs["replayed"] == 30 + 1
        assert 0 < programs["bytes"] < programs["limit"]


def test_models_are_found_by_a_part_of_their_name(capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "vit-b-32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any(name.startswith("ViT-B-32") for name in found["open_clip"])
    assert main(["models", "zzzzzz"]) == 2
