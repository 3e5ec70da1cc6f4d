"""Output that is whole or not there, progress, and what users put into files."""

from __future__ import annotations

from pathlib import Path

import pytest

from qclip.cli import common
from qclip.errors import InputError, OutputExistsError


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("disk")])
def test_a_broken_run_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), common.whole_files(tmp_path / "out") as part:
        (part / "results.json").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_broken_run_leaves_the_earlier_output_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), common.whole_files(tmp_path / "out") as part:
        (part / "results.json").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "results.json").read_text() == "earlier"


def test_files_are_replaced_and_strangers_stay(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with common.whole_files(folder) as part:
        (part / "results.json").write_text("first")
    (folder / "notes.txt").write_text("mine")
    with common.whole_files(folder) as part:
        (part / "results.json").write_text("second")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"results.json": "second", "notes.txt": "mine"}


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="is a file"), common.whole_files(tmp_path / "out"):
        pass


def test_existing_output_needs_force(tmp_path: Path) -> None:
    common.refuse_existing(tmp_path / "absent", force=False)
    common.refuse_existing(tmp_path, force=False)  # empty
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputExistsError, match="--force"):
        common.refuse_existing(tmp_path, force=False)
    with pytest.raises(OutputExistsError):
        common.refuse_existing(tmp_path / "x", force=False)
    common.refuse_existing(tmp_path, force=True)


@pytest.mark.parametrize(("step", "lines"), [(1.0, 11), (0.02, 3), (0.0, 1)])
def test_progress_without_a_terminal_is_lines_on_stderr(
    step: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A line every tenth; at most one a second, so that what is quick says little."""
    now = 0.0
    monkeypatch.setattr(common.time, "monotonic", lambda: now)
    with common.progress() as report:
        for done in range(0, 101):
            report("images", done, 100)
            now += step
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == lines and "  0 %  images" in err


@pytest.mark.parametrize(
    "model, name",
    [
        ("photos", "photos"),
        ("ViT-B-32:laion2b_s34b_b79k", "ViT-B-32-laion2b_s34b_b79k"),
        ("a/b/my.model.safetensors", "my.model"),
        ("hf:org/clip", "clip"),
        ("local-dir:a/b/", "b"),
        ("..", "model"),
    ],
)
def test_short_names_can_be_file_names(model: str, name: str) -> None:
    assert common.short_name(model) == name


def test_a_piped_table_is_not_cut(capsys: pytest.CaptureFixture) -> None:
    common.print_table("t", ["a", "b"], [["x" * 100, 1.5], ["[bold]", 2.0]])
    out = capsys.readouterr().out
    assert "x" * 100 in out and "[bold]" in out
