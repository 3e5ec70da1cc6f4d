"""Fixtures for every test."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


# The same examples in every run, however slow the machine is; fixtures are set once for all examples of a test.
settings.register_profile(
    "qclip",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("qclip")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="hostile tests in full: more kill moments, more kernel calls")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether `--full` was given: tests that sample hostile cases then take all of them."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers alone, in any order and in every run."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; tests that need it skip by name where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "cifar10_test.parquet").is_file():
        pytest.skip("needs ../shared/data, the real images (not part of the repository)")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`local-dir:PATH` of a CLIP with random weights, 32 px, two blocks a tower, in open_clip's own layout."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    settings = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": [32, 32]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": settings}))
    return f"local-dir:{folder}"
