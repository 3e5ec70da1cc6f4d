"""What guides say of this repository is so: files exist, names stand in them, the picture of floors is the contract."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENDINGS = ("py", "md", "toml", "cc", "h", "cu", "def", "json", "txt", "svg", "png", "j2", "css")
#: Files that are made or given, not of this repository.
MADE = re.compile(r"results\.json|my_\w+\.py")


def paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, without blocks of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    return [part for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-|]|\d+\.) )", text) if part.strip()]


def paths(part: str) -> list[str]:
    """What stands in backticks and looks like a file or folder of a repository."""
    found = re.findall(r"`([^`\s]+)`", part)
    name = r"[\w.*-]+"
    looks = re.compile(rf"(?:{name}/)*{name}\.(?:{'|'.join(ENDINGS)})|(?:\.?{name}/)+(?:{name}/?)?")
    return [each for each in found if looks.fullmatch(each) and not MADE.fullmatch(each)]


def resolve(path: str, folders: list[Path]) -> list[Path]:
    """The files of that name: from the root, or beside what was named before in the same paragraph."""
    if re.search(r"\b[A-Z]{3,}\b", path):  # a placeholder, as in qclip/checkpoints/NAME/README.md
        path = re.sub(r"\b[A-Z]{3,}\b", "*", path.replace("README.md", "*.md"))
    for folder in [ROOT, *folders]:
        if any(character in path for character in "*"):
            if found := list(folder.glob(path)):
                return found
        elif (folder / path).exists():
            return [folder / path]
    return []


def named(page: Path) -> list[tuple[str, list[Path]]]:
    """What a page names, with the files of that name. README.md names files of users; those in our folders count."""
    ours = {each.name for each in ROOT.iterdir() if each.is_dir()}
    out = []
    for part in paragraphs(page.read_text()):
        every = [path for path in paths(part) if page.name != "README.md" or path.partition("/")[0] in ours]
        folders = [found for path in every for found in resolve(path, [])]
        folders = [found if found.is_dir() else found.parent for found in folders]
        out += [(path, resolve(path, folders)) for path in every]
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_guide_names_exist(page: Path) -> None:
    found = named(page)
    assert not [path for path, files in found if not files]
    if page.name == "ARCHITECTURE.md":
        assert len(found) > 100  # the pattern still finds what it looks for


def test_names_stand_in_the_files_that_are_named_beside_them() -> None:
    """`file.py` `name`, one behind the other, or `name` in `file.py`."""
    pairs, missing = 0, []
    for page in PAGES:
        for part in paragraphs(page.read_text()):
            folders = [found if found.is_dir() else found.parent for path in paths(part) for found in resolve(path, [])]
            beside = re.findall(r"`([\w./]+\.py)` `([\w.]+)`", part)
            beside += [(path, name) for name, path in re.findall(r"`([\w.]+)` in `([\w./]+\.py)`", part)]
            for path, name in beside:
                text = "".join(file.read_text() for file in resolve(path, folders))
                pairs += 1
                for piece in name.split("."):
                    if not re.search(rf"^\s*(?:class|def) {piece}\b|^\s*{piece}\b.*=", text, re.M):
                        missing.append((page.name, path, name))
    assert not missing and pairs > 20


def floors(picture: str) -> dict[str, list[set[str]]]:
    """Of each package, the rooms on each line."""
    out: dict[str, list[set[str]]] = {}
    for line in picture.splitlines():
        if re.fullmatch(r"\w+", line):
            out[line] = []
        elif found := re.match(r"  ([a-z]\w*(?:, \w+)*)(?:  |$)", line):
            list(out.values())[-1].append(set(found[1].split(", ")))
    return out


def test_the_picture_of_floors_is_the_contract() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    picture = floors(re.findall(r"^```\n(.*?)^```$", text, re.S | re.M)[0])
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layered = {each["containers"][0]: each["layers"] for each in contracts if each["type"] == "layers"}
    assert set(picture) == set(layered) == {"qclip", "qkernels"}
    for package, layers in layered.items():
        wanted = [set(re.findall(r"\w+", layer)) for layer in layers]
        assert picture[package] == [rooms for rooms in wanted if rooms != {"__main__"}]


def test_it_tells_what_is_missing_from_what_is_there() -> None:
    part = "`qclip/models/family.py` and `hooks.py`, `qclip/nothing.py`, `nothing.py`, `qclip/models/`, `hf:ID`, `a/b`"
    assert paths(part) == [
        "qclip/models/family.py",
        "hooks.py",
        "qclip/nothing.py",
        "nothing.py",
        "qclip/models/",
        "a/b",
    ]
    models = ROOT / "qclip" / "models"
    assert resolve("hooks.py", [models]) == [models / "hooks.py"] and resolve("nothing.py", [models]) == []
