"""Every numeric option of every command takes what makes sense, and refuses the rest by name before anything is done.

The options are read off the commands themselves, so that a new one is tried, too."""

from __future__ import annotations

import os
import typing

import pytest
import typer

import qclip
from qclip.cli import common, main
from qclip.cli.app import app

COMMANDS = {command.name or "": command.callback for command in app.registered_commands}
COMMANDS |= {
    f"{group.name} {command.name}": command.callback
    for group in app.registered_groups
    for command in (group.typer_instance.registered_commands if group.typer_instance else [])
}
POWER = str(2**70)
NONSENSE = ["", "x", "1.5.2", "--", "nan", "inf", "-inf", "1e400", "-1", "-0.5", POWER, f"-{POWER}", "9" * 5000]
TOO_MUCH = [str(2**40), str(10**9)]  # of threads, images at once, seconds: more than any machine has
NEEDED = {"quantize": ["x"], "evaluate": ["x", "--data=x"], "spectrum": ["x"], "report": ["x"], "bench": ["x"]}
NEEDED["sensitivity"] = ["x", "--data=x"]
NEEDED["train"] = ["x", "--recipe=w4a4-lsq", "--pairs=x", "--output=x"]
NEEDED["controls"] = ["x", "--recipe=w4a4-lsq", "--pairs=x", "--data=x", "--dev=x", "--output=x"]
NEEDED["verify"] = ["x", "--against=x", "--data=x", "--require=top1>=-1"]
for name in ("plan", "run", "status", "table", "choose", "correlations", "compact", "gc"):
    NEEDED[f"study {name}"] = ["x"]
NEEDED["study report"] = ["x", "--output=x"]


NOTHING = ("--steps", "--decay", "--warmup", "--start", "--ema", "--held-out")  # of training: 0 is none of it


def _hints(command: str) -> typing.Iterator[tuple[str, typing.Any, typer.models.OptionInfo]]:
    for hint in typing.get_type_hints(COMMANDS[command], include_extras=True).values():
        if typing.get_origin(hint) is typing.Annotated:
            kind, option = typing.get_args(hint)[:2]
            if isinstance(option, typer.models.OptionInfo):
                flag = next(d for d in (option.default, *(option.param_decls or ())) if str(d).startswith("--"))
                yield flag, kind, option


def options(command: str) -> dict[str, set[type]]:
    """Option -> the types that it takes."""
    return {flag: {kind, *typing.get_args(kind)} for flag, kind, _ in _hints(command)}


def about(command: str) -> dict[str, typer.models.OptionInfo]:
    return {flag: option for flag, _, option in _hints(command)}


OPTIONS = [(name, flag) for name in COMMANDS for flag, kinds in options(name).items() if kinds & {int, float}]


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("work began before the numbers were looked at")

    monkeypatch.setattr(qclip, "load_model", work)


def test_the_options_are_found() -> None:
    some = {"evaluate --threads", "evaluate --batch", "evaluate --seed", "demo --samples", "bench --seconds"}
    assert some <= {f"{name} {flag}" for name, flag in OPTIONS}


@pytest.mark.parametrize(("name", "flag"), OPTIONS)
def test_nonsense_is_refused_by_name(name: str, flag: str, capsys: pytest.CaptureFixture) -> None:
    more = [] if flag == "--seed" else ["0", *TOO_MUCH]  # a seed is the only number that may be any number
    if name in ("train", "controls") and flag in NOTHING:
        more.remove("0")
    for value in [*NONSENSE, *more]:
        assert main([*name.split(), *NEEDED.get(name, []), f"{flag}={value}"]) == 2, value
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("qclip: ") and err.count("\n") == 1, err
        assert flag in err and f"qclip {name} --help" in err


def test_real_numbers_are_finite_whatever_typer_lets_through() -> None:
    """The oldest typer that we take compares NaN with the bounds, which then hold; the newest refuses it itself."""
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(typer.BadParameter, match="is not a finite number"):
            common.finite(float(value))
    assert common.finite(0.5) == 0.5
    real = [(name, flag) for name, flag in OPTIONS if float in options(name)[flag]]
    assert ("bench", "--seconds") in real
    for name, flag in real:
        assert about(name)[flag].callback is common.finite, f"{name} {flag} takes NaN"


@pytest.mark.parametrize("value", ["1", "2", str(max(64, 4 * (os.cpu_count() or 1)))])
def test_threads_that_a_machine_may_have_are_taken(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from qclip import doctor

    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(doctor, "examine", lambda: {"problems": []})
    assert main(["doctor", "--json", "--threads", value]) == 0
    assert taken == [int(value)]
