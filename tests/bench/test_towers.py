"""Files of measured towers: how they are named, when they are written, and the picture that is drawn of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import plot, towers
from qclip.bench.processor import HOLD

EPYC = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9354P 32-Core Processor\n"
XEON = "cpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz\n"


def found(tier: str = "avx2", **more: Any) -> dict[str, Any]:
    row = {"ms_per_item": 30.0, "setting": "eager", "remark": ""}
    body: dict[str, Any] = {"model": "ViT-B-32", "recipe": "w8a8", "tower": "image", "batch": 16, "full": False}
    body |= {"cpu": "A CPU", "threads": 2, "tier": tier, "ours": {"ms_per_item": 10.0}, "peers": {"torch-fp32": row}}
    body |= {"ratios": {"torch-fp32": 3.0}, "percent_of_peak": 80.0, "warnings": [], "absent": {}, "interrupted": False}
    return body | more


@pytest.mark.parametrize(
    ("cpuinfo", "name"), [(EPYC, "AMD-EPYC-9354P-32-Core-f25m17"), (XEON, "Intel-Xeon-Gold-6230-f6m85")]
)
def test_a_file_is_named_after_the_processor(cpuinfo: str, name: str) -> None:
    assert towers.processor_id(cpuinfo) == name


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands that were started, and their environment; nothing is measured."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **more: Any) -> SimpleNamespace:
        calls.append((command, env))
        return SimpleNamespace(returncode=0, stdout=json.dumps(found()))

    monkeypatch.setattr(towers, "RESULTS", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_pieces_that_are_there_are_not_measured_again(
    ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["towers", "--hold", "avx2", "--seconds", "100"])
    assert towers.main() == 0 and len(ran) == len(towers.PIECES)
    for _, environment in ran:
        assert HOLD["avx2"].items() <= environment.items()
    assert {path.name.partition("-avx2-")[2].removesuffix(".json") for path in tmp_path.iterdir()} == set(towers.PIECES)
    assert "torch-fp32 3.00x (eager)" in capsys.readouterr().out
    next(tmp_path.iterdir()).unlink()
    assert towers.main() == 0 and len(ran) == len(towers.PIECES) + 1


@pytest.mark.parametrize("spoilt", [{"interrupted": True}, {"ours": None}])
def test_what_is_not_whole_is_not_written(
    ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: dict[str, Any]
) -> None:
    answer = SimpleNamespace(returncode=0, stdout=json.dumps(found(**spoilt)))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: answer)
    towers.run("vit-b-32-image-1-w8a8", None, 10, tmp_path / "x.json")
    answer.returncode, answer.stdout = 1, ""
    assert towers.run("vit-b-32-image-1-w8a8", None, 10, tmp_path / "x.json") == 1
    assert not list(tmp_path.iterdir())


def test_a_peer_that_fails_is_named_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    failed = {"onnxruntime": {"log": "/home/somebody/x.py: no session"}}
    answer = SimpleNamespace(returncode=1, stdout=json.dumps(found(failed=failed)))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: answer)
    towers.run("vit-b-32-image-1-w8a8", None, 10, tmp_path / "x.json")
    written = (tmp_path / "x.json").read_text()
    assert json.loads(written)["failed"] == {"onnxruntime": {}} and "somebody" not in written
    assert "onnxruntime failed" in capsys.readouterr().out


def test_the_picture_has_a_column_per_tier_and_marks_what_is_not_comparable() -> None:
    plain = {"ms_per_item": 30.0, "remark": ""}
    peers = {"torch-fp32": plain, "openvino": plain | {"remark": "can saturate"}, "onnxruntime": plain}
    ratios = dict.fromkeys(peers, 3.0)
    held = found("avx2", peers=peers, ratios=ratios, unequal={"onnxruntime": "cannot be held"})
    drawn = ElementTree.fromstring(plot.draw([found("avx512vnni"), held]))
    texts = {"".join(each.itertext()): float(each.get("x")) for each in drawn.iter() if each.tag.endswith("text")}
    assert texts["avx2: without VNNI"] == 0 < texts["avx512vnni: with VNNI"]
    assert {"openvino\N{DOUBLE DAGGER}", "onnxruntime*", "torch-fp32"} <= set(texts)
    assert "\N{DOUBLE DAGGER} can saturate; * not held to the same instructions" in texts
    assert list(texts).count("ViT-B-32, image tower, batch 16") == 1
    bars = [each for each in drawn.iter() if each.tag.endswith("rect")]
    assert len(bars) == 2 + 4 and {each.get("class") for each in bars} == {"ours", "peer"}
    assert not [each for each in drawn.iter() if each.tag.endswith("text") and float(each.get("x")) > plot.WIDTH]


def test_results_that_are_kept_can_be_drawn() -> None:
    kept = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
    runs = [json.loads(path.read_text()) for path in kept if "tier" in json.loads(path.read_text())]
    assert len(runs) > 5
    ElementTree.fromstring(plot.draw(runs))
