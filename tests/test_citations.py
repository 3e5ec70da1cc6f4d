"""What comments cite is in the repository: sections of docs/methods.md by their names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def sources() -> list[Path]:
    """The texts of the repository."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    kinds = {".py", ".md", ".h", ".cc", ".cu", ".def"}
    return [ROOT / name for name in listed.splitlines() if Path(name).suffix in kinds and (ROOT / name).is_file()]


def test_sections_that_are_cited_exist() -> None:
    titles = set(re.findall(r"^#+ (.+)$", (ROOT / "docs/methods.md").read_text(), re.M))
    cited = {}
    for path in sources():
        text = re.sub(r"\s*\n\s*(?://|#)?\s*", " ", path.read_text())  # a citation may go on in the next line
        for title in re.findall(r"docs/methods\.md[,:] ([^).;:\"]+)", text):
            cited[title.strip()] = path.name
    assert len(cited) >= 5  # the pattern finds some
    unknown = {title: name for title, name in cited.items() if not any(title.startswith(known) for known in titles)}
    assert not unknown, unknown


def test_nothing_cites_a_numbered_page_that_is_not_here() -> None:
    own = Path(__file__).name
    found = [
        f"{path.relative_to(ROOT)}: {match}"
        for path in sources()
        if path.name != own
        for match in re.findall(r"\b(?:methods|DESIGN|anchors|structure) \d(?:\.\d)?\b", path.read_text())
    ]
    assert not found, found
