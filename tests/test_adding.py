"""The files of docs/adding.md, taken from the page and installed as a package: they do what the page says of them."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import qclip
from qclip import controls, metrics, models, recipes
from qclip.bench.peers import PEERS, peer_names
from qclip.data import corruptions
from qclip.errors import RecipeError
from qclip.reliability import evaluate, measurements, scores
from qclip.reporting import html, sections
from qclip.spectral import CONTROLS
from qclip.training.objectives import OBJECTIVES

PAGE = Path(__file__).parent.parent / "docs" / "adding.md"
#: name of a file -> its text
FILES = {
    text.partition("\n")[0].removeprefix("# "): text
    for text in re.findall(r"^```(?:python|toml)\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
}
MODULES = sorted(name for name in FILES if name.startswith("my_"))
TESTS = sorted(name for name in FILES if name.startswith("test_my_"))
REGISTRIES = {
    registry.group: registry
    for registry in (
        recipes.METHODS,
        recipes.QUANTIZERS,
        OBJECTIVES,
        scores.SCORES,
        CONTROLS,
        corruptions.CORRUPTIONS,
        models.FAMILIES,
        metrics.METRICS,
        measurements.MEASUREMENTS,
        sections.SECTIONS,
        PEERS,
    )
}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As pip leaves them: modules, and the entry points of the page's pyproject.toml."""
    folder = tmp_path_factory.mktemp("installed")
    for name in MODULES:
        (folder / name).write_text(FILES[name])
    info = folder / "adding-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adding\nVersion: 1.0\n")
    points = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]
    lines = [
        line for group, names in points.items() for line in (f"[{group}]", *(f"{n} = {v}" for n, v in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for registry in REGISTRIES.values():
            registry.forget()
        yield
    for name in MODULES:
        sys.modules.pop(name.removesuffix(".py"), None)
    for registry in REGISTRIES.values():
        registry.forget()


@pytest.fixture(scope="module")
def two_towers() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.load("two-towers:small")


def test_the_page_is_whole() -> None:
    """Every kind has a file that is short enough to copy, a test of its own, a group, and a row of the table."""
    text = PAGE.read_text()
    points = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]
    assert set(points) == set(REGISTRIES)
    for group in points:
        assert f"| `{group}` |" in text, group
    assert len(MODULES) == 11 and TESTS == sorted(f"test_{name}" for name in MODULES if name != "my_model.py")
    for name, content in FILES.items():
        assert len(content.splitlines()) <= 80 and max(map(len, content.splitlines())) <= 120, name
        if name.endswith(".py"):
            ast.parse(content)
    for found in re.findall(r"\]\(#([a-z0-9-]+)\)", text):
        assert found in {
            re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-") for line in re.findall("^## (.*)$", text, re.M)
        }


@pytest.mark.parametrize("name", TESTS)
def test_its_own_tests_pass(name: str) -> None:
    module = types.ModuleType(name.removesuffix(".py"))
    exec(compile(FILES[name], name, "exec"), module.__dict__)
    tests = [value for key, value in vars(module).items() if key.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_method_is_in_names_lists_and_artifacts(two_towers: torch.nn.Module, tmp_path: Path) -> None:
    shown = CliRunner().invoke(_app(), ["recipes"], env={"COLUMNS": "200"}).output
    assert "biascorrection" in shown and "Take back by the bias" in shown and "share=1.0" in shown
    assert recipes.get("w8a8-smoothquant+biascorrection").needs_data
    recipe = {"name": "half", "steps": [{"method": "biascorrection", "share": 0.5}]}
    done = qclip.quantize(two_towers, recipe, calibration=IMAGES)
    again = qclip.load(qclip.save(done, tmp_path / "artifact"))
    kept = again.qclip_quantization
    assert kept.recipe.to_dict()["steps"][0]["share"] == 0.5 and kept.provenance["biases_corrected"] == 2 * 2 * 6
    assert torch.equal(_embed(again), _embed(done))
    assert not torch.equal(_embed(done), _embed(qclip.quantize(two_towers, "w8a8")))
    with pytest.raises(RecipeError, match="share must lie between 0 and 1, not at 2"):
        recipes.get(recipe | {"steps": [{"method": "biascorrection", "share": 2.0}]})


def test_quantizer_and_objective_train_and_are_controlled() -> None:
    shown = CliRunner().invoke(_app(), ["train", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
    assert "stochastic" in shown and "hardest" in shown
    settings = {"objective": "contrastive+0.5*hardest", "steps": 1, "batch": 4, "pairs": 4, "held_out": 0.0}
    trained = qclip.train(qclip.load_model("scenes-clean"), "w4a8-stochastic", "scenes:train", **settings)
    assert trained.qclip_quantization.recipe.method == "stochastic"
    found = controls.arms(recipes.get("w4a8-stochastic"), ["noise"], steps=3)
    assert [arm.recipe.method for arm in found] == ["stochastic", "noise"]


def test_the_family_is_listed_and_loaded() -> None:
    out = CliRunner().invoke(_app(), ["models"], env={"COLUMNS": "200"}).output
    assert "two-towers:small" in out and "random weights" in out
    assert type(qclip.load_model("two-towers:small")).__name__ == "TwoTowers"


def test_the_peer_is_asked_for_by_its_name() -> None:
    assert peer_names("torch-fp16,torch-fp32") == ("torch-fp16", "torch-fp32") and "torch-fp16" in list(PEERS)
    assert PEERS.get("torch-fp16").__name__ == "TorchHalf"


def test_everything_else_is_in_help_results_and_report(two_towers: torch.nn.Module) -> None:
    compared = {"float": two_towers, "w4a8": qclip.quantize(two_towers, "w4a8")}
    results = evaluate(
        compared,
        "scenes:test?samples=24",
        ["scenes:far-ood?samples=16"],
        train="scenes:dev?samples=24",
        corruptions=["vignette"],
        cache=False,
    )
    for model in compared:
        assert 0 <= results.value(model=model, score="my_nearest", metric="auroc", reference="") <= 1
        assert results.value(model=model, corruption="vignette", severity=5, metric="top1", reference="") is not None
        row = results.row(model=model, metric="uniformity", reference="")
        assert row["low"] <= row["value"] <= row["high"] <= 0
    assert results.row(model="w4a8", metric="uniformity", reference="float")["low"] is not None
    page = html(results)
    for said in ("k nearest neighbours", "Vignette", '<section id="uniformity">', "How evenly image embeddings spread"):
        assert said in page, said
    shown = CliRunner().invoke(_app(), ["evaluate", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
    for name in ("biascorrection", "my_nearest", "vignette", "uniformity"):
        assert name in shown, name
    json.dumps(results.rows)


def test_a_call_registers_as_well() -> None:
    import my_score

    class Other(my_score.MyNearest):
        name = "other_nearest"

    scores.SCORES.register(Other)
    assert "other_nearest" in scores.SCORES.names()
    scores.SCORES.unregister("other_nearest")
    assert "other_nearest" not in scores.SCORES and "my_nearest" in scores.SCORES


def _embed(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return models.encoders(model).encode_image(IMAGES)


def _app():  # noqa: ANN202
    from qclip.cli.app import app

    return app
