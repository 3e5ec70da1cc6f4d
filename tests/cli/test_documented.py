"""What a user can type or set is written down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qclip.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["']([A-Z][A-Z0-9_]+)["']""")
OURS = re.compile(r"""["']((?:QKERNELS|QCLIP)_[A-Z0-9_]+)["']""")


def documents() -> str:
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))])


def variables() -> set[str]:
    found: set[str] = set()
    for folder, pattern in (("qclip", "*.py"), ("qkernels", "*.py"), ("csrc", "*.cc"), ("csrc", "*.h")):
        for path in (ROOT / folder).rglob(pattern):
            text = path.read_text()
            found |= set(VARIABLE.findall(text))
            if path.suffix == ".py":
                found |= set(OURS.findall(text))  # also where the name stands in a table or a constant
    for file in ("setup.py", "Makefile"):
        found |= set(VARIABLE.findall((ROOT / file).read_text()))
    return found


@pytest.mark.parametrize("command", sorted(command.name or "" for command in app.registered_commands))
def test_every_command_is_in_the_documents(command: str) -> None:
    assert re.search(rf"`?qclip {command}\b", documents()), f"`qclip {command}` is not in README.md or docs/"


def test_every_environment_variable_is_in_the_documents() -> None:
    text = documents()
    missing = sorted(name for name in variables() if not re.search(rf"\b{name}\b", text))
    assert not missing, f"not in README.md or docs/: {missing}"


def test_the_search_finds_variables() -> None:
    assert {"QKERNELS_BACKEND", "QKERNELS_CPU_TIER", "QKERNELS_STRICT"} <= variables()


def test_make_targets_are_in_the_documents() -> None:
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert targets is not None
    text = documents() + (ROOT / "CONTRIBUTING.md").read_text()
    assert not [t for t in targets[1].split() if t != "help" and f"make {t}" not in text]
