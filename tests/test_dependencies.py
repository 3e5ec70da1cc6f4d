"""What pyproject.toml declares against what the packages import."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"qclip", "qkernels"}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def imported(*folders: str) -> set[str]:
    """Distributions behind every import, also those inside functions."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            modules |= {name.split(".")[0] for name in names}
    owners = packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - OURS
    return {owner.lower().replace("_", "-") for name in foreign for owner in owners.get(name, [name])[:1]}


def test_every_import_is_declared():
    extras = [r for name in ("hf", "bench", "ray") for r in PROJECT["optional-dependencies"][name]]
    declared = {name_of(r) for r in [*PROJECT["dependencies"], *extras]}
    assert imported(*OURS) - declared - {"markupsafe", "click"} == set()  # jinja2 and typer are made of these two


def test_every_dependency_is_imported():
    assert {name_of(r) for r in PROJECT["dependencies"]} - imported(*OURS) == set()


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_what_is_pinned_fits_what_is_declared(requirement):
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert Requirement(requirement).specifier.contains(pins[name_of(requirement)])
