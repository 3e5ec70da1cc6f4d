"""A method that one file outside the package adds is there everywhere, and nothing of ours was edited for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TOY = '''
"""A method, a transform of inputs and their names: all that is needed."""
import dataclasses
from typing import Literal

import torch

from qclip.layers import Transform
from qclip.ptq import Method


class Sort(Transform):
    """Input channels in another order."""

    FIXED = ("order",)

    def __init__(self, order):
        super().__init__(len(order))
        self.register_buffer("order", order)

    def input(self, x):
        return x[..., self.order]

    def weight(self, w):
        return w[:, self.order]

    def undo(self, w):
        return w[:, self.order.argsort()]

    @classmethod
    def from_facts(cls, facts):
        return cls(torch.empty(facts["width"], dtype=torch.int64))


@dataclasses.dataclass(frozen=True)
class Options:
    largest: Literal["first", "last"] = "first"
    most: float = 1.0

    def __post_init__(self):
        if not 0 < self.most <= 1:
            raise ValueError(f"most must lie between 0 and 1, not at {self.most:g}")


class Toy(Method):
    """Sort input channels by size, so that groups of weights are alike."""

    name = "toy"
    options = Options
    needs, decides = frozenset({"inputs"}), frozenset({"input", "weight"})
    inputs = "quantized"

    def __init__(self, chosen):
        super().__init__(chosen)
        self.samples = 2
        self.errors = {}

    def block(self, context, run):
        shared = {}
        for state in run.states.values():
            if state.site.shared not in shared:
                size = run.hessian(state.site).diagonal()
                order = size.argsort(descending=self.chosen.largest == "first", stable=True)
                shared[state.site.shared] = Sort(order)
            state.transforms = [shared[state.site.shared]]
        run.use(run.sites)
        self.errors[run.block.name] = run.error()

    def finish(self, context):
        context.notes["toy_errors"] = self.errors
'''

ENTRY_POINTS = """[qclip.methods]
toy = toy_package:Toy

[qclip.transforms]
Sort = toy_package:Sort
"""

SCRIPT = """
import json, sys
import torch, qclip
from qclip import models, recipes
from qclip.errors import RecipeError
from tests.small import IMAGES, TEXTS, small_clip

def refused(make):
    try:
        make()
    except RecipeError as error:
        return str(error)

model = small_clip()
recipe = recipes.Recipe("mine", recipes.Treatment(4, 8, 32), steps=(recipes.step("toy", largest="last"),))
small = qclip.quantize(model, recipe, calibration=IMAGES)
again = qclip.load(qclip.save(small, sys.argv[1]))
with torch.no_grad():
    embedded = [m.encode_image(IMAGES) for m in (model, small, again)]
layer = models.towers(again)["vision"].sites["vision.blocks.0.mlp.fc1"].module
results = qclip.evaluate({"float": model, "mine": again}, data="scenes:test?samples=40", cache=False)
row = next(row for row in results.rows if row["model"] == "mine" and row["metric"] == "top1")
json.dump({
    "name": recipes.get("w4a8-toy").method,
    "json": json.loads(recipe.to_json())["steps"],
    "again": recipes.Recipe.from_json(recipe.to_json()) == recipe,
    "needs_data": refused(lambda: qclip.quantize(model, "w4a8-toy")),
    "unknown": refused(lambda: recipes.get("w4a8-tyo")),
    "option": refused(lambda: recipes.step("toy", largest="middle")),
    "value": refused(lambda: recipes.step("toy", most=2)),
    "transform": type(layer.transforms[0]).__name__,
    "sorted": sorted(layer.transforms[0].order.tolist()) == list(range(64)),
    "coverage": [r.state for r in qclip.coverage(again).rows if r.site == "vision.blocks.0.mlp.fc1"],
    "errors": again.qclip_quantization.provenance["toy_errors"],
    "cosine": torch.nn.functional.cosine_similarity(embedded[0], embedded[1]).min().item(),
    "equal": torch.equal(embedded[1], embedded[2]),
    "row": [row["recipe"], row["method"]],
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One file and the metadata that an installer writes beside it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_package.py").write_text(TOY)
    (folder / "toy-1.0.dist-info").mkdir()
    (folder / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (folder / "toy-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "COLUMNS": "200", "NO_COLOR": "1"}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_command_line_names_it(environment: dict[str, str]) -> None:
    said = run(environment, "-m", "qclip", "recipes")
    line = next(line for line in said.splitlines() if line.strip().startswith("toy"))
    assert "Sort input channels by size" in line and 'largest="first", most=1.0' in line
    said = " ".join(run(environment, "-m", "qclip", "quantize", "--help").split())
    assert re.search(r"Known methods: [^.]*\bsmoothquant, [^.]*\btoy\.", said)


def test_it_quantizes_saves_loads_and_is_measured(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run(environment, "-c", SCRIPT, str(tmp_path / "a")))
    assert found["name"] == "toy" and found["json"] == [{"method": "toy", "largest": "last", "most": 1.0}]
    assert found["again"] and "needs data" in found["needs_data"]
    assert "unknown method 'tyo'; did you mean 'toy'" in found["unknown"]
    assert "'largest' has the wrong type; it takes 'first' or 'last', not 'middle'" in found["option"]
    assert "method 'toy': most must lie between 0 and 1, not at 2" in found["value"]
    assert found["transform"] == "Sort" and found["sorted"] and found["coverage"] == ["real"]
    assert set(found["errors"]) == {
        f"{tower}.{at}" for tower in ("vision", "text") for at in ("blocks.0", "blocks.1", "ending")
    }
    assert all(error > 0 for error in found["errors"].values())
    assert found["cosine"] > 0.9 and found["equal"]
    assert found["row"] == ["mine", "toy"]
