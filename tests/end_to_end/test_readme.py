"""The README's Python runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # whole commands

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("number", range(len(blocks())))
def test_every_python_block_runs(number: int, tmp_path: Path) -> None:
    """In a process of its own, beside a picture, and on the images that each name stands for, but fewer."""
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(
        tmp_path / "picture.jpg"
    )
    code = re.sub(r'"(scenes:[a-z-]+)"', r'"\1?samples=20"', blocks()[number])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_the_readme_quantizes_one_tower() -> None:
    import qclip

    (text,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    small = qclip.quantize(qclip.load_model("scenes-clean"), json.loads(text))
    states = {row.site: row.state for row in qclip.coverage(small).rows if row.kind not in ("attention", "other")}
    real = {site for site, state in states.items() if state == "real"}
    assert {site.split(".")[0] for site in states} == {"vision", "text"}
    assert real == {site for site in states if site.startswith("vision.")} - {"vision.blocks.0.attn.q"}


def test_the_data_names_of_the_readme_exist() -> None:
    from qclip import data

    text = (ROOT / "README.md").read_text()
    (larger,) = re.findall(r"`(scenes:test\?side=\d+)`", text)
    assert data.load(larger).image(0).size == (64, 64) and "`--ood near=NAME`" in text


def test_the_readme_has_its_commands_and_python() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^make demo\b", text, re.M) and re.search(r"^make test\b", text, re.M)
    assert len(blocks()) >= 2
