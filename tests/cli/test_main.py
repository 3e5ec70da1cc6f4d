"""Exit codes, messages, and what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qclip.cli import app, main
from qclip.errors import InputError, NonFiniteError

COMMANDS = ["demo", "quantize", "evaluate", "train", "controls", "verify", "spectrum", "sensitivity"]
COMMANDS += ["report", "bench", "doctor", "models", "recipes"]
STUDY = ["plan", "run", "status", "table", "choose", "correlations", "report", "compact", "gc"]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `qclip recipes` raise."""
    import qclip.recipes

    def fail() -> None:
        raise error

    monkeypatch.setattr(qclip.recipes, "presets", fail)


def test_version_is_the_package_s(capsys: pytest.CaptureFixture) -> None:
    import qclip

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qclip {qclip.__version__}\n"


@pytest.mark.parametrize("command", [*COMMANDS, *(f"study {name}" for name in STUDY)])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples" in out and f"qclip {command}" in out.split("Examples")[1]


def test_the_commands_are_these() -> None:
    assert {command.name for command in app.app.registered_commands} == set(COMMANDS)
    (study,) = app.app.registered_groups
    assert study.name == "study" and study.typer_instance is not None
    assert [command.name for command in study.typer_instance.registered_commands] == STUDY


@pytest.mark.parametrize(
    "line",
    [
        ["nonsense"],
        ["quantize"],
        ["quantize", "x", "--nope"],
        ["bench", "x", "--batch", "0"],
        ["recipes", "w8a99"],
        ["report", "no-such-file.json"],
        ["bench", "x", "--peers", "tensort"],
        ["evaluate", "x", "--data", "scenes:nope"],
    ],
)
def test_bad_input_is_2_and_one_sentence(line: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qclip: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [("QKERNELS_BACKEND", "refrence", "'reference'"), ("QKERNELS_CPU_TIER", "avx512", "'avx512vnni'")],
)
def test_a_bad_environment_is_2_and_one_sentence(
    name: str, value: str, near: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    for line in (["doctor"], ["evaluate", "scenes-clean", "--recipe", "w8a8", "--data", "scenes:test?samples=20"]):
        assert main(line) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith(f"qclip: {name}={value}") and near in err.partition("did you mean")[2]


def test_two_recipes_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("w8a8", "float"):
        (tmp_path / "mine.json").write_text(json.dumps({"name": name, "weight_bits": 6}))
        line = ["spectrum", "scenes-clean", "--recipe", "w8a8", "--recipe", str(tmp_path / "mine.json")]
        assert main(line) == 2
        assert f"two recipes are named '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--through"], "--through and --ood need images; name them with --data"),
        (["--data", "scenes:test", "--ood", "scenes:ood"], "--ood is for --through; give both"),
        (["--control", "pink"], "unknown spectral control 'pink'"),
    ],
)
def test_spectrum_refuses_what_does_not_go_together(
    options: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["spectrum", "scenes-clean", *options]) == 2
    assert said in capsys.readouterr().err


def test_spectrum_writes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["spectrum", "scenes-clean", "--output", str(tmp_path), "--force"]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_an_unknown_recipe_lists_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes", "w8a8-smothquant"]) == 2
    assert "'smoothquant'" in capsys.readouterr().err


def test_a_failure_is_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    raising(monkeypatch, NonFiniteError("vision.blocks.0.attn.q holds NaN"))
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err == "qclip: vision.blocks.0.attn.q holds NaN\n"


def test_an_unforeseen_error_is_1_and_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    raising(monkeypatch, KeyError("surprise"))
    assert main(["recipes"]) == 1
    err = capsys.readouterr().err
    assert "surprise" in err and "--debug" in err and "Traceback" not in err


@pytest.mark.parametrize("line", [["recipes", "--debug"], ["--debug", "recipes"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    raising(monkeypatch, InputError("wrong"))
    assert main(line) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert main(["recipes"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_recipes_as_json_is_json_alone_and_reads_back(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    from qclip.recipes import Recipe, get, presets

    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed) == set(presets())
    assert main(["recipes", "w4a8", "--json"]) == 0
    file = tmp_path / "mine.json"
    file.write_text(capsys.readouterr().out)
    assert get(str(file)) == get("w4a8") == Recipe.from_dict({k: v for k, v in listed["w4a8"].items() if k != "about"})


def test_help_starts_without_torch() -> None:
    code = (
        "import sys; sys.argv[:] = ['qclip', '--help']\n"
        "from qclip.cli import main; main(['--help']); sys.exit(('torch' in sys.modules) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "evaluate" in done.stdout


def test_warnings_are_one_line_without_our_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import warnings

    import qclip.recipes

    def warn() -> dict[str, str]:
        warnings.warn("mind\nthis", stacklevel=1)
        return {}

    monkeypatch.setattr(qclip.recipes, "presets", warn)
    assert main(["recipes", "--json"]) == 0
    assert capsys.readouterr() == ("{}\n", "warning: mind this\n")


def test_calibration_that_a_recipe_does_not_read_is_said(tmp_path, capsys: pytest.CaptureFixture) -> None:
    line = ["quantize", "scenes-clean", "--recipe", "w8a8", "--calibration", "scenes:train"]
    line += ["--output", str(tmp_path / "a")]
    assert main(line) == 0
    assert "--calibration scenes:train is not read: recipe 'w8a8' needs no data" in capsys.readouterr().err
