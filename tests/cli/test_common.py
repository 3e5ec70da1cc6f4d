"""Progress, tables, and what users put into files."""

from __future__ import annotations

import pytest

from qclip.cli import common


@pytest.mark.parametrize(("step", "lines"), [(1.0, 11), (0.02, 3), (0.0, 1)])
def test_progress_without_a_terminal_is_lines_on_stderr(
    step: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A line per tenth of the work, at most one per second, so that what is quick says little."""
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


def test_what_stands_in_a_table_commands_no_terminal(capsys: pytest.CaptureFixture) -> None:
    common.print_table("t", ["a", "b"], [["evil\x1b[2J\x9b2J\x07\r", 1.5]])
    out = capsys.readouterr().out
    assert "evil\u241b[2J\u24212J\u2407\u240d" in out
    assert not {"\x1b", "\x9b", "\x07", "\r"} & set(out.replace("\x1b[1mt\x1b[0m", ""))
