"""`qclip models --supported` and the README's table are what the code does now."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm

import qclip
from benchmarks import supported
from qclip.artifact import TENSORS
from qclip.models import open_clip_names

from .models.small_timm import SMALL, build
from .small import small_clip

KNOWN, VERSIONS = open_clip_names.supported()
SOME = ["ViT-B-32", "EVA02-B-16", "PE-Core-T-16-384", "MobileCLIP2-S0", "ViTamin-S", "roberta-ViT-B-32", "RN50"]
same_libraries = pytest.mark.skipif(
    VERSIONS != {"open_clip": open_clip.__version__, "timm": timm.__version__},
    reason=f"needs the libraries that the names were looked at with: {VERSIONS}",
)


@same_libraries
def test_every_name_is_there() -> None:
    assert list(KNOWN) == open_clip.list_models(), "write it again: python -m benchmarks.supported write"
    assert sum(entry.refused is not None for entry in KNOWN.values()) <= 12


@same_libraries
@pytest.mark.parametrize("name", SOME)
def test_the_file_says_what_is_so(name: str) -> None:
    assert supported.look(name) == KNOWN[name], "write it again: python -m benchmarks.supported write"


@same_libraries
@pytest.mark.slow
def test_the_file_says_what_is_so_of_all_names(full: bool) -> None:
    if not full:
        pytest.skip("needs --full: minutes")
    assert supported.everything() == KNOWN


def test_the_readme_has_the_table() -> None:
    text = supported.README.read_text()
    assert supported.BEGIN in text and supported.readme(text, KNOWN) == text, (
        "write it again: python -m benchmarks.supported write"
    )


@pytest.mark.parametrize("name", ["clip", "eva02", "fastvit", "swin"])
def test_sizes_and_shares_are_those_of_a_quantized_model(name: str, tmp_path: Path) -> None:
    model = small_clip() if name == "clip" else build(name)
    with qclip.models.explicit_form(model) as towers:
        real, macs, size = supported._counted(model, towers)
    done = qclip.quantize(model, "w8a8")
    assert qclip.coverage(done).share("real") == pytest.approx(real / macs)
    stored = (qclip.save(done, tmp_path / "artifact") / TENSORS).stat().st_size
    assert 0 < stored - size < 60_000  # the file's header names the tensors
    with open(tmp_path / "artifact" / TENSORS, "rb") as file:
        assert stored - size == 8 + int.from_bytes(file.read(8), "little")
    assert name == "clip" or name in SMALL


def test_the_command_prints_them() -> None:
    run = [sys.executable, "-m", "qclip", "models", "--supported"]
    told = subprocess.run([*run, "MobileCLIP2-S0"], capture_output=True, text=True, check=True).stdout
    assert "MobileCLIP2-S0" in told and "accepted" in told and f"{KNOWN['MobileCLIP2-S0'].real:.1%}" in told
    found = json.loads(subprocess.run([*run, "RN50", "--json"], capture_output=True, text=True, check=True).stdout)
    assert "ModifiedResNet" in found["names"]["RN50"]["refused"]
    wrong = subprocess.run([*run, "no-such-name"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no open_clip name contains" in wrong.stderr
